"""The SSD scan as Triton kernels for GPUs, forward and backward.

Steps 1 to 3 are those of the SSD paper, over *parts* of a sequence, some chunks each, that run side by side:

1. what every part adds to the state,
2. the state before every part,
3. the outputs of a part, chunk by chunk, with its state at hand.

In a chunk, with L_t the base-2 logarithm of the decay from its start to token t:

    y_t = Σ_s≤t (C_t·B_s) 2^(L_t - L_s) Δ_s x_s + 2^(L_t) C_t h + D x_t
    h  <- 2^(L_last) h + Σ_s 2^(L_last - L_s) Δ_s x_s B_sᵀ

No exponent is above zero, so heads of any steepness are exact. For the gradient, steps 1 and 2 run once more, from the
end to the start, for the gradient of the states; then every chunk, given the state before it and the gradient of the
one after it, computes its gradients by itself.

Numbers are float32, and products take their factors in the type of x. With `reverse` a sequence is read from its last
token to its first, so nothing is flipped. Letters of the shapes as in `ssd.py`.
"""

from __future__ import annotations  # the kernels name types that are not there without Triton

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .mixer_triton import jit, on_device_of, unit_stride


try:
    import triton
    import triton.language as tl
except ImportError:  # a machine that needs no kernels for a GPU
    triton = None


# Tokens of a chunk, and chunks of a part: enough parts for all multiprocessors, and few states in memory.
CHUNK_SIZE = 64
CHUNKS_OF_PART = 16
# Parts whose gradients are computed together; what B and C get of every head is in memory until it is added up.
_PARTS_OF_GRADIENT = 8
# A float32 that decays by more bits than these is zero; more would only round the sums of them.
_MOST_BITS = 160 if triton is None else tl.constexpr(160)
# Triton's products have no side below this.
_SMALLEST_SIDE = 16


