"""The state-space scan of Mamba2 (SSD; Dao and Gu 2024) and its causal convolution, as pure functions.

One signature, two engines, chosen by the device of the tensors at every call: CUDA tensors go to the official
kernels where they can be imported (`mamba-ssm` and `causal-conv1d`, installed or from the Hub), everything else to
PyTorch. Letters in the shapes: b batch, l length, h heads, p head size, g groups, n state size, c chunks, q tokens of
a chunk.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.integrations import use_kernel_func_from_hub_with_fallback


# Chunks longer than this cost more in the (q, q) weights than they save in the states.
_MAX_CHUNK_SIZE = {"cpu": 64, "cuda": 128}
# Heads computed together: as many as stay in a CPU's cache, or as fill a GPU.
_MAX_HEADS = {"cpu": 16, "cuda": 1024}
# Chunks from one state that is kept for the gradient to the next.
_BLOCK_CHUNKS = 16


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
        dt_limit: Δ is clamped to this range, which holds nothing negative.
        return_final_states: whether to return the states after the last token as well.

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


@torch.no_grad()
def ssd_final_states(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, initial_states: Tensor | None = None) -> Tensor:
    """The states after the last token alone, at a fraction of the price of `ssd_chunk_scan` but without a gradient.

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
    final_states = x.new_zeros(x.shape[0], x.shape[2], x.shape[3], B.shape[3], dtype=dtype)
    if initial_states is not None:
        final_states.copy_(initial_states)
    for part in _parts(x, B):
        states = part.take_states(final_states)
        for piece in _pieces(x, x.shape[1]):
            block = _Block.of(part, piece, x, dt.to(dtype), A.to(dtype), B)
            added = block.x * (block.to_end * block.delta.unsqueeze(-1))
            for added_, B_, decay in zip(added, block.B, block.decay, strict=True):
                states.mul_(decay[:, -1:]).baddbmm_(B_.mT, added_)
        part.put_states(states, final_states)
    return final_states


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
    x = x.transpose(1, 2)
    if x.is_cuda and (x.shape[1] % 8 or x.stride(2) % 8):  # the kernel takes channels last at multiples of 8 only
        x = x.contiguous()
    y = conv(x, weight, bias, activation="silu").transpose(1, 2)
    return y if context is None else y[:, context.shape[1] :]


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
) -> Tensor | tuple[Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, torch.float32)
    delta = dt.to(dtype)
    if dt_bias is not None:
        delta = delta + dt_bias.to(dtype)
    if dt_softplus:
        delta = nn.functional.softplus(delta)
    delta = delta.clamp(*dt_limit)
    if initial_states is None:
        initial_states = x.new_zeros(x.shape[0], x.shape[2], x.shape[3], B.shape[3], dtype=dtype)
    skip = D if D is not None and D.dim() == 1 else torch.zeros_like(A)
    y, final_states = _Scan.apply(x, delta, A.to(dtype), B, C, skip.to(dtype), initial_states.to(dtype), chunk_size)
    if D is not None and D.dim() == 2:
        y = y + (x * D).to(y.dtype)
    return (y, final_states) if return_final_states else y


# On a GPU: the Hub's kernels if the model was loaded with `use_kernels=True`, else installed packages, else PyTorch.
_kernel_chunk_scan = use_kernel_func_from_hub_with_fallback("mamba_chunk_scan_combined", "mamba_ssm")(
    _torch_chunk_scan
)
_kernel_causal_conv1d = use_kernel_func_from_hub_with_fallback("causal_conv1d_fn", "causal_conv1d")(
    _torch_causal_conv1d
)


class _Piece(NamedTuple):
    """Tokens that are a whole number of chunks."""

    tokens: slice
    chunk_size: int


