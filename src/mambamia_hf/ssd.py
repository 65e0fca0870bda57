"""The state-space scan of Mamba2 (SSD; Dao and Gu 2024), its causal convolution and its norm, as pure functions.

Every call picks its engine by the device and the type of the tensors. In bfloat16 and float16 on an NVIDIA GPU these
are the Triton kernels of `ssd_triton.py` and, where nothing needs a gradient, of `mixer_triton.py`. On a GPU where
these do not run, and for the gradient of the convolution, they are the official kernels where these can be imported
(`mamba-ssm` and `causal-conv1d`, installed or from the Hub). Everywhere else it is PyTorch: `ssd_cpu.py` and
`ssd_gpu.py` compute what `ssd_reference` below says, faster. Under `torch.compile` these engines are one operator of
the graph. `torch.export` and the gradient of a compiled model get `ssd_reference` itself, spelt out in the graph.

Letters in the shapes: b batch, l length, h heads, p head size, g groups, n state size, c chunks, q tokens of a chunk.
"""

import re
from functools import partial

import torch
from torch import Tensor, nn
from transformers.integrations import use_kernel_func_from_hub_with_fallback

from .mixer_triton import causal_conv1d_silu as triton_causal_conv1d_silu
from .mixer_triton import gated_norm as triton_gated_norm
from .mixer_triton import runs_on as triton_runs_on
from .ssd_cpu import chunk_scan as cpu_chunk_scan
from .ssd_cpu import final_states as cpu_final_states
from .ssd_gpu import chunk_scan as gpu_chunk_scan
from .ssd_gpu import final_states as gpu_final_states
from .ssd_triton import chunk_scan as triton_chunk_scan
from .ssd_triton import final_states as triton_final_states


# `ssd_reference` has a weight per head and pair of tokens of a chunk, so short chunks cost less.
_REFERENCE_CHUNK_SIZE = 64
# Chunks whose states it computes together.
_CHUNK_GROUP = 16


