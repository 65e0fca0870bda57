"""The SSD scan for GPUs in PyTorch alone: the products of `ssd_cpu.py`, over all chunks of a segment at once.

A GPU wants few and large operations, so nothing here loops over chunks or heads. With the letters of `ssd_cpu.py`:

    y = u ⊙ (T @ (v ⊙ x) + C @ 2^m S) + D x        T = tril(C Bᵀ)

where S, the state before each chunk, is a sum over all earlier chunks: a product with the decays between chunks.
Products run in the type of x and add up in float32. Step sizes, decays and returned states are in float32, or in
float64 for float64 inputs. Heads whose decay spans more than `_MAX_BITS` in a chunk are *steep*: u and v would
leave the range of the numbers, so these heads take one weight per pair of tokens, which is at most 1.

The gradient computes a segment again and lets autograd go back through it.
"""

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


# Tokens of a chunk, a power of two: longer chunks have fewer states to move, and more steep heads.
CHUNK_SIZE = 128
# Elements of x in a segment: some four times as much lives beside them, or ten times with a gradient.
_SEGMENT_ELEMENTS = 2**27
# Float32 and bfloat16 have 126 bits on each side of 1; u and v take 60 of them.
_MAX_BITS = 120.0
# Steep heads computed together.
_STEEP_HEADS = 16