class _Part(NamedTuple):
    """Heads of one group, in some rows of the batch, that are computed together: u of them, row after row."""

    rows: slice
    heads: slice
    group: int

    def by_chunk(self, tensor: Tensor, piece: _Piece) -> Tensor:
        """`(b, l, h, ...)` to `(c, b, h, q, ...)`, a view."""
        tensor = tensor[self.rows, piece.tokens, self.heads]
        return tensor.unflatten(1, (-1, piece.chunk_size)).transpose(0, 1).transpose(2, 3)

    def shared(self, tensor: Tensor) -> Tensor:
        """B or C `(b, l, g, n)` as if each head had its own, `(b, l, h, n)`, a view."""
        return tensor[:, :, self.group, None].expand(-1, -1, self.heads.stop, -1)

    def by_head(self, tensor: Tensor) -> Tensor:
        """`(h,)` to `(u, 1)`."""
        return tensor[self.heads].repeat(self.rows.stop - self.rows.start).unsqueeze(-1)

    def take_states(self, tensor: Tensor) -> Tensor:
        """`(b, h, p, n)` to `(u, n, p)`, a copy."""
        return tensor[self.rows, self.heads].mT.flatten(0, 1).clone(memory_format=torch.contiguous_format)

    def put_states(self, states: Tensor, tensor: Tensor):
        """The way back, into the tensor."""
        target = tensor[self.rows, self.heads].mT
        target.copy_(states.view(target.shape))


class _Block(NamedTuple):
    """A piece of a part."""

    x: Tensor  # c u q p
    B: Tensor  # c u q n
    C: Tensor | None  # c u q n
    delta: Tensor  # c u q
    log_decay: Tensor  # c u q: base 2, float64, from the start of the chunk to each token, inclusive
    decay: Tensor  # c u q 1: the same as a factor
    to_end: Tensor  # c u q 1: the factor from each token to the end of the chunk

    @classmethod
    def of(
        cls, part: _Part, piece: _Piece, x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor | None = None
    ) -> "_Block":
        shared = [None if tensor is None else part.shared(tensor) for tensor in (B, C)]
        x, delta, B, C = (
            None if tensor is None else part.by_chunk(tensor, piece).flatten(1, 2).to(A.dtype)
            for tensor in (x, delta, *shared)
        )
        # Only differences of these sums count, and float32 would round a long sum by more than they should suffer.
        log_decay = (delta * (part.by_head(A).double() / math.log(2))).cumsum(dim=-1)
        to_end = log_decay[..., -1:] - log_decay
        decay, to_end = (tensor.exp2().to(A.dtype).unsqueeze(-1) for tensor in (log_decay, to_end))
        return cls(x, B, C, delta, log_decay, decay, to_end)

    def scores(self, heads: int) -> Tensor:
        """C_t·B_s `(c, u, q, q)`, computed once for all heads of a row."""
        scores = self.C[:, ::heads] @ self.B[:, ::heads].mT
        return scores.unsqueeze(2).expand(-1, -1, heads, -1, -1).flatten(1, 2)


def _scan_block(block: _Block, D: Tensor, states: Tensor, y: Tensor):
    """Writes y `(c, b, h, q, p)` and takes the states `(u, n, p)` to the end of the block: SSD's Listing 1."""
    x, B, C, delta, log_decay, decay, to_end = block
    scores = block.scores(y.shape[2])
    weights = x.new_empty(scores.shape[1:])
    within, from_state, added = (x.new_empty(x.shape[1:]) for _ in range(3))
    # With Δ in the exponents and D on the diagonal, x is taken as it is.
    log_source = log_decay - delta.log2()
    to_end = to_end * delta.unsqueeze(-1)
    for x_, B_, C_, scores_, log_decay_, log_source_, decay_, to_end_, y_ in zip(
        x, B, C, scores, log_decay, log_source, decay, to_end, y, strict=True
    ):
        # 1. What a token reads from its own chunk: Σ_s≤t (C_t·B_s) e^{decay from s to t} Δ_s x_s, and the skip D x_t.
        torch.sub(log_decay_.unsqueeze(-1), log_source_.unsqueeze(-2), out=weights).exp2_().tril_().mul_(scores_)
        weights.diagonal(dim1=1, dim2=2).add_(D)
        torch.bmm(weights, x_, out=within)

        # 2. What it reads from the state that entered the chunk: e^{decay to t} C_t h.
        torch.bmm(C_, states, out=from_state)
        torch.addcmul(within.view(y_.shape), from_state.view(y_.shape), decay_.view(*y_.shape[:-1], 1), out=y_)

        # 3. What the chunk adds to the state: Σ_s B_s e^{decay from s to its end} Δ_s x_s.
        torch.mul(x_, to_end_, out=added)

        # 4. The recurrence over chunks.
        states.mul_(decay_[:, -1:]).baddbmm_(B_.mT, added)