def ssd_chunk_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    reverse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""The selective scan $h_t = e^{\Delta_t A} h_{t-1} + \Delta_t B_t x_t$, $y_t = C_t h_t + D x_t$, chunk by chunk.

    Names and meaning are those of mamba-ssm's `mamba_chunk_scan_combined`. Time is linear in the length. Beside inputs
    and outputs the PyTorch engine holds a few chunks, and for the gradient one state per 16 chunks. It computes in
    float32, or float64 for float64 inputs, whatever the type of the inputs; the kernels round what goes into their
    products to the type of x.

    Args:
        x: `(b, l, h, p)`.
        dt: `(b, l, h)`, the step size Δ before bias, softplus and limit.
        A: `(h,)`, negative.
        B: `(b, l, g, n)`, where g divides h; a group serves `h / g` consecutive heads.
        C: `(b, l, g, n)`.
        chunk_size: length of a chunk at most. The result does not depend on it.
        D: `(h,)` or `(h, p)`, the skip connection.
        dt_bias: `(h,)`, added to `dt`.
        initial_states: `(b, h, p, n)`, zero where absent.
        dt_softplus: whether Δ is the softplus of the biased `dt`.
        dt_limit: Δ is clamped to this range, which holds nothing negative.
        return_final_states: whether to return the states after the last token as well.
        reverse: whether the scan runs from the last token, which is then its first, to the first.

    Returns:
        `y (b, l, h, p)` in the type of x; with `return_final_states` a pair of it and the states `(b, h, p, n)`.

    Raises:
        ValueError: if the shapes do not fit each other, or Δ could be negative.
    """
    batch, length, heads, _ = x.shape
    if dt.shape != (batch, length, heads) or A.shape != (heads,):
        raise ValueError(f"x {tuple(x.shape)} needs dt (b, l, h) and A (h,), not {tuple(dt.shape)}, {tuple(A.shape)}.")
    if dt_limit[0] < 0:
        raise ValueError(f"dt_limit={tuple(dt_limit)} lets step sizes be negative; start it at 0 or above.")
    if B.shape != C.shape or B.shape[:2] != (batch, length) or heads % B.shape[2]:
        raise ValueError(
            f"x {tuple(x.shape)} needs B and C of one shape (b, l, groups, state) with groups dividing the heads, "
            f"not {tuple(B.shape)}, {tuple(C.shape)}."
        )
    flips = reverse and not _has_triton(x)
    if flips:
        x, dt, B, C = (tensor.flip(1) for tensor in (x, dt, B, C))
    official = _has_kernels(x) and not _has_triton(x)
    scan = _kernel_chunk_scan if official else partial(_torch_chunk_scan, reverse=reverse and not flips)
    y, states = scan(
        x,
        dt,
        A,
        B,
        C,
        chunk_size,
        D=D,
        dt_bias=dt_bias,
        initial_states=initial_states,
        dt_softplus=dt_softplus,
        dt_limit=dt_limit,
        return_final_states=True,
    )
    y = y.flip(1) if flips else y
    return (y, states) if return_final_states else y


def reads_backwards(x: Tensor) -> bool:
    """Whether the functions here read a tensor from its end without flipping it, as the Triton kernels do; these run
    where nothing needs a gradient and no graph is made."""
    return not torch.is_grad_enabled() and _has_triton(x)


def _has_triton(x: Tensor) -> bool:
    """Whether the Triton kernels may run."""
    return not torch.compiler.is_compiling() and triton_runs_on(x)


def ssd_reference(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, states: Tensor, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """The scan as the SSD paper teaches it (Dao and Gu 2024, Listing 1), in numbered steps.

    Args:
        x: `(b, l, h, p)`.
        delta: `(b, l, h)`, the step size Δ itself.
        A: `(h,)`.
        B: `(b, l, g, n)`.
        C: `(b, l, g, n)`.
        D: `(h,)`.
        states: `(b, h, p, n)`, those before the first token.
        chunk_size: length of a chunk.

    Returns:
        `y (b, l, h, p)` in the type of x, and the states after the last token `(b, h, p, n)`. `delta`, `A`, `D` and
        states have the type that everything is computed in.
    """
    length, heads = x.shape[1:3]
    num_chunks = _more_than_one(length, chunk_size)

    def chunked(tensor: Tensor) -> Tensor:
        """`(b, l, ...)` to `(b, c, q, ...)`, filled up with tokens of step size zero, which change nothing."""
        padding = (0, 0) * (tensor.dim() - 2) + (0, num_chunks * chunk_size - length)
        return nn.functional.pad(tensor.to(A.dtype), padding).unflatten(1, (num_chunks, chunk_size))

    def per_head(tensor: Tensor) -> Tensor:
        """`(b, c, g, ...)` to `(b, c, h, ...)`."""
        return tensor.repeat_interleave(heads // tensor.shape[2], dim=2)

    x_, delta = chunked(x), chunked(delta)
    B, C = (chunked(tensor).transpose(2, 3) for tensor in (B, C))  # b c g q n
    log_decay = (delta * A).transpose(2, 3).cumsum(dim=-1)  # b c h q, from the start of the chunk to each token
    written = x_ * delta.unsqueeze(-1)

    # 1. What a token reads from its own chunk: Σ_s≤t (C_t·B_s) e^{decay from s to t} Δ_s x_s.
    weights = per_head(C @ B.mT) * _decay_between(log_decay)
    y = torch.einsum("bchqs,bcshp->bcqhp", weights, written)

    # 2. What each chunk adds to the state: Σ_s e^{decay from s to its end} Δ_s x_s B_s.
    to_end = (log_decay[..., -1:] - log_decay).exp().unsqueeze(-1)
    added = torch.einsum("bchqn,bcqhp->bchpn", per_head(B) * to_end, written)

    # 3. The states between chunks: the recurrence over chunks.
    entered, states = _states_between_chunks(added, log_decay[..., -1].transpose(1, 2), states)

    # 4. What a token reads from the state that entered its chunk: e^{decay to t} C_t h.
    y = y + torch.einsum("bchqn,bchpn->bcqhp", per_head(C) * log_decay.exp().unsqueeze(-1), entered)

    y = (y + D.unsqueeze(-1) * x_).flatten(1, 2)[:, :length]
    return y.to(x.dtype), states


def _more_than_one(length: int, size: int) -> int:
    """How many parts of a size hold a length, and an empty one: a graph of any length has no dimension of one, which
    `torch.export` would take for one always."""
    return (length + size - 1) // size + 1


def _states_between_chunks(added: Tensor, total: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
    """The recurrence h <- e^{total} h + added over chunks: step 1 twice, with chunks and then groups of chunks for
    tokens, since its cost grows with the square of their number.

    Args:
        added: `(b, c, h, p, n)`, what each chunk adds to the state.
        total: `(b, h, c)`, the logarithm of the decay over each chunk.
        states: `(b, h, p, n)`, those before the first chunk.

    Returns:
        The states before each chunk `(b, c, h, p, n)`, and those after the last.
    """
    num_chunks = added.shape[1]
    groups = _more_than_one(num_chunks, _CHUNK_GROUP)
    missing = groups * _CHUNK_GROUP - num_chunks
    total = nn.functional.pad(total, (0, missing)).unflatten(2, (groups, _CHUNK_GROUP))
    added = nn.functional.pad(added, (0, 0) * 3 + (0, missing)).unflatten(1, (groups, _CHUNK_GROUP))

    # Within a group: what its earlier chunks wrote, for every chunk and for its end.
    passed = nn.functional.pad(total, (1, 0)).cumsum(dim=-1)  # b h k j+1, from the start of the group
    within = torch.einsum("bhkzj,bkjhpn->bkzhpn", _decay_between(passed)[..., 1:], added)

    # Between groups, then from the start of a group to each of its chunks.
    over = nn.functional.pad(passed[..., -1], (1, 0)).cumsum(dim=-1)  # b h k+1
    sources = torch.cat([states.unsqueeze(1), within[:, :, -1]], dim=1)
    between = torch.einsum("bhzk,bkhpn->bzhpn", _decay_between(over), sources)
    entered = within[:, :, :-1] + torch.einsum("bhkz,bkhpn->bkzhpn", passed[..., :-1].exp(), between[:, :-1])
    return entered.flatten(1, 2)[:, :num_chunks], between[:, -1]


def _decay_between(log_decay: Tensor) -> Tensor:
    """Cumulative sums `(..., t)` to the decay from each s to each t, `(..., t, s)`; zero where s is later than t."""
    later = torch.ones(log_decay.shape[-1:] * 2, dtype=torch.bool, device=log_decay.device).triu(1)
    return (log_decay.unsqueeze(-1) - log_decay.unsqueeze(-2)).masked_fill(later, -torch.inf).exp()


def ssd_final_states(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, initial_states: Tensor | None = None, reverse: bool = False
) -> Tensor:
    """The states after the last token alone, at a fraction of the price of `ssd_chunk_scan` but without a gradient.

    Args:
        x: `(b, l, h, p)`.
        dt: `(b, l, h)`, the step size Δ itself.
        A: `(h,)`, negative.
        B: `(b, l, g, n)`.
        initial_states: `(b, h, p, n)`, zero where absent.
        reverse: whether the scan runs from the last token to the first.

    Returns:
        `(b, h, p, n)`, in float32 (float64 for float64 inputs).
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    states = _states(x, B, initial_states, dtype)
    if reads_backwards(x):
        return triton_final_states(x, dt, A, B, states, reverse)
    if reverse:
        x, dt, B = (tensor.flip(1) for tensor in (x, dt, B))
    final_states = gpu_final_states if x.is_cuda else cpu_final_states
    return final_states(x, dt.to(dtype), A.to(dtype), B, states)


