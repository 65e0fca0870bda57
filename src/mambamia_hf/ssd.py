"""The state-space scan of Mamba2 (SSD; Dao and Gu 2024) and its causal convolution, as pure functions.

One signature, two engines, chosen by the device of the tensors at every call: CUDA tensors go to the official
kernels where they can be imported (`mamba-ssm` and `causal-conv1d`, installed or from the Hub), everything else to
PyTorch. Letters in the shapes: b batch, l length, h heads, p head size, g groups, n state size, c chunks, q tokens of
a chunk.
"""

import math

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.integrations import use_kernel_func_from_hub_with_fallback


# Chunks longer than this cost more in the (q, q) weights than they save in the states.
_MAX_CHUNK_SIZE = {"cpu": 64, "cuda": 128}
# Elements of the (q, q) weights held at once: a block that stays in a CPU's cache, or one that fills a GPU.
_BLOCK_ELEMENTS = {"cpu": 2**19, "cuda": 2**26}


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
) -> Tensor | tuple[Tensor, Tensor]:
    r"""The selective scan $h_t = e^{\Delta_t A} h_{t-1} + \Delta_t B_t x_t$, $y_t = C_t h_t + D x_t$, chunk by chunk.

    Names and meaning are those of mamba-ssm's `mamba_chunk_scan_combined`. The PyTorch engine walks over blocks of
    chunks: its time is linear in the length, and beside inputs and outputs it holds one block. Step sizes, cumulative
    sums and states are float32 (float64 for float64 inputs) whatever the type of the inputs.

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
        dt_limit: Δ is clamped to this range.
        return_final_states: whether to return the states after the last token as well.

    Returns:
        `y (b, l, h, p)` in the type of x; with `return_final_states` a pair of it and the states `(b, h, p, n)`.

    Raises:
        ValueError: if the shapes do not fit each other.
    """
    batch, length, heads, _ = x.shape
    if dt.shape != (batch, length, heads) or A.shape != (heads,):
        raise ValueError(f"x {tuple(x.shape)} needs dt (b, l, h) and A (h,), not {tuple(dt.shape)}, {tuple(A.shape)}.")
    if B.shape != C.shape or B.shape[:2] != (batch, length) or heads % B.shape[2]:
        raise ValueError(
            f"x {tuple(x.shape)} needs B and C of one shape (b, l, groups, state) with groups dividing the heads, "
            f"not {tuple(B.shape)}, {tuple(C.shape)}."
        )
    scan = _kernel_chunk_scan if x.is_cuda else _torch_chunk_scan
    return scan(
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
        return_final_states=return_final_states,
    )


