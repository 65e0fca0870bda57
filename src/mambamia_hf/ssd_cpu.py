"""The SSD scan as a few large matrix products, forward and backward: the PyTorch engine behind `ssd.py`.

Let L_t be the base-2 logarithm of the decay from the start of a chunk up to token t, m the middle of its range, and
u_t = 2^(L_t - m), v_s = 2^(m - L_s) Δ_s. Then u_t v_s is the decay from token s to token t times Δ_s, and with
T = tril(C Bᵀ, -1), which all heads of a group share, a chunk takes three matrix products for all heads together:

    y = u ⊙ ([T | C] @ [v ⊙ x ; 2^m S]) + (D + Δ C·B) ⊙ x        S <- 2^(L_last - m) (2^m S + Bᵀ @ (v ⊙ x))

No array has an entry per head and pair of tokens. u and v stay in the range of the numbers while L spans at most
`_MAX_BITS` in a chunk. Where it spans more, the second half of the chunk reads what the first half wrote through the
boundary between them, v up to the boundary and u from there on, so that both are at most 1; then the same in each
half, until L spans few enough bits in what is left. The steepest heads end at single tokens, and every decay is exact.

Letters in the shapes: b batch, l length, h heads, g groups, e heads of a group, p head size, n state size, c chunks, q
tokens of a chunk. Groups and rows of the batch share no product; in products, r = b g counts both.
"""

import math
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from threading import Barrier
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


# Tokens of a chunk, a power of two: longer chunks cost more in T, shorter ones more in the states.
_CHUNK_SIZE = {"cpu": 64, "cuda": 128}
# Chunks of a segment. Training keeps the state before every segment.
_SEGMENT_CHUNKS = 16
# Heads computed together: as many as stay in a CPU's cache, or as fill a GPU.
_MAX_HEADS = {"cpu": 16, "cuda": 1024}
# Heads computed together where their chunks are divided.
_DIVIDED_HEADS = {"cpu": 4, "cuda": 1024}
# Heads worth a thread, as every thread computes T once more, and elements of x worth a thread.
_MIN_HEADS, _MIN_ELEMENTS = 4, 2**16
# Float32 has 126 bits on each side of 1; u and v take 60 of them.
_MAX_BITS = 120.0
# Decays of more bits are zero. Denormal numbers, which begin at 126 bits, would slow the products down a hundredfold.
_ZERO_BITS = 110.0

Item, Result = TypeVar("Item"), TypeVar("Result")