def _states(x: Tensor, B: Tensor, initial_states: Tensor | None, dtype: torch.dtype) -> Tensor:
    if initial_states is not None:
        return initial_states.to(dtype)
    return x.new_zeros(x.shape[0], x.shape[2], x.shape[3], B.shape[3], dtype=dtype)


def causal_conv1d_silu(
    x: Tensor, weight: Tensor, bias: Tensor, context: Tensor | None = None, reverse: bool = False
) -> Tensor:
    """Depthwise causal convolution along the length, then SiLU.

    Args:
        x: `(b, l, d)`.
        weight: `(d, k)`; the last of the k taps weighs the token itself.
        bias: `(d,)`.
        context: `(b, k - 1, d)`, the tokens before x, zero where absent.
        reverse: whether the last token of x is the first; the context is in the order of the convolution, too.

    Returns:
        `(b, l, d)`.
    """
    if reads_backwards(x):
        return triton_causal_conv1d_silu(x, weight, bias, context, reverse)
    if reverse:
        return causal_conv1d_silu(x.flip(1), weight, bias, context).flip(1)
    conv = _kernel_causal_conv1d if _has_kernels(x) else _torch_causal_conv1d
    if context is not None:
        x = torch.cat([context, x], dim=1)
    x = x.transpose(1, 2)
    if x.is_cuda and (x.shape[1] % 8 or x.stride(2) % 8):  # the kernel takes channels last at multiples of 8 only
        x = x.contiguous()
    y = conv(x, weight, bias, activation="silu").transpose(1, 2)
    return y if context is None else y[:, context.shape[1] :]