def ssd_final_states(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, initial_states: Tensor | None = None) -> Tensor:
    """The states after the last token alone, at a fraction of the price of `ssd_chunk_scan`.

    Args:
        x: `(b, l, h, p)`.
        dt: `(b, l, h)`, the step size Δ itself.
        A: `(h,)`, negative.
        B: `(b, l, g, n)`.
        initial_states: `(b, h, p, n)`, zero where absent.

    Returns:
        `(b, h, p, n)`, in float32 (float64 for float64 inputs).
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    groups, head_dim = B.shape[2], x.shape[3]
    log_decay = (dt.to(dtype) * A.to(dtype)).cumsum(dim=1, dtype=torch.float64)
    to_end = (log_decay[:, -1:] - log_decay).to(dtype).exp()
    x = x.to(dtype) * (dt * to_end).unsqueeze(-1)
    x = x.unflatten(2, (groups, -1)).transpose(1, 2).flatten(3)  # b g l (h/g p)
    states = (B.to(dtype).transpose(1, 2).mT @ x).unflatten(3, (-1, head_dim))  # b g n h/g p
    states = states.permute(0, 1, 3, 4, 2).flatten(1, 2)
    if initial_states is not None:
        states = states + log_decay[:, -1].to(dtype).exp()[..., None, None] * initial_states
    return states


def causal_conv1d_silu(x: Tensor, weight: Tensor, bias: Tensor, context: Tensor | None = None) -> Tensor:
    """Depthwise causal convolution along the length, then SiLU.

    Args:
        x: `(b, l, d)`.
        weight: `(d, k)`; the last of the k taps weighs the token itself.
        bias: `(d,)`.
        context: `(b, k - 1, d)`, the tokens before x, zero where absent.

    Returns:
        `(b, l, d)`.
    """
    conv = _kernel_causal_conv1d if x.is_cuda else _torch_causal_conv1d
    if context is not None:
        x = torch.cat([context, x], dim=1)
    y = conv(x.transpose(1, 2), weight, bias, activation="silu").transpose(1, 2)
    return y if context is None else y[:, context.shape[1] :]


def _torch_causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor, activation: str) -> Tensor:
    taps = weight.shape[-1]
    x = x.transpose(1, 2)
    length = x.shape[1]
    padded = nn.functional.pad(x, (0, 0, taps - 1, 0))
    y = torch.addcmul(bias, padded[:, :length], weight[:, 0])
    for tap in range(1, taps):
        y = torch.addcmul(y, padded[:, tap : tap + length], weight[:, tap])
    return nn.functional.silu(y).transpose(1, 2)


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
) -> Tensor | tuple[Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, torch.float32)
    chunk_size = min(chunk_size, _MAX_CHUNK_SIZE.get(x.device.type, chunk_size), x.shape[1])
    if initial_states is None:
        initial_states = x.new_zeros(x.shape[0], x.shape[2], x.shape[3], B.shape[3], dtype=dtype)
    budget = _BLOCK_ELEMENTS.get(x.device.type, _BLOCK_ELEMENTS["cuda"])
    rows = max(1, budget // (x.shape[2] * chunk_size**2))
    settings = (chunk_size, dt_softplus, tuple(dt_limit), budget)
    tokenwise = [tensor.split(rows) for tensor in (x, dt, B, C, initial_states.to(dtype))]
    parts = [
        _BlockwiseScan.apply(x_, dt_, A, B_, C_, D, dt_bias, states_, *settings)
        for x_, dt_, B_, C_, states_ in zip(*tokenwise, strict=True)
    ]
    y, final_states = parts[0] if len(parts) == 1 else map(torch.cat, zip(*parts, strict=True))
    return (y, final_states) if return_final_states else y


# On a GPU: the Hub's kernels if the model was loaded with `use_kernels=True`, else installed packages, else PyTorch.
_kernel_chunk_scan = use_kernel_func_from_hub_with_fallback("mamba_chunk_scan_combined", "mamba_ssm")(
    _torch_chunk_scan
)
_kernel_causal_conv1d = use_kernel_func_from_hub_with_fallback("causal_conv1d_fn", "causal_conv1d")(
    _torch_causal_conv1d
)


def _scan_block(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    states: Tensor,
    chunk_size: int,
    dt_softplus: bool,
    dt_limit: tuple[float, float],
) -> tuple[Tensor, Tensor]:
    """A few chunks of the scan, from the states before them to the states after: the four steps of SSD's Listing 1."""
    length, dtype = x.shape[1], states.dtype
    x, dt, A, B, C = (tensor.to(dtype) for tensor in (x, dt, A, B, C))
    if dt_bias is not None:
        dt = dt + dt_bias.to(dtype)
    if dt_softplus:
        dt = nn.functional.softplus(dt)
    dt = dt.clamp(*dt_limit)
    skip = None if D is None else x * D.to(dtype).reshape(D.shape[0], -1)

    chunk_size = math.ceil(length / math.ceil(length / chunk_size))  # chunks of one length, with the least padding
    if padding := -length % chunk_size:  # a step of size zero neither decays the state nor adds to it
        x, B, C = (nn.functional.pad(tensor, (0, 0, 0, 0, 0, padding)) for tensor in (x, B, C))
        dt = nn.functional.pad(dt, (0, 0, 0, padding))
    x, dt, B, C = (tensor.unflatten(1, (-1, chunk_size)) for tensor in (x, dt, B, C))  # b l ... -> b c q ...
    chunks, groups, head_dim = x.shape[1], B.shape[3], x.shape[4]

    # b c q h, from the start of the chunk to each token, inclusive. Only differences of it count, and float32 rounds a
    # long sum by more than a float32 result should suffer: what rounding cut off goes in as a factor on x and on y.
    exact = (dt * A).cumsum(dim=2, dtype=torch.float64)
    log_decay = exact.to(dtype)
    cut_off = (exact.detach() - log_decay.detach()).to(dtype)
    x = x * (dt * (-cut_off).exp()).unsqueeze(-1)
    B, C = B.transpose(2, 3), C.transpose(2, 3)  # b c g q n

    # 1. What a token reads from earlier tokens of its own chunk: y_t = Σ_s≤t (C_t·B_s) e^{decay from s to t} Δ_s x_s.
    # B and C meet once a group; the clamp only touches s > t, which tril has already zeroed.
    scores = torch.tril(C @ B.mT)  # b c g q q
    log_decay_t = log_decay.transpose(2, 3).unflatten(2, (groups, -1))  # b c g h/g q
    weights = (log_decay_t.unsqueeze(-1) - log_decay_t.unsqueeze(-2)).clamp_(max=0).exp_()
    weights = (weights * scores.unsqueeze(3)).flatten(2, 3)
    y = weights @ x.transpose(2, 3)  # b c h q p

    # 2. What a chunk adds to the state, as one product for all heads of a group: B^T (decay to the chunk's end · Δx).
    to_end = (log_decay[:, :, -1:] - log_decay + cut_off[:, :, -1:]).exp()
    x = (x * to_end.unsqueeze(-1)).unflatten(3, (groups, -1)).transpose(2, 3).flatten(4)  # b c g q (h/g p)
    added = B.mT @ x  # b c g n (h/g p)

    # 3. The recurrence over chunks.
    chunk_decay = (
        (log_decay[:, :, -1] + cut_off[:, :, -1]).exp().unflatten(2, (groups, 1, -1)).unsqueeze(-1)
    )  # b c g 1 h/g 1
    states = states.unflatten(1, (groups, -1)).permute(0, 1, 4, 2, 3).contiguous()  # b g n h/g p
    entering = []
    for chunk in range(chunks):
        entering.append(states.flatten(3))
        states = states * chunk_decay[:, chunk] + added[:, chunk].unflatten(-1, (-1, head_dim))
    entering = torch.stack(entering, dim=1)  # b c g n (h/g p)

    # 4. What a token reads from the state that entered its chunk: e^{decay to t} C_t h.
    from_state = (C @ entering).unflatten(-1, (-1, head_dim)).transpose(2, 3).flatten(3, 4)  # b c q h p
    y = torch.addcmul(y.transpose(2, 3), from_state, log_decay.exp().unsqueeze(-1))
    y = (y * cut_off.exp().unsqueeze(-1)).flatten(1, 2)[:, :length]
    if skip is not None:
        y = y + skip
    return y, states.permute(0, 1, 3, 4, 2).flatten(1, 2)