def chunk_scan(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, states: Tensor, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """The scan of `ssd.ssd_chunk_scan`, with a gradient for every tensor.

    Arguments and result as in `ssd_cpu.chunk_scan`.
    """
    size = 2 ** (min(chunk_size, CHUNK_SIZE).bit_length() - 1)
    with torch.autocast(x.device.type, enabled=False):
        return _Scan.apply(x, delta, A, B, C, D, states, size)


@torch.no_grad()
def final_states(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, states: Tensor) -> Tensor:
    """The states after the last token alone, without a gradient: one product per segment.

    Arguments and result as in `chunk_scan`.
    """
    groups, step = B.shape[2], _segment_length(x, CHUNK_SIZE)
    for start in range(0, x.shape[1], step):
        x_, delta_, B_ = (tensor[:, start : start + step] for tensor in (x, delta, B))
        L = _log_decay(delta_, A)
        last = L[:, -1:]
        v = (last - L).exp2().to(delta.dtype) * delta_
        written = _Scale.apply(x_, v).unflatten(2, (groups, -1)).transpose(1, 2)  # b g l e p
        added = written.flatten(3).mT @ B_.to(x.dtype).transpose(1, 2)
        states = last[:, 0, :, None, None].exp2().to(states.dtype) * states + added.view(states.shape)
    return states


class _Scan(torch.autograd.Function):
    """Keeps the inputs and the state before each segment; computes a segment again for the gradient."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        x, delta, A, B, C, D, state, chunk_size = inputs
        step = _segment_length(x, chunk_size)
        ctx.segments = [slice(start, start + step) for start in range(0, x.shape[1], step)]
        ctx.chunk_size = chunk_size
        y, kept = torch.empty_like(x, memory_format=torch.contiguous_format), []
        for segment in ctx.segments:
            kept.append(state)
            x_, delta_, B_, C_ = (tensor[:, segment] for tensor in (x, delta, B, C))
            y[:, segment], state = _scan_segment(x_, delta_, B_, C_, A, D, state, chunk_size)
        ctx.save_for_backward(x, delta, A, B, C, D, *kept)
        return y, state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor, grad_state: Tensor) -> tuple[Tensor | None, ...]:
        x, delta, A, B, C, D, *kept = ctx.saved_tensors
        grad_x, grad_delta, grad_B, grad_C = (torch.empty_like(tensor) for tensor in (x, delta, B, C))
        grad_A, grad_D = torch.zeros_like(A), torch.zeros_like(D)
        for segment, state in zip(reversed(ctx.segments), reversed(kept), strict=True):
            parts = [tensor[:, segment] for tensor in (x, delta, B, C)]
            inputs = [tensor.detach().requires_grad_() for tensor in (*parts, A, D, state)]
            with torch.enable_grad():
                outputs = partial(_scan_segment, chunk_size=ctx.chunk_size)(*inputs)
            grads = torch.autograd.grad(outputs, inputs, (grad_y[:, segment], grad_state))
            for whole, grad in zip((grad_x, grad_delta, grad_B, grad_C), grads, strict=False):
                whole[:, segment] = grad
            grad_A += grads[4]
            grad_D += grads[5]
            grad_state = grads[6]
        return grad_x, grad_delta, grad_A, grad_B, grad_C, grad_D, grad_state, None


def _segment_length(x: Tensor, chunk_size: int) -> int:
    """Tokens of a segment, whole chunks."""
    tokens = _SEGMENT_ELEMENTS // (x.shape[0] * x.shape[2] * x.shape[3])
    return max(1, tokens // chunk_size) * chunk_size


def _scan_segment(
    x: Tensor, delta: Tensor, B: Tensor, C: Tensor, A: Tensor, D: Tensor, state: Tensor, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """y `(b, l, h, p)` of a segment, and the state `(b, h, p, n)` after it; arguments as in `chunk_scan`."""
    length, in_group = x.shape[1], x.shape[2] // B.shape[2]

    def chunked(tensor: Tensor) -> Tensor:
        """`(b, l, ...)` to `(b, c, q, ...)`; tokens of step size zero fill up the last chunk."""
        missing = -length % chunk_size
        if missing:
            tensor = nn.functional.pad(tensor, (0, 0) * (tensor.dim() - 2) + (0, missing))
        return tensor.unflatten(1, (-1, chunk_size))

    x, delta = chunked(x), chunked(delta)  # b c q h p, b c q h
    B, C = (chunked(tensor.to(x.dtype)).transpose(2, 3) for tensor in (B, C))  # b c g q n
    T = (C @ B.mT).tril()
    L = _log_decay(delta, A)
    y, last = _scan_gentle(x, delta, B, C, T, L, state)
    steep = (_span(L) > _MAX_BITS).nonzero()[:, 0]
    for heads in steep.split(_STEEP_HEADS) if len(steep) else ():
        x_, delta_, L_ = (tensor.index_select(3, heads) for tensor in (x, delta, L))
        B_, C_, T_ = (tensor.index_select(2, heads // in_group) for tensor in (B, C, T))
        steep_y, steep_last = _scan_steep(x_, delta_, L_, B_, C_, T_, state.index_select(1, heads))
        y.index_copy_(3, heads, steep_y)
        last.index_copy_(1, heads, steep_last)
    y = y + _Scale.apply(x, D) if torch.is_grad_enabled() else torch.addcmul(y, x, D.unsqueeze(-1), out=y)
    return y.flatten(1, 2)[:, :length], last


def _scan_gentle(
    x: Tensor, delta: Tensor, B: Tensor, C: Tensor, T: Tensor, L: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """y without D, and the state after the segment. u and v of steep heads are zero, so their y is, too.

    Args:
        x: `(b, c, q, h, p)`.
        delta: `(b, c, q, h)`.
        B: `(b, c, g, q, n)`.
        C: `(b, c, g, q, n)`.
        T: `(b, c, g, q, q)`.
        L: `(b, c, q, h)`, in float64.
        state: `(b, h, p, n)`.

    Returns:
        y `(b, c, q, h, p)`, and the state `(b, h, p, n)`.
    """
    groups, dtype = B.shape[2], delta.dtype
    first, last = L[:, :, :1], L[:, :, -1:]
    middle, steep = (first + last) / 2, _span(L) > _MAX_BITS
    u = (L - middle).masked_fill(steep, -math.inf).exp2().to(dtype)
    v = (middle - L).masked_fill(steep, -math.inf).exp2().to(dtype) * delta

    written = _Scale.apply(x, v).unflatten(3, (groups, -1)).transpose(2, 3).flatten(4)  # b c g q ep
    added = (written.mT @ B).unflatten(3, (-1, x.shape[4])).flatten(2, 3)  # b c h p n
    entered, state = _pass_states(added, last[:, :, 0], middle[:, :, 0], (last - middle)[:, :, 0], state)
    entered = entered.unflatten(2, (groups, -1)).flatten(3, 4).mT  # b c g n ep
    T, C, written, entered = (tensor.flatten(0, 2) for tensor in (T, C, written, entered))
    read = torch.baddbmm(T @ written, C, entered).view(*B.shape[:4], -1, x.shape[4])  # b c g q e p
    return _Scale.apply(read.transpose(2, 3).flatten(3, 4), u), state


def _scan_steep(
    x: Tensor, delta: Tensor, L: Tensor, B: Tensor, C: Tensor, T: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """`_scan_gentle` for steep heads, each with B, C and T of its own: one weight per head and pair of tokens."""
    dtype = delta.dtype
    x, delta, L = (tensor.transpose(2, 3) for tensor in (x, delta, L))  # b c h q p, b c h q
    last = L[..., -1:]
    later = torch.ones(L.shape[-1:] * 2, dtype=torch.bool, device=x.device).triu(1)
    decay = (L.unsqueeze(-1) - L.unsqueeze(-2)).masked_fill(later, -math.inf).exp2().to(dtype)
    weights = (T * decay * delta.unsqueeze(-2)).to(x.dtype)
    written = _Scale.apply(x, (last - L).exp2().to(dtype) * delta)
    zero = torch.zeros_like(last[..., 0])
    entered, state = _pass_states(written.mT @ B, last[..., 0], zero, zero, state)
    y = weights @ x + _Scale.apply(C @ entered.mT, L.exp2().to(dtype))
    return y.transpose(2, 3), state


def _pass_states(added: Tensor, decay: Tensor, enter: Tensor, leave: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The recurrence over chunks, as one product per head with the decays between chunks.

    Args:
        added: `(b, c, h, p, n)`, what each chunk adds to the state, before the factor `leave`; overwritten.
        decay: `(b, c, h)`, the decay over each chunk, in bits as the next two.
        enter: `(b, c, h)`, the factor on the state before each chunk.
        leave: `(b, c, h)`, the factor on what a chunk adds.
        state: `(b, h, p, n)`, before the first chunk.

    Returns:
        The states before all chunks times `enter`, `(b, c, h, p, n)` in the type of `added`, and the one after the
        last chunk, `(b, h, p, n)` in that of `state`.
    """
    decay, enter, leave = (tensor.transpose(1, 2) for tensor in (decay, enter, leave))  # b h c
    after = decay.cumsum(dim=-1)
    earlier = torch.ones(decay.shape[-1:] * 2, dtype=torch.bool, device=added.device).tril(-1)
    between = (enter + after - decay).unsqueeze(-1) + (leave - after).unsqueeze(-2)
    between = between.masked_fill(~earlier, -math.inf).exp2().to(added.dtype)  # b h z c
    to_end = (after[..., -1:] - after + leave).exp2().to(added.dtype).unsqueeze(-2)

    # The first chunk adds what was there before it, too.
    added[:, 0] += (after - leave)[..., 0, None, None].exp2().to(state.dtype) * state
    sources = added.transpose(1, 2).flatten(3)  # b h c pn
    entered = (between @ sources).view(*between.shape[:3], *state.shape[2:])
    entered[:, :, 0] = enter[..., 0, None, None].exp2().to(state.dtype) * state
    last = (to_end @ sources).view(state.shape).to(state.dtype)
    return entered.transpose(1, 2), last


class _Scale(torch.autograd.Function):
    """`(..., p)` times a factor per token and head, in one pass over it: the factor is not rounded to its type."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(x, factor)
        return torch.mul(x, factor.unsqueeze(-1), out=torch.empty(x.shape, dtype=x.dtype, device=x.device))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, factor = ctx.saved_tensors
        grad_x = torch.mul(grad, factor.unsqueeze(-1), out=torch.empty(x.shape, dtype=x.dtype, device=x.device))
        return grad_x, (grad * x).sum(dim=-1, dtype=factor.dtype).sum_to_size(factor.shape)


def _log_decay(delta: Tensor, A: Tensor) -> Tensor:
    """The base-2 logarithm of the decay from the start of each chunk to each token `(..., q, h)`, in float64: only its
    differences count, and float32 would round a long sum too much."""
    return (delta * (A.double() / math.log(2))).cumsum(dim=-2)


def _span(L: Tensor) -> Tensor:
    """The bits `(h,)` over which the decay of each head ranges in the chunk where it ranges most."""
    return (L[:, :, 0] - L[:, :, -1]).amax(dim=(0, 1))