def _scan_block_backward(
    block: _Block, A: Tensor, D: Tensor, states: Tensor, grad_y: Tensor, grad_states: Tensor, grad_x: Tensor
) -> tuple[Tensor, ...]:
    """The steps of `_scan_block` from last to first, each with the gradients of its matrix products.

    Takes the states `(u, n, p)` that entered the block and the gradient of y `(c, u, q, p)`, writes that of x
    `(c, b, h, q, p)`, takes that of the states to the start of the block, and returns those of delta `(c, b, h, q)`,
    A and D `(b, h)`, and B and C `(c, b, q, n)`.
    """
    x, B, C, delta, log_decay, decay, to_end = block
    rows = batch, heads = grad_x.shape[1:3]
    scores = block.scores(heads)
    x_delta = x * delta.unsqueeze(-1)
    added = x_delta * to_end
    entering = states.new_empty(len(x) + 1, *states.shape)
    entering[0] = states
    for c in range(len(x)):
        torch.mul(entering[c], decay[c, :, -1:], out=entering[c + 1]).baddbmm_(B[c].mT, added[c])

    weights = x.new_empty(scores.shape[1:])
    grad_B, grad_C = (x.new_empty(len(x), batch, *B.shape[2:]) for _ in range(2))
    grad_scores = x.new_empty(len(x), batch, *scores.shape[2:])
    grad_delta, grad_log_decay = torch.empty_like(delta), torch.empty_like(delta)
    grad_log_total, grad_D = delta.new_empty(*delta.shape[:2], 1), torch.zeros_like(D)
    for c in reversed(range(len(x))):
        # 4. and 3.
        grad_log_total[c, :, 0] = (entering[c + 1] * grad_states).sum(dim=(1, 2))
        grad_added = B[c] @ grad_states
        grad_B[c] = (added[c] @ grad_states.mT).unflatten(0, rows).sum(dim=1)

        # 2.
        grad_from_state = grad_y[c] * decay[c]
        grad_C_ = grad_from_state @ entering[c].mT
        grad_C[c] = grad_C_.unflatten(0, rows).sum(dim=1)
        grad_log_decay[c] = grad_C_.mul_(C[c]).sum(dim=-1) - (grad_added * added[c]).sum(dim=-1)
        grad_states.mul_(decay[c, :, -1:]).baddbmm_(C[c].mT, grad_from_state)

        # 1.
        torch.sub(log_decay[c].unsqueeze(-1), log_decay[c].unsqueeze(-2), out=weights).exp2_().tril_()
        grad_weights = (grad_y[c] @ x_delta[c].mT).mul_(weights)
        grad_scores[c] = grad_weights.unflatten(0, rows).sum(dim=1)
        grad_log_weights = grad_weights.mul_(scores[c]).tril_(-1)  # no decay from a token to itself
        grad_log_decay[c] += grad_log_weights.sum(dim=-1) - grad_log_weights.sum(dim=-2)
        grad_x_delta = torch.addcmul(weights.mul_(scores[c]).mT @ grad_y[c], grad_added, to_end[c])
        grad_delta[c] = (grad_x_delta * x[c]).sum(dim=-1)
        grad_D += (grad_y[c] * x[c]).sum(dim=(1, 2)).unsqueeze(-1)
        grad_skip = grad_y[c] * D.unsqueeze(-1)
        grad_x[c] = torch.addcmul(grad_skip, grad_x_delta, delta[c].unsqueeze(-1)).unflatten(0, rows)
    grad_B += grad_scores.mT @ C[:, ::heads]
    grad_C += grad_scores @ B[:, ::heads]
    # The step of a token weighs on all that passes it: what earlier tokens wrote, for it and for later ones.
    grad_step = grad_log_decay.double().flip(-1).cumsum(dim=-1).flip(-1) + grad_log_total
    grad_step = grad_step.to(A.dtype)
    grad_A = (grad_step * delta).sum(dim=(0, 2)).unflatten(0, rows)
    grad_delta = (grad_delta + grad_step * A).unflatten(1, rows)
    return grad_delta, grad_A, grad_D.view(rows), grad_B, grad_C