def chunk_scan(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, states: Tensor, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """The scan of `ssd.ssd_chunk_scan`, with a gradient for every tensor.

    Args:
        x: `(b, l, h, p)`.
        delta: `(b, l, h)`, the step size Δ itself.
        A: `(h,)`.
        B: `(b, l, g, n)`.
        C: `(b, l, g, n)`.
        D: `(h,)`.
        states: `(b, h, p, n)`, those before the first token.
        chunk_size: length of a chunk at most.

    Returns:
        `y (b, l, h, p)` in the type of x, and the states after the last token `(b, h, p, n)`. `delta`, `A`, `D` and
        states have the type that everything is computed in.
    """
    limit = min(chunk_size, _CHUNK_SIZE.get(x.device.type, _CHUNK_SIZE["cuda"]))
    with torch.autocast(x.device.type, enabled=False):
        return _Scan.apply(x, delta, A, B, C, D, states, 2 ** (limit.bit_length() - 1))


@torch.no_grad()
def final_states(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, states: Tensor) -> Tensor:
    """The states after the last token alone, without a gradient: one product per segment, as no token reads them.

    Arguments and result as in `chunk_scan`.
    """
    result = torch.empty_like(states, memory_format=torch.contiguous_format)

    def run(share: _Share) -> None:
        state, A_ = share.take_states(states), share.of_heads(A)
        for segment in _segments(x.shape[1], _CHUNK_SIZE["cpu"] * _SEGMENT_CHUNKS, chunks=1):
            x_, delta_ = (segment.chunks(share.of(tensor), A.dtype)[0] for tensor in (x, delta))
            B_ = segment.chunks(share.of_groups(B), A.dtype)[0].flatten(0, 1)
            L = _log_decay(delta_, A_)
            last = L[:, :, -1:]
            v = _decay(last - L, A.dtype) * delta_.unsqueeze(-1)
            state.mul_(_decay(last, A.dtype))
            _rows(state).baddbmm_(B_.mT, _rows(x_ * v))
        share.of_states(result).copy_(state)

    _for_each(run, _shares(x, B), x)
    return result


class _Scan(torch.autograd.Function):
    """Keeps the inputs and the state before each segment; computes the rest of a segment again for the gradient."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        *tensors, states, chunk_size = inputs
        x, B = tensors[0], tensors[3]
        y, last = (torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (x, states))
        ctx.shares, ctx.segments = _shares(x, B), _segments(x.shape[1], chunk_size, _SEGMENT_CHUNKS)
        keep = any(ctx.needs_input_grad)

        def run(share: _Share) -> list[Tensor]:
            state, kept = share.take_states(states), []
            for segment in ctx.segments:
                if keep:
                    kept.append(state.clone())
                y_ = segment.chunks(share.of(y), state.dtype)
                _scan_segment(_Chunks.of(share, segment, *tensors), state, y_)
                segment.put(y_, share.of(y))
            share.of_states(last).copy_(state)
            return kept

        kept = _for_each(run, ctx.shares, x)
        ctx.save_for_backward(*tensors, *(state for states in kept for state in states))
        return y, last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_y, grad_last = grads
        x, delta, A, B, C, D, *kept = ctx.saved_tensors
        tensors, dtype, steps = (x, delta, A, B, C, D), A.dtype, len(ctx.segments)
        grad_x, grad_delta = (torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (x, delta))
        grad_A, grad_B, grad_C, grad_D = (torch.zeros_like(tensor, dtype=dtype) for tensor in (A, B, C, D))
        grad_states = [share.take_states(grad_last) for share in ctx.shares]

        for step, segment in reversed(list(enumerate(ctx.segments))):

            def run(index: int, step: int = step, segment: _Segment = segment) -> tuple[Tensor, ...]:
                share, state = ctx.shares[index], kept[index * steps + step]
                grad_y_, grad_x_ = (segment.chunks(share.of(tensor), dtype) for tensor in (grad_y, grad_x))
                chunks = _Chunks.of(share, segment, *tensors)
                grad_delta_, *rest = _scan_segment_backward(chunks, state, grad_y_, grad_states[index], grad_x_)
                segment.put(grad_x_, share.of(grad_x))
                segment.put(grad_delta_, share.of(grad_delta))
                return tuple(rest)

            # The sums over shares are taken here, in a fixed order: threads that add as they finish would round anew
            # in every run.
            results = _for_each(run, range(len(ctx.shares)), x)
            for share, (A_, D_, B_, C_) in zip(ctx.shares, results, strict=True):
                share.of_heads(grad_A).add_(A_)
                share.of_heads(grad_D).add_(D_)
                segment.add(B_, share.of_groups(grad_B))
                segment.add(C_, share.of_groups(grad_C))

        grad_first = torch.empty_like(grad_last, memory_format=torch.contiguous_format)
        for share, state in zip(ctx.shares, grad_states, strict=True):
            share.of_states(grad_first).copy_(state)
        return grad_x, grad_delta, grad_A, grad_B.to(B.dtype), grad_C.to(C.dtype), grad_D, grad_first, None


class _Share(NamedTuple):
    """What one thread computes: some heads of some groups in some rows of the batch."""

    rows: slice
    groups: slice
    heads: slice
    num_groups: int

    def of(self, tensor: Tensor) -> Tensor:
        """`(b, l, h, ...)` to `(b, l, g, e, ...)`, a view."""
        return tensor.unflatten(2, (self.num_groups, -1))[self.rows, :, self.groups, self.heads]

    def of_groups(self, tensor: Tensor) -> Tensor:
        """`(b, l, g, n)` to the same, a view."""
        return tensor[self.rows, :, self.groups]

    def of_heads(self, tensor: Tensor) -> Tensor:
        """`(h,)` to `(g, e)`, a view."""
        return tensor.unflatten(0, (self.num_groups, -1))[self.groups, self.heads]

    def of_states(self, tensor: Tensor) -> Tensor:
        """`(b, h, p, n)` to `(b, g, n, e, p)`, a view."""
        tensor = tensor.unflatten(1, (self.num_groups, -1))[self.rows, self.groups, self.heads]
        return tensor.permute(0, 1, 4, 2, 3)

    def take_states(self, tensor: Tensor) -> Tensor:
        """`(b, h, p, n)` to `(b, g, n, e, p)`, a copy."""
        return self.of_states(tensor).clone(memory_format=torch.contiguous_format)


class _Segment(NamedTuple):
    """Consecutive chunks. Tokens of step size zero, which change nothing, fill up the last one."""

    tokens: slice
    chunk_size: int

    def chunks(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """`(b, l, g, ...)` to `(c, b, g, q, ...)`: a view, unless it is filled up or of another type."""
        tensor = tensor[:, self.tokens].to(dtype)
        missing = -tensor.shape[1] % self.chunk_size
        if missing:
            tensor = nn.functional.pad(tensor, (0, 0) * (tensor.dim() - 2) + (0, missing))
        return tensor.unflatten(1, (-1, self.chunk_size)).transpose(0, 1).transpose(2, 3)

    def put(self, chunks: Tensor, tensor: Tensor) -> None:
        """The way back, into the tensor; nothing to do where the chunks are a view of it."""
        tensor = tensor[:, self.tokens]
        if chunks.data_ptr() != tensor.data_ptr():
            tensor.copy_(self._tokens(chunks, tensor))

    def add(self, chunks: Tensor, tensor: Tensor) -> None:
        """Adds to the tensor what the chunks hold for it."""
        tensor = tensor[:, self.tokens]
        tensor.add_(self._tokens(chunks, tensor))

    def _tokens(self, chunks: Tensor, tensor: Tensor) -> Tensor:
        return chunks.transpose(2, 3).transpose(0, 1).flatten(1, 2)[:, : tensor.shape[1]]


class _Chunks(NamedTuple):
    """The share of a segment, with the decays in it."""

    x: Tensor  # c b g q e p
    delta: Tensor  # c b g q e
    A: Tensor  # g e
    B: Tensor  # c r q n
    C: Tensor  # c r q n
    T: Tensor  # c r q q
    CB: Tensor  # c b g q 1, the diagonal that T leaves out
    D: Tensor  # c b g q e 1, with Δ C·B: all that a token reads of itself
    L: Tensor  # c b g q e
    steep: Tensor  # the heads where L spans more than _MAX_BITS in some chunk, the steepest last
    u: Tensor  # c b g q e 1; zero in steep heads
    v: Tensor  # c b g q e 1, without Δ; up to the end of the chunk in steep heads
    enter: Tensor  # b g 1 e 1, the factor on the state before the segment: 2^m of the first chunk, 1 in steep heads
    leave: Tensor  # c b g 1 e 1, the factor on the state after each chunk, with 2^m of the next

    @classmethod
    def of(
        cls, share: _Share, segment: _Segment, x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor
    ) -> "_Chunks":
        dtype = A.dtype
        x, delta = (segment.chunks(share.of(tensor), dtype) for tensor in (x, delta))
        B, C = (segment.chunks(share.of_groups(tensor), dtype).flatten(1, 2).contiguous() for tensor in (B, C))
        A, D = share.of_heads(A), share.of_heads(D)
        scores = C @ B.mT
        CB = scores.diagonal(dim1=2, dim2=3).clone().view(*delta.shape[:4], 1)
        D = torch.addcmul(D.unsqueeze(1), delta, CB).unsqueeze(-1)

        L = _log_decay(delta, A)
        first, last = L[:, :, :, :1], L[:, :, :, -1:]
        spans = (first - last).abs().amax(dim=(0, 1, 2, 3))
        gentle = spans <= _MAX_BITS
        order = spans.argsort()
        steep = order[int(gentle.sum()) :]
        middle = (first + last) / 2
        if len(steep):
            u = torch.where(gentle, L - middle, -math.inf).exp2()
            v = _decay(torch.where(gentle, middle, last) - L)
            enter, leave = (_decay(torch.where(gentle, bits, 0)) for bits in (middle, last - middle))
        else:
            u, v, enter, leave = (L - middle).exp2(), (middle - L).exp2(), _decay(middle), (last - middle).exp2()
        leave[:-1] *= enter[1:]
        u, v, enter, leave = (decay.to(dtype).unsqueeze(-1) for decay in (u, v, enter[0], leave))
        return cls(x, delta, A, B, C, scores.tril_(-1), CB, D, L, steep, u, v, enter, leave)

    def steep_decay(self) -> Tensor:
        """The decay of a whole chunk in steep heads, `(c, b, g, 1, e, 1)`."""
        last = self.L[:, :, :, -1:].index_select(4, self.steep)
        return _decay(last).to(self.x.dtype).unsqueeze(-1)

    def some_steep(self) -> list[slice]:
        """A few steep heads at a time, of similar steepness."""
        some = _DIVIDED_HEADS.get(self.x.device.type, _DIVIDED_HEADS["cuda"])
        return [slice(start, start + some) for start in range(0, len(self.steep), some)]


class _Part(NamedTuple):
    """Parts of a chunk of `size` tokens: of each pair the second reads the first, or, alone, each reads itself."""

    size: int
    count: int

    def readers(self, tensor: Tensor) -> Tensor:
        """`(c, b, g, q, ...)` to `(c, b, g, parts, size, ...)`, a view."""
        return tensor.unflatten(3, (-1, self.count, self.size)).select(4, self.count - 1)

    def writers(self, tensor: Tensor) -> Tensor:
        """The same of those that are read."""
        return tensor.unflatten(3, (-1, self.count, self.size)).select(4, 0)

    def weights(self, T: Tensor) -> Tensor:
        """`(c, r, q, q)` to `(c, r, parts, size, size)`, a view."""
        T = T.unflatten(3, (-1, self.count, self.size)).unflatten(2, (-1, self.count, self.size))
        return T[:, :, :, self.count - 1, :, :, 0].diagonal(dim1=2, dim2=4).movedim(-1, 2)


def _log_decay(delta: Tensor, A: Tensor) -> Tensor:
    """L `(..., g, q, e)`, in float64: only its differences count, and float32 would round a long sum too much."""
    return (delta * (A.double().unsqueeze(-2) / math.log(2))).cumsum(dim=-2)


def _decay(bits: Tensor) -> Tensor:
    return bits.masked_fill(bits < -_ZERO_BITS, -math.inf).exp2_()


def _parts(L: Tensor, dtype: torch.dtype) -> Iterator[tuple[_Part, Tensor, Tensor]]:
    """How tokens of a chunk read each other exactly, by halves, whatever L `(c, b, g, q, e)` spans.

    Yields which read which, and u and v without Δ, of the readers and the writers.
    """
    size = L.shape[3]
    while size > 1 and _span(_Part(size, 1).readers(L)).max() > _MAX_BITS:
        size //= 2
        part = _Part(size, 2)
        reader, writer = part.readers(L), part.writers(L)
        boundary = writer[..., -1:, :]
        yield part, *(_decay(bits).to(dtype).unsqueeze(-1) for bits in (reader - boundary, boundary - writer))
    if size > 1:
        part = _Part(size, 1)
        L = part.readers(L)
        middle = (L[..., :1, :] + L[..., -1:, :]) / 2
        yield part, *(bits.exp2().to(dtype).unsqueeze(-1) for bits in (L - middle, middle - L))


def _span(L: Tensor) -> Tensor:
    return (L[..., 0, :] - L[..., -1, :]).abs()


def _rows(tensor: Tensor, dim: int = 0) -> Tensor:
    """Merges b and g, which are at `dim`, and the last two, e and p: matrices for a product."""
    return tensor.flatten(-2).flatten(dim, dim + 1)


def _scan_segment(chunks: _Chunks, state: Tensor, y: Tensor) -> None:
    """Writes y `(c, b, g, q, e, p)` and takes the state `(b, g, n, e, p)` to the end of the segment."""
    batch, groups, state_size, heads, head_dim = state.shape
    size, steep = y.shape[3], chunks.steep
    sources = state.new_empty(batch, groups, size + state_size, heads, head_dim)
    written, entered = sources[:, :, :size], sources[:, :, size:]
    read = state.new_empty(batch, groups, size, heads, head_dim)
    sources_, written_, entered_, read_ = (_rows(tensor) for tensor in (sources, written, entered, read))
    torch.mul(state, chunks.enter, out=entered)
    steep_decay = chunks.steep_decay()
    steep_entered = []
    v, weights = chunks.v * chunks.delta.unsqueeze(-1), torch.cat([chunks.T, chunks.C], dim=3)
    for c, (x_, u_, v_, D_, weights_, B_, leave_, y_) in enumerate(
        zip(chunks.x, chunks.u, v, chunks.D, weights, chunks.B.mT, chunks.leave, y, strict=True)
    ):
        torch.mul(x_, v_, out=written)
        torch.bmm(weights_, sources_, out=read_)
        torch.addcmul(read.mul_(u_), x_, D_, out=y_)
        if len(steep):
            steep_entered.append(entered.index_select(3, steep))
            entered.index_copy_(3, steep, steep_entered[-1] * steep_decay[c])
        entered_.baddbmm_(B_, written_)
        entered.mul_(leave_)
    state.copy_(entered)

    if len(steep):
        steep_y = (chunks.C @ _rows(torch.stack(steep_entered), 1)).view(*y.shape[:4], len(steep), head_dim)
        steep_y.mul_(_decay(chunks.L.index_select(4, steep)).to(y.dtype).unsqueeze(-1))
        for some in chunks.some_steep():
            heads = steep[some]
            x, delta, L = (
                chunks.x.index_select(4, heads),
                chunks.delta.index_select(4, heads),
                chunks.L.index_select(4, heads),
            )
            for part, u, v in _parts(L, y.dtype):
                written = part.writers(x) * (v * part.writers(delta).unsqueeze(-1))
                read = (part.weights(chunks.T) @ _rows(written, 1)).view(written.shape)
                part.readers(steep_y[..., some, :]).addcmul_(read, u)
        y.index_add_(4, steep, steep_y)


def _scan_segment_backward(
    chunks: _Chunks, state: Tensor, grad_y: Tensor, grad_state: Tensor, grad_x: Tensor
) -> tuple[Tensor, ...]:
    """The gradients of `_scan_segment`, given its state and the gradients of y and of the state that it leaves.

    Writes that of x `(c, b, g, q, e, p)`, takes that of the state to the start of the segment, and returns those of
    delta `(c, b, g, q, e)`, A and D `(g, e)`, and B and C `(c, b, g, q, n)`.
    """
    batch, groups, state_size, heads, head_dim = state.shape
    size, steep, delta = grad_y.shape[3], chunks.steep, chunks.delta.unsqueeze(-1)
    sources = state.new_empty(len(grad_y), batch, groups, size + state_size, heads, head_dim)
    written, entered = sources[:, :, :, :size], sources[:, :, :, size:]
    v = chunks.v * delta
    steep_decay = chunks.steep_decay()
    torch.mul(chunks.x, v, out=written)
    state = state * chunks.enter
    for c, (written_, B_, leave_) in enumerate(zip(_rows(written, 1), chunks.B.mT, chunks.leave, strict=True)):
        entered[c] = state
        if len(steep):
            state.index_copy_(3, steep, state.index_select(3, steep) * steep_decay[c])
        _rows(state).baddbmm_(B_, written_)
        state.mul_(leave_)
    crossing = (state * grad_state).sum(dim=(2, 4), dtype=torch.float64)  # b g e: what passes the end of the segment

    grads = torch.empty_like(sources[0])
    grad_read, grad_left = grads[:, :, :size], grads[:, :, size:]
    grad_written = torch.empty_like(chunks.x[0], memory_format=torch.contiguous_format)
    grads_, grad_read_, grad_left_, grad_written_ = (_rows(t) for t in (grads, grad_read, grad_left, grad_written))
    grad_left.copy_(grad_state)
    weights, transposed = torch.cat([chunks.T, chunks.C], 3), torch.cat([chunks.T.mT, chunks.B], 3)
    grad_weights, grad_B = torch.empty_like(weights), torch.empty_like(chunks.B)
    reads, writes = torch.empty_like(chunks.delta), torch.empty_like(chunks.delta)
    if len(steep):
        steep_u = _decay(chunks.L.index_select(4, steep)).to(delta.dtype).unsqueeze(-1)
        steep_grad_read = grad_y.index_select(4, steep) * steep_u
    for c in reversed(range(len(grad_y))):
        grad_left.mul_(chunks.leave[c])
        torch.mul(grad_y[c], chunks.u[c], out=grad_read)
        torch.bmm(transposed[c], grads_, out=grad_written_)
        torch.bmm(_rows(written[c]), grad_left_.mT, out=grad_B[c])
        per_head = grad_read.transpose(2, 3) @ sources[c].permute(0, 1, 3, 4, 2)  # b g e q and what they read
        torch.sum(per_head.flatten(0, 1), dim=1, out=grad_weights[c])
        reads[c] = per_head.mul_(weights[c].view(batch, groups, 1, size, -1)).sum(dim=-1).transpose(2, 3)
        writes[c] = (chunks.x[c] * grad_written).sum(dim=-1)
        torch.mul(grad_y[c], chunks.D[c], out=grad_x[c]).addcmul_(grad_written, v[c])
        grad_left_.baddbmm_(chunks.C[c].mT, grad_read_)
        if len(steep):
            left = grad_left.index_select(3, steep) * steep_decay[c]
            _rows(left).baddbmm_(chunks.C[c].mT, _rows(steep_grad_read[c]))
            grad_left.index_copy_(3, steep, left)
    torch.mul(grad_left, chunks.enter, out=grad_state)
    writes.mul_(chunks.v.squeeze(-1))
    grad_T, grad_C = grad_weights.split([size, state_size], dim=3)

    if len(steep):
        steep_entered = _rows(entered.index_select(4, steep), 1)
        read = (chunks.C @ steep_entered).view(steep_grad_read.shape)
        steep_reads = (steep_grad_read * read).sum(dim=-1)
        steep_writes, steep_grad_x = torch.zeros_like(steep_reads), torch.zeros_like(read)
        grad_C += _rows(steep_grad_read, 1) @ steep_entered.mT
        for some in chunks.some_steep():
            heads = steep[some]
            x, delta_, L, grad = (t.index_select(4, heads) for t in (chunks.x, chunks.delta, chunks.L, grad_y))
            for part, u, v in _parts(L, delta.dtype):
                T, v_delta = part.weights(chunks.T), v * part.writers(delta_).unsqueeze(-1)
                written, grad_read = part.writers(x) * v_delta, part.readers(grad) * u
                read = (T @ _rows(written, 1)).view(written.shape)
                grad_written = (T.mT @ _rows(grad_read, 1)).view(written.shape)
                part.weights(grad_T).add_(_rows(grad_read, 1) @ _rows(written, 1).mT)
                part.readers(steep_reads[..., some]).add_((grad_read * read).sum(dim=-1))
                part.writers(steep_writes[..., some]).add_(
                    (part.writers(x) * grad_written).sum(dim=-1) * v.squeeze(-1)
                )
                part.writers(steep_grad_x[..., some, :]).addcmul_(grad_written, v_delta)
        reads.index_copy_(4, steep, steep_reads)
        writes.index_add_(4, steep, steep_writes)
        grad_x.index_add_(4, steep, steep_grad_x)

    itself = (grad_y * chunks.x).sum(dim=-1)  # the gradient of D + Δ C·B
    grad_scores = grad_T.tril(-1)
    grad_scores.diagonal(dim1=2, dim2=3).copy_((itself * chunks.delta).sum(dim=-1).flatten(1, 2))
    grad_B += grad_scores.mT @ chunks.C
    grad_C = grad_scores @ chunks.B + grad_C

    # The log of a token's decay has as its gradient all that passes the token: what later tokens read, less what they
    # and the tokens in between wrote themselves, plus what passes the end of the segment.
    passing = (reads - writes * chunks.delta).double().permute(1, 2, 4, 0, 3).flatten(3)  # b g e tokens
    passing = passing.flip(-1).cumsum(dim=-1).flip(-1) + crossing.unsqueeze(-1)
    passing = passing.unflatten(-1, (-1, size)).permute(3, 0, 1, 4, 2).to(delta.dtype)
    log_decay = chunks.delta * chunks.A.unsqueeze(1)
    passing = passing.masked_fill(log_decay < -_ZERO_BITS * math.log(2), 0)  # not the rounding of the sum
    grad_delta = writes + itself * chunks.CB + passing * chunks.A.unsqueeze(1)
    grad_A = (passing * chunks.delta).sum(dim=(0, 1, 3))
    grad_B, grad_C = (grad.unflatten(1, (batch, groups)) for grad in (grad_B, grad_C))
    return grad_delta, grad_A, itself.sum(dim=(0, 1, 3)), grad_B, grad_C


def _shares(x: Tensor, B: Tensor) -> list[_Share]:
    batch, _, heads, _ = x.shape
    groups = B.shape[2]
    in_group, limit = heads // groups, _MAX_HEADS.get(x.device.type, _MAX_HEADS["cuda"])
    if _worth_threads(x):
        limit = min(limit, max(_MIN_HEADS, math.ceil(batch * heads / torch.get_num_threads())))
    size = math.ceil(in_group / math.ceil(in_group / limit))
    num_groups = max(1, min(limit // in_group, groups))
    num_rows = max(1, limit // heads)
    return [
        _Share(slice(row, row + num_rows), slice(group, group + num_groups), slice(head, head + size), groups)
        for row in range(0, batch, num_rows)
        for group in range(0, groups, num_groups)
        for head in range(0, in_group, size)
    ]


def _segments(length: int, chunk_size: int, num_chunks: int) -> list[_Segment]:
    """All tokens in order. What is less than a chunk is a chunk of the next power of two."""
    whole, step = length - length % chunk_size, num_chunks * chunk_size
    segments = [_Segment(slice(start, min(start + step, whole)), chunk_size) for start in range(0, whole, step)]
    if whole < length:
        segments.append(_Segment(slice(whole, length), 2 ** (length - whole - 1).bit_length()))
    return segments


def _worth_threads(x: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and x.numel() >= _MIN_ELEMENTS
        and torch.get_num_threads() > 1
        and torch.backends.openmp.is_available()
    )


def _for_each(function: Callable[[Item], Result], items: Iterable[Item], x: Tensor) -> list[Result]:
    """The function of each item, in threads of its own where x is large enough.

    PyTorch splits every operation over its threads and waits for the last of them. On a busy machine it waits long,
    as one of them has always lost its core. Here a thread goes through all operations of an item without waiting.
    """
    if not _worth_threads(x):
        return [function(item) for item in items]
    inference = torch.is_inference_mode_enabled()

    def run(item: Item) -> Result:
        with torch.inference_mode(inference), torch.no_grad():  # modes are a thread's own
            return function(item)

    return list(_threads(torch.get_num_threads(), os.getpid()).map(run, items))


@lru_cache(maxsize=1)
def _threads(count: int, process: int) -> ThreadPoolExecutor:
    """Threads in which PyTorch runs on one thread; new ones in a forked process, which has none of its parent's."""
    started = Barrier(count + 1)

    def start() -> None:
        torch.set_num_threads(1)
        started.wait()

    threads = ThreadPoolExecutor(count, "mambamia-scan")
    for _ in range(count):
        threads.submit(start)
    started.wait()
    # With OpenMP the number counts for the calling thread alone, and for threads that are new to PyTorch: put it back.
    torch.set_num_threads(count)
    return threads