class _BlockwiseScan(torch.autograd.Function):
    """The scan, block after block; keeps the states between blocks and recomputes a block when its gradient is due."""

    @staticmethod
    def forward(ctx, x, dt, A, B, C, D, dt_bias, states, chunk_size, dt_softplus, dt_limit, budget):
        block_length = chunk_size * max(1, budget // (x.shape[0] * x.shape[2] * chunk_size**2))
        settings = (chunk_size, dt_softplus, dt_limit)
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        boundaries = []
        for start in range(0, x.shape[1], block_length):
            block = slice(start, start + block_length)
            if any(ctx.needs_input_grad):
                boundaries.append(states)
            y[:, block], states = _scan_block(
                x[:, block], dt[:, block], A, B[:, block], C[:, block], D, dt_bias, states, *settings
            )
        ctx.save_for_backward(x, dt, A, B, C, D, dt_bias, *boundaries)
        ctx.block_length, ctx.settings = block_length, settings
        return y, states

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y, grad_states):
        x, dt, A, B, C, D, dt_bias, *boundaries = ctx.saved_tensors
        tokenwise = [torch.empty_like(tensor) for tensor in (x, dt, B, C)]
        shared = [None if tensor is None else torch.zeros_like(tensor) for tensor in (A, D, dt_bias)]
        for index in reversed(range(len(boundaries))):
            block = slice(index * ctx.block_length, (index + 1) * ctx.block_length)
            inputs = [tensor[:, block] for tensor in (x, dt, B, C)] + [boundaries[index], A, D, dt_bias]
            with torch.enable_grad():
                inputs = [None if tensor is None else tensor.detach().requires_grad_() for tensor in inputs]
                x_, dt_, B_, C_, states_, A_, D_, dt_bias_ = inputs
                outputs = _scan_block(x_, dt_, A_, B_, C_, D_, dt_bias_, states_, *ctx.settings)
            present = [tensor for tensor in inputs if tensor is not None]
            grads = iter(torch.autograd.grad(outputs, present, (grad_y[:, block].to(outputs[0].dtype), grad_states)))
            grads = [None if tensor is None else next(grads) for tensor in inputs]
            for whole, part in zip(tokenwise, grads[:4], strict=True):
                whole[:, block] = part
            grad_states = grads[4]
            for total, part in zip(shared, grads[5:], strict=True):
                if total is not None:
                    total += part
        grad_x, grad_dt, grad_B, grad_C = tokenwise
        grad_A, grad_D, grad_dt_bias = shared
        return grad_x, grad_dt, grad_A, grad_B, grad_C, grad_D, grad_dt_bias, grad_states, None, None, None, None