def _parts(x: Tensor, B: Tensor) -> list[_Part]:
    batch, _, heads, _ = x.shape
    a_group = heads // B.shape[2]
    limit = _MAX_HEADS.get(x.device.type, _MAX_HEADS["cuda"])
    size = math.ceil(a_group / math.ceil(a_group / limit))
    rows = max(1, limit // size)
    return [
        _Part(slice(row, min(row + rows, batch)), slice(head, min(head + size, start + a_group)), group)
        for row in range(0, batch, rows)
        for group, start in enumerate(range(0, heads, a_group))
        for head in range(start, start + a_group, size)
    ]


def _pieces(x: Tensor, chunk_size: int) -> list[_Piece]:
    """All tokens in order; those left over from whole chunks are one shorter chunk."""
    length = x.shape[1]
    chunk_size = min(chunk_size, _MAX_CHUNK_SIZE.get(x.device.type, _MAX_CHUNK_SIZE["cuda"]))
    whole, step = length - length % chunk_size, _BLOCK_CHUNKS * chunk_size
    pieces = [_Piece(slice(start, min(start + step, whole)), chunk_size) for start in range(0, whole, step)]
    return pieces if whole == length else [*pieces, _Piece(slice(whole, length), length - whole)]


class _Scan(torch.autograd.Function):
    """The scan, block by block; keeps the states between blocks and recomputes what is in them for the gradient."""

    @staticmethod
    def forward(ctx, x, delta, A, B, C, D, states, chunk_size):
        y, final_states = torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty_like(states)
        ctx.parts, ctx.pieces, kept = _parts(x, B), _pieces(x, chunk_size), []
        for part in ctx.parts:
            part_states = part.take_states(states)
            for piece in ctx.pieces:
                if any(ctx.needs_input_grad):
                    kept.append(part_states.clone())
                block = _Block.of(part, piece, x, delta, A, B, C)
                _scan_block(block, part.by_head(D), part_states, part.by_chunk(y, piece))
            part.put_states(part_states, final_states)
        ctx.save_for_backward(x, delta, A, B, C, D, *kept)
        return y, final_states

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y, grad_states):
        x, delta, A, B, C, D, *kept = ctx.saved_tensors
        grad_x, grad_delta = (torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (x, delta))
        grad_A, grad_B, grad_C, grad_D = (torch.zeros_like(tensor, dtype=A.dtype) for tensor in (A, B, C, D))
        grad_initial_states = torch.empty_like(grad_states)
        for part in reversed(ctx.parts):
            heads, A_, D_ = part.heads, part.by_head(A), part.by_head(D)
            part_grad_states = part.take_states(grad_states)
            for piece in reversed(ctx.pieces):
                block = _Block.of(part, piece, x, delta, A, B, C)
                part_grad_y = part.by_chunk(grad_y, piece).flatten(1, 2).to(A.dtype).contiguous()
                part_grad_x = part.by_chunk(grad_x, piece)
                grads = _scan_block_backward(block, A_, D_, kept.pop(), part_grad_y, part_grad_states, part_grad_x)
                part.by_chunk(grad_delta, piece).copy_(grads[0])
                grad_A[heads] += grads[1].sum(dim=0)
                grad_D[heads] += grads[2].sum(dim=0)
                for whole, grad in zip((grad_B, grad_C), grads[3:], strict=True):
                    whole[part.rows, piece.tokens, part.group] += grad.transpose(0, 1).flatten(1, 2)
            part.put_states(part_grad_states, grad_initial_states)
        return grad_x, grad_delta, grad_A, grad_B.to(B.dtype), grad_C.to(C.dtype), grad_D, grad_initial_states, None