def gated_norm(
    y: Tensor, weight: Tensor, eps: float, groups: int = 1, add: Tensor | None = None, z: Tensor | None = None
) -> Tensor:
    r"""$(\mathrm{RMSNorm}(y) + a) \odot \mathrm{silu}(z)$: the output of a scan, normed, with that of the other
    direction where there is one, and gated where there is a gate.

    Args:
        y: `(b, l, d)`.
        weight: of the norm, `(d,)`.
        eps: of the norm.
        groups: of channels that are normed apart.
        add: a, `(b, l, d)`.
        z: the gate, `(b, l, d)`.

    Returns:
        `(b, l, d)`.
    """
    if reads_backwards(y):
        return triton_gated_norm(y, weight, eps, groups, add, z)
    weight = weight.to(y.dtype)
    if groups == 1:
        y = nn.functional.rms_norm(y, y.shape[-1:], weight, eps)
    else:
        y = y.unflatten(-1, (groups, -1))
        y = nn.functional.rms_norm(y, y.shape[-1:], eps=eps).flatten(2) * weight
    return gated(y, add, z)


def gated(y: Tensor, add: Tensor | None = None, z: Tensor | None = None) -> Tensor:
    """`gated_norm` without the norm."""
    y = y if add is None else y + add
    return y if z is None else y * nn.functional.silu(z)


def _torch_causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor, activation: str) -> Tensor:
    taps = weight.shape[-1]
    x = x.transpose(1, 2)
    length = x.shape[1]
    padded, weight = nn.functional.pad(x, (0, 0, taps - 1, 0)), weight.T.contiguous()
    y = torch.addcmul(bias, padded[:, :length], weight[0])
    for tap in range(1, taps):
        y = y.addcmul_(padded[:, tap : tap + length], weight[tap])
    return nn.functional.silu(y, inplace=True).transpose(1, 2)


def _torch_chunk_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    reverse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, torch.float32)
    delta = dt.to(dtype)
    if dt_bias is not None:
        delta = delta + dt_bias.to(dtype)
    if dt_softplus:
        delta = nn.functional.softplus(delta)
    delta = delta.clamp(*dt_limit)
    skip = D if D is not None and D.dim() == 1 else torch.zeros_like(A)
    states = _states(x, B, initial_states, dtype)
    arguments = (x, delta, A.to(dtype), B, C, skip.to(dtype), states)
    if _is_spelt_out(*arguments):
        y, final_states = ssd_reference(*arguments, min(chunk_size, _REFERENCE_CHUNK_SIZE))
    elif torch.compiler.is_compiling():
        y, final_states = _engine_operator(*arguments, chunk_size)
    else:
        y, final_states = _run_engine(arguments, chunk_size, reverse)
    if D is not None and D.dim() == 2:
        y = y + (x * D).to(y.dtype)
    return (y, final_states) if return_final_states else y


def _is_spelt_out(*inputs: Tensor) -> bool:
    """Whether a graph is made that has to show what a scan does: to export it, or for its gradient."""
    if not torch.compiler.is_compiling():
        return False
    is_exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)  # before 2.7 nobody can tell
    return is_exporting() or torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)


def _run_engine(
    tensors: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], chunk_size: int, reverse: bool = False
) -> tuple[Tensor, Tensor]:
    """`ssd_reference` of x, Δ, A, B, C, D and states, as fast as this device can; `reverse` with the Triton kernels
    alone."""
    if _has_triton(tensors[0]):
        return triton_chunk_scan(*tensors, reverse)
    scan = gpu_chunk_scan if tensors[0].is_cuda else cpu_chunk_scan
    return scan(*tensors, chunk_size)


# Named after the module, of which a model from the Hub has one of its own, in whatever folder it lies.
@torch.library.custom_op(re.sub(r"\W", "_", __name__, flags=re.ASCII) + "::chunk_scan", mutates_args=())
def _engine_operator(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, states: Tensor, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """`_run_engine` as one operator of a graph."""
    y, final_states = _run_engine((x, delta, A, B, C, D, states), chunk_size)
    return y.contiguous(), final_states.contiguous()


@_engine_operator.register_fake
def _(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, states: Tensor, chunk_size: int
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), states.new_empty(states.shape)


def _has_kernels(x: Tensor) -> bool:
    """Whether the official kernels may run: they are opaque to `torch.compile`, which would break the graph."""
    return x.is_cuda and not torch.compiler.is_compiling()


# On a GPU: the Hub's kernels if the model was loaded with `use_kernels=True`, else installed packages, else PyTorch.
_kernel_chunk_scan = use_kernel_func_from_hub_with_fallback("mamba_chunk_scan_combined", "mamba_ssm")(
    _torch_chunk_scan
)
_kernel_causal_conv1d = use_kernel_func_from_hub_with_fallback("causal_conv1d_fn", "causal_conv1d")(
    _torch_causal_conv1d
)