def chunk_scan(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    states: Tensor,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """The scan of `ssd.ssd_chunk_scan`, with a gradient for every tensor.

    Args:
        x: `(b, l, h, p)`.
        delta: `(b, l, h)`, the step size Δ itself, in float32.
        A: `(h,)`, in float32.
        B: `(b, l, g, n)`.
        C: `(b, l, g, n)`.
        D: `(h,)`, in float32.
        states: `(b, h, p, n)`, those before the first token, in float32.
        reverse: whether the last token is the first.

    Returns:
        y `(b, l, h, p)`, and the states after the last token `(b, h, p, n)`.
    """
    B, C = B.to(x.dtype), C.to(x.dtype)
    with torch.autocast(x.device.type, enabled=False):
        return _Scan.apply(x, delta, A, B, C, D, states, reverse)


def final_states(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, states: Tensor, reverse: bool = False) -> Tensor:
    """The states after the last token alone, without a gradient; arguments as in `chunk_scan`."""
    return _Sequence(x, delta, A, B, reverse).part_states(states)[1]


class _Scan(torch.autograd.Function):
    """Keeps the inputs; computes the states again for the gradient."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        x, delta, A, B, C, D, states, reverse = inputs
        ctx.save_for_backward(*inputs[:-1])
        ctx.reverse = reverse
        sequence = _Sequence(x, delta, A, B, reverse)
        entered, last = sequence.part_states(states)
        return sequence.outputs(C, D, entered), last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor, grad_last: Tensor) -> tuple[Tensor | None, ...]:
        x, delta, A, B, C, D, states = ctx.saved_tensors
        sequence = _Sequence(x, delta, A, B, ctx.reverse)
        grad_y = unit_stride(grad_y.to(x.dtype))
        entered, _ = sequence.part_states(states)
        # Seen from the end, the gradient of the states is a scan of that of y, with C for B.
        adjoint = _Sequence(grad_y, delta, A, C, ctx.reverse, adjoint=True)
        left, grad_states = adjoint.part_states(grad_last)
        grad_B, grad_C = (torch.empty(tensor.shape, dtype=tensor.dtype, device=x.device) for tensor in (B, C))
        grads = _Gradients(
            torch.empty(x.shape, dtype=x.dtype, device=x.device),
            torch.empty_like(sequence.delta),
            *(sequence.empty(triton.cdiv(x.shape[1], CHUNK_SIZE), x.shape[2]) for _ in range(2)),
        )
        for first in range(0, sequence.num_parts, _PARTS_OF_GRADIENT):
            parts = slice(first, min(first + _PARTS_OF_GRADIENT, sequence.num_parts))
            before, after = sequence.chunk_states(entered, parts), adjoint.chunk_states(left, parts)
            B_, C_ = sequence.gradients(grad_y, C, D, before, after, parts, grads)
            tokens = sequence.tokens(parts)
            for whole, of_heads in ((grad_B, B_), (grad_C, C_)):
                whole[:, tokens] = of_heads.unflatten(2, (B.shape[2], -1)).sum(dim=3, dtype=torch.float32)
        of_A, of_D = (per_chunk.sum(dim=(0, 1)) for per_chunk in (grads.A, grads.D))
        return grads.x, grads.delta.transpose(1, 2), of_A, grad_B, grad_C, of_D, grad_states, None


class _Gradients(NamedTuple):
    """Of x `(b, l, h, p)`, Δ `(b, h, l)`, and A and D `(b, chunks, h)`, by chunk."""

    x: Tensor
    delta: Tensor
    A: Tensor
    D: Tensor


class _Sequence:
    """What every step takes, as the kernels want it.

    Args:
        x, delta, A, B, reverse: as `chunk_scan` takes them.
        adjoint: whether x is the gradient of y and B is C, for the steps from the end to the start.
    """

    def __init__(self, x: Tensor, delta: Tensor, A: Tensor, B: Tensor, reverse: bool, adjoint: bool = False):
        self.x, self.B = unit_stride(x), unit_stride(B)
        self.delta = delta.float().transpose(1, 2).contiguous()  # b h l
        self.rate = A.float() / math.log(2)  # bits per step size
        self.reverse, self.adjoint = reverse, adjoint
        self.batch, self.length, self.heads, self.head_dim = x.shape
        self.state_size = B.shape[-1]
        self.num_parts = triton.cdiv(self.length, CHUNK_SIZE * CHUNKS_OF_PART)

    def part_states(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Steps 1 and 2: the states before every part `(b, parts, h, p, n)`, and those after the last token."""
        added = self.empty(self.num_parts, self.heads, self.head_dim, self.state_size)
        decay = self.empty(self.num_parts, self.heads)
        self._launch(_state_kernel, self.num_parts, added, decay, added, 0, self.num_parts, self.adjoint, False)
        states, last = states.float().contiguous(), self.empty(self.heads, self.head_dim, self.state_size)
        size = self.head_dim * self.state_size
        block = min(1024, triton.next_power_of_2(size))
        with on_device_of(self.x):
            _pass_kernel[(triton.cdiv(size, block), self.heads, self.batch)](
                states, added, decay, last, self.num_parts, self.heads, size, self.adjoint, block
            )
        return added, last

    def chunk_states(self, entered: Tensor, parts: slice) -> Tensor:
        """The states before every chunk of some parts, from those before the parts: `(b, chunks, h, n, p)`, in the
        type of x."""
        num_parts = parts.stop - parts.start
        shape = (self.batch, num_parts * CHUNKS_OF_PART, self.heads, self.state_size, self.head_dim)
        before = torch.empty(shape, dtype=self.x.dtype, device=self.x.device)
        self._launch(
            _state_kernel, num_parts, entered, entered, before, parts.start, self.num_parts, self.adjoint, True
        )
        return before

    def outputs(self, C: Tensor, D: Tensor, entered: Tensor) -> Tensor:
        """Step 3: y `(b, l, h, p)`, from the states before every part."""
        y, C = torch.empty(self.x.shape, dtype=self.x.dtype, device=self.x.device), unit_stride(C)
        self._launch(_output_kernel, self.num_parts, C, D, entered, y, C.stride(0), C.stride(1), C.stride(2))
        return y

    def gradients(
        self, grad_y: Tensor, C: Tensor, D: Tensor, before: Tensor, after: Tensor, parts: slice, grads: _Gradients
    ) -> tuple[Tensor, Tensor]:
        """The gradients in the chunks of some parts.

        Args:
            grad_y: `(b, l, h, p)`.
            C: `(b, l, g, n)`.
            D: `(h,)`.
            before: the states before each of these chunks `(b, chunks, h, n, p)`.
            after: the gradients of the states after each of them, likewise.
            parts: which.
            grads: where those of x, Δ, A and D go.

        Returns:
            Those of B and C for every head `(b, tokens, h, n)`.
        """
        C, tokens = unit_stride(C), self.tokens(parts)
        shape = (self.batch, tokens.stop - tokens.start, self.heads, self.state_size)
        grad_B, grad_C = (torch.empty(shape, dtype=self.x.dtype, device=self.x.device) for _ in range(2))
        first_chunk = parts.start * CHUNKS_OF_PART
        self._launch(
            _gradient_kernel, triton.cdiv(shape[1], CHUNK_SIZE), C, D, grad_y, before, after, *grads, grad_B, grad_C,
            C.stride(0), C.stride(1), C.stride(2), grad_y.stride(0), grad_y.stride(1), grad_y.stride(2),
            first_chunk, grads.A.shape[1], before.shape[1], tokens.start, shape[1], num_warps=8,
        )  # fmt: skip
        return grad_B, grad_C

    def tokens(self, parts: slice) -> slice:
        """The tokens of some parts."""
        start, stop = (min(part * CHUNK_SIZE * CHUNKS_OF_PART, self.length) for part in (parts.start, parts.stop))
        return slice(self.length - stop, self.length - start) if self.reverse else slice(start, stop)

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(self.batch, *shape, dtype=torch.float32, device=self.x.device)

    def _launch(self, kernel: Any, programs: int, *others: Any, num_warps: int = 4) -> None:
        """A kernel with so many programs for each head of every sequence."""
        x, B = self.x, self.B
        with on_device_of(x):
            kernel[(self.heads, programs, self.batch)](
                x, self.delta, self.rate, B, *others, self.length, self.heads, self.heads // B.shape[2],
                x.stride(0), x.stride(1), x.stride(2), B.stride(0), B.stride(1), B.stride(2),
                self.head_dim, self.state_size, _side(self.head_dim), _side(self.state_size), CHUNK_SIZE,
                CHUNKS_OF_PART, self.reverse, num_warps=num_warps, num_stages=2,
            )  # fmt: skip


def _side(size: int) -> int:
    return max(_SMALLEST_SIDE, triton.next_power_of_2(size))


@jit
def _tokens_of(chunk, length, CHUNK: tl.constexpr, REVERSE: tl.constexpr):
    """The tokens of a chunk, and whether they are there."""
    place = chunk * CHUNK + tl.arange(0, CHUNK)
    return (length - 1 - place if REVERSE else place).to(tl.int64), place < length


@jit
def _tile(pointer, token, stride, is_there, WIDTH: tl.constexpr, SIDE: tl.constexpr):
    """Rows of a tensor, one for each token; zeros where nothing is there."""
    column = tl.arange(0, SIDE)
    mask = is_there[:, None] & (column < WIDTH)[None, :]
    return tl.load(pointer + token[:, None] * stride + column[None, :], mask=mask, other=0)


@jit
def _decay_of(delta, token, is_there, rate):
    """Of a chunk: the step sizes, L, and its last, the decay over the chunk in bits."""
    step = tl.load(delta + token, mask=is_there, other=0)
    bits = tl.maximum(step * rate, -_MOST_BITS)
    return step, tl.cumsum(bits, axis=0), tl.sum(bits, axis=0)


@jit
def _product(a, b):
    return tl.dot(a, b, input_precision="ieee")


@jit
def _state_kernel(
    x, delta, rate, B, states, decay, before, first_part, num_parts,
    ADJOINT: tl.constexpr, OF_CHUNKS: tl.constexpr,
    length, heads, heads_of_group, x_batch, x_token, x_head, B_batch, B_token, B_group,
    HEAD_DIM: tl.constexpr, STATE: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    CHUNK: tl.constexpr, CHUNKS: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Step 1: what a part adds to the state, to `states`, and the decay over it in bits. With `OF_CHUNKS`: from
    `states` before the part, that before each of its chunks. With `ADJOINT` from the end to the start."""
    head, part, batch = tl.program_id(0), first_part + tl.program_id(1), tl.program_id(2).to(tl.int64)
    n, p = tl.arange(0, N)[:, None], tl.arange(0, P)[None, :]
    is_number = (n < STATE) & (p < HEAD_DIM)
    x += batch * x_batch + head * x_head
    B += batch * B_batch + head // heads_of_group * B_group
    delta += (batch * heads + head) * length
    rate_ = tl.load(rate + head)
    row = (batch * num_parts + part) * heads + head
    states += row * HEAD_DIM * STATE + p * STATE + n
    state, over_part = tl.zeros((N, P), tl.float32), 0.0
    if OF_CHUNKS:
        state += tl.load(states, mask=is_number, other=0)
    num_chunks = tl.minimum(CHUNKS, tl.cdiv(length, CHUNK) - part * CHUNKS)
    for index in range(num_chunks):
        chunk = num_chunks - 1 - index if ADJOINT else index
        if OF_CHUNKS:
            row = (batch * tl.num_programs(1) + tl.program_id(1)) * CHUNKS + chunk
            tl.store(before + ((row * heads + head) * STATE + n) * HEAD_DIM + p, state, mask=is_number)
        token, is_there = _tokens_of(part * CHUNKS + chunk, length, CHUNK, REVERSE)
        step, L, last = _decay_of(delta, token, is_there, rate_)
        x_ = _tile(x, token, x_token, is_there, HEAD_DIM, P)
        B_ = _tile(B, token, B_token, is_there, STATE, N)
        factor = tl.exp2(L) if ADJOINT else tl.exp2(tl.minimum(last - L, 0.0)) * step
        written = (x_ * factor[:, None]).to(x_.dtype)
        state = tl.dot(tl.trans(B_), written, tl.exp2(last) * state, input_precision="ieee")
        over_part += last
    if not OF_CHUNKS:
        tl.store(states, state, mask=is_number)
        tl.store(decay + row, over_part)


@jit
def _pass_kernel(first, states, decay, final, num_parts, heads, size, ADJOINT: tl.constexpr, BLOCK: tl.constexpr):
    """Step 2: the state before every part, in place of what the part adds, and the state after the last."""
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    number = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_number = number < size
    state = tl.load(first + (batch * heads + head) * size + number, mask=is_number, other=0)
    for index in range(num_parts):
        part = num_parts - 1 - index if ADJOINT else index
        row = (batch * num_parts + part) * heads + head
        here = states + row * size + number
        entered = state
        state = tl.exp2(tl.load(decay + row)) * state + tl.load(here, mask=is_number, other=0)
        tl.store(here, entered, mask=is_number)
    tl.store(final + (batch * heads + head) * size + number, state, mask=is_number)


@jit
def _output_kernel(
    x, delta, rate, B, C, D, entered, y, C_batch, C_token, C_group,
    length, heads, heads_of_group, x_batch, x_token, x_head, B_batch, B_token, B_group,
    HEAD_DIM: tl.constexpr, STATE: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    CHUNK: tl.constexpr, CHUNKS: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Step 3: the outputs of a part, from the state before it."""
    head, part, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    n, p, t = tl.arange(0, N), tl.arange(0, P), tl.arange(0, CHUNK)
    group = head // heads_of_group
    x += batch * x_batch + head * x_head
    y += (batch * length * heads + head) * HEAD_DIM
    B += batch * B_batch + group * B_group
    C += batch * C_batch + group * C_group
    delta += (batch * heads + head) * length
    rate_, skip = tl.load(rate + head), tl.load(D + head)
    row = (batch * tl.num_programs(1) + part) * heads + head
    is_number = (n < STATE)[:, None] & (p < HEAD_DIM)[None, :]
    state = tl.load(entered + (row * HEAD_DIM + p[None, :]) * STATE + n[:, None], mask=is_number, other=0)
    for chunk in range(tl.minimum(CHUNKS, tl.cdiv(length, CHUNK) - part * CHUNKS)):
        token, is_there = _tokens_of(part * CHUNKS + chunk, length, CHUNK, REVERSE)
        step, L, last = _decay_of(delta, token, is_there, rate_)
        x_ = _tile(x, token, x_token, is_there, HEAD_DIM, P)
        B_ = _tile(B, token, B_token, is_there, STATE, N)
        C_ = _tile(C, token, C_token, is_there, STATE, N)

        decay = tl.where(t[:, None] >= t[None, :], tl.exp2(tl.minimum(L[:, None] - L[None, :], 0.0)), 0.0)
        weights = (_product(C_, tl.trans(B_)) * decay * step[None, :]).to(x_.dtype)
        y_ = _product(C_, state.to(x_.dtype)) * tl.exp2(L)[:, None]
        y_ = tl.dot(weights, x_, y_, input_precision="ieee") + skip * x_
        in_y = is_there[:, None] & (p < HEAD_DIM)[None, :]
        tl.store(y + token[:, None] * heads * HEAD_DIM + p[None, :], y_, mask=in_y)

        written = (x_ * (tl.exp2(tl.minimum(last - L, 0.0)) * step)[:, None]).to(x_.dtype)
        state = tl.dot(tl.trans(B_), written, tl.exp2(last) * state, input_precision="ieee")


@jit
def _gradient_kernel(
    x, delta, rate, B, C, D, grad_y, before, after, grad_x, grad_delta, grad_A, grad_D, grad_B, grad_C,
    C_batch, C_token, C_group, y_batch, y_token, y_head, first_chunk, num_chunks, num_states, first_token, num_tokens,
    length, heads, heads_of_group, x_batch, x_token, x_head, B_batch, B_token, B_group,
    HEAD_DIM: tl.constexpr, STATE: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    CHUNK: tl.constexpr, CHUNKS: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """The gradients in one chunk, given the state h before it and the gradient of the one after it."""
    head, batch = tl.program_id(0), tl.program_id(2).to(tl.int64)
    chunk = first_chunk + tl.program_id(1)
    n, p, t = tl.arange(0, N), tl.arange(0, P), tl.arange(0, CHUNK)
    group = head // heads_of_group
    rate_, skip = tl.load(rate + head), tl.load(D + head)
    delta += (batch * heads + head) * length
    token, is_there = _tokens_of(chunk, length, CHUNK, REVERSE)
    step, L, last = _decay_of(delta, token, is_there, rate_)
    x_ = _tile(x + batch * x_batch + head * x_head, token, x_token, is_there, HEAD_DIM, P)
    dy = _tile(grad_y + batch * y_batch + head * y_head, token, y_token, is_there, HEAD_DIM, P)
    B_ = _tile(B + batch * B_batch + group * B_group, token, B_token, is_there, STATE, N)
    C_ = _tile(C + batch * C_batch + group * C_group, token, C_token, is_there, STATE, N)
    row = ((batch * num_states + tl.program_id(1)) * heads + head) * STATE
    places = (row + n[:, None]) * HEAD_DIM + p[None, :]
    is_number = (n < STATE)[:, None] & (p < HEAD_DIM)[None, :]
    h = tl.load(before + places, mask=is_number, other=0)  # n p
    dh = tl.load(after + places, mask=is_number, other=0)
    dtype = x_.dtype
    to_token, to_end = tl.exp2(L), tl.exp2(tl.minimum(last - L, 0.0))
    decay = tl.where(t[:, None] >= t[None, :], tl.exp2(tl.minimum(L[:, None] - L[None, :], 0.0)), 0.0)

    # x: what each token wrote is read by later tokens of the chunk, and through the state after it.
    scores = _product(C_, tl.trans(B_))  # t s
    read = _product(tl.trans((scores * decay).to(dtype)), dy) + _product(B_, dh) * to_end[:, None]
    dx = read * step[:, None] + skip * dy
    in_x = is_there[:, None] & (p < HEAD_DIM)[None, :]
    tl.store(
        grad_x + (batch * length + token[:, None]) * heads * HEAD_DIM + head * HEAD_DIM + p[None, :], dx, mask=in_x
    )
    d_step = tl.sum(read * x_, axis=1)
    row = (batch * num_chunks + chunk) * heads + head
    tl.store(grad_D + row, tl.sum(tl.sum(dy.to(tl.float32) * x_, axis=1), axis=0))

    # C and B of this head: through the scores, and through the states. The decays: every way from token s to token t
    # passes the tokens after s, up to t.
    d_scores = _product(dy, tl.trans(x_)) * decay * step[None, :]
    ways = scores * d_scores
    d_L = tl.sum(ways, axis=1) - tl.sum(ways, axis=0)
    d_scores = d_scores.to(dtype)
    in_B = is_there[:, None] & (n < STATE)[None, :]
    places = ((batch * num_tokens + token - first_token)[:, None] * heads + head) * STATE + n[None, :]
    dC = _product(dy, tl.trans(h)) * to_token[:, None]
    d_L += tl.sum(dC * C_, axis=1)
    tl.store(grad_C + places, tl.dot(d_scores, B_, dC, input_precision="ieee"), mask=in_B)
    dB = _product(x_, tl.trans(dh)) * (to_end * step)[:, None]
    from_token = tl.sum(dB * B_, axis=1)
    tl.store(grad_B + places, tl.dot(tl.trans(d_scores), C_, dB, input_precision="ieee"), mask=in_B)
    d_L -= from_token
    d_last = tl.sum(from_token, axis=0) + tl.exp2(last) * tl.sum(tl.sum(h.to(tl.float32) * dh, axis=1), axis=0)
    d_decay = d_last + tl.sum(d_L, axis=0) - tl.cumsum(d_L, axis=0) + d_L
    d_step += rate_ * 0.6931471805599453 * d_decay
    tl.store(grad_delta + (batch * heads + head) * length + token, d_step, mask=is_there)
    tl.store(grad_A + row, tl.sum(step * d_decay, axis=0))
