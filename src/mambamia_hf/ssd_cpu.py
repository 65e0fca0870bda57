"""The SSD scan as a few large matrix products, forward and backward: the engine of `ssd.py` on a CPU.

Let L_t be the base-2 logarithm of the decay from the start of a chunk up to token t, m the middle of its range, and
u_t = 2^(L_t - m), v_s = 2^(m - L_s) Δ_s. Then u_t v_s is the decay from token s to token t times Δ_s, and with
T = tril(C Bᵀ, -1), which all heads of a group share, a chunk takes three matrix products for all heads together:

    y = u ⊙ ([T | C] @ [v ⊙ x ; 2^m S]) + (D + Δ C·B) ⊙ x        S <- 2^(L_last - m) (2^m S + Bᵀ @ (v ⊙ x))

No array has an entry per head and pair of tokens. u and v stay in the range of the numbers while L spans at most
`_MAX_BITS` in a chunk. Heads where it spans more are *steep*, the others *gentle*. Steep heads are computed apart,
through boundaries: a state is read through the start of a chunk; what the first half of a chunk wrote is read in the
second half through the token between them; then the same in each half, until L spans few enough bits in what is left.
Decays up to a boundary and from it on are at most 1, so that this is exact however steep a head is.

Everything is computed in float32, or float64 for float64 inputs. Products in bfloat16 would not pay: PyTorch rounds
their sums to bfloat16, which makes the error of y half as large again as that of the official kernels, and what they
save on a CPU with matrix units goes into conversions.

Letters in the shapes: b batch, l length, h heads, g groups, e heads of a group, p head size, n state size, c chunks, q
tokens of a chunk. Groups and rows of the batch share no product; in products, r = b g counts both.
"""

import math
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from threading import Barrier
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


# Tokens of a chunk, a power of two: longer chunks cost more in T, shorter ones more in the states.
_CHUNK_SIZE = 64
# Chunks of a segment. Training keeps the state before every segment.
_SEGMENT_CHUNKS = 16
# Heads computed together, of 64 numbers and in chunks of `_CHUNK_SIZE` tokens: as many as stay in the cache. There are
# more of smaller ones, and more rows of the batch where sequences are shorter.
_MAX_HEADS = 16
_MAX_NUMBERS = _MAX_HEADS * 64 * _CHUNK_SIZE
# Steep heads computed together; those of similar steepness need the same boundaries.
_STEEP_HEADS = 4
# Fewer heads are not worth a thread, as every thread computes T once more.
_MIN_HEADS = 4
# Nor are fewer elements of x.
_MIN_ELEMENTS = 2**16
# Float32 has 126 bits on each side of 1; u and v take 60 of them.
_MAX_BITS = 120.0
# Decays of more bits are zero. Denormal numbers, which begin at 126 bits, would slow the products down a hundredfold.
_ZERO_BITS = 110.0

Item = TypeVar("Item")
Result = TypeVar("Result")


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
    limit = min(chunk_size, _CHUNK_SIZE)
    with torch.autocast(x.device.type, enabled=False):
        return _Scan.apply(x, delta, A, B, C, D, states, 2 ** (limit.bit_length() - 1))


@torch.no_grad()
def final_states(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, states: Tensor) -> Tensor:
    """The states after the last token alone, without a gradient: one product per segment, as no token reads them.

    Arguments and result as in `chunk_scan`.
    """
    result = torch.empty_like(states, memory_format=torch.contiguous_format)
    length, step = x.shape[1], _SEGMENT_CHUNKS * _CHUNK_SIZE

    def run(share: _Share) -> None:
        state, A_ = share.take_states(states), share.of_heads(A)
        for start in range(0, length, step):
            segment = _Segment(slice(start, start + step), min(step, length - start))
            x_, delta_ = (segment.chunks(share.of(tensor), A.dtype)[0] for tensor in (x, delta))
            B_ = segment.chunks(share.of_groups(B), A.dtype)[0].flatten(0, 1)
            L = _log_decay(delta_, A_)
            last = L[:, :, -1:]
            v = _decay(last - L).to(A.dtype) * delta_
            state.mul_(_decay(last).to(A.dtype).unsqueeze(-1))
            _rows(state).baddbmm_(B_.mT, _rows(x_ * v.unsqueeze(-1)))
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
                if grad_y_.stride(-1) != 1:  # such as that of a sum, which would be read number by number
                    grad_y_ = grad_y_.contiguous()
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
    """The share of a segment, or some of its heads."""

    x: Tensor  # c b g q e p
    delta: Tensor  # c b g q e
    A: Tensor  # g e
    B: Tensor  # c r q n
    C: Tensor  # c r q n
    T: Tensor  # c r q q
    CB: Tensor  # c b g q 1, the diagonal that T leaves out
    D: Tensor  # c b g q e 1, with Δ C·B: all that a token reads of itself
    L: Tensor  # c b g q e

    @classmethod
    def of(
        cls, share: _Share, segment: _Segment, x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor
    ) -> "_Chunks":
        dtype = A.dtype
        x, delta = (segment.chunks(share.of(tensor), dtype) for tensor in (x, delta))
        B, C = (segment.chunks(share.of_groups(tensor), dtype).flatten(1, 2) for tensor in (B, C))
        A, D = share.of_heads(A), share.of_heads(D)
        scores = C @ B.mT
        CB = scores.diagonal(dim1=2, dim2=3).clone().view(*delta.shape[:4], 1)
        D = torch.addcmul(D.unsqueeze(1), delta, CB).unsqueeze(-1)
        return cls(x, delta, A, B, C, scores.tril_(-1), CB, D, _log_decay(delta, A))

    def of_some(self, heads: Tensor) -> "_Chunks":
        x, delta, D, L = (tensor.index_select(4, heads) for tensor in (self.x, self.delta, self.D, self.L))
        return self._replace(x=x, delta=delta, A=self.A.index_select(1, heads), D=D, L=L)

    def by_steepness(self) -> list[tuple[bool, Tensor]]:
        """Whether some heads are steep, and their indices: all gentle ones, then steep ones of similar steepness."""
        spans, order = _span(self.L).amax(dim=(0, 1, 2)).sort()
        gentle, steep = order.tensor_split([int((spans <= _MAX_BITS).sum())])
        parts = [(False, gentle.sort().values), *((True, heads) for heads in steep.split(_STEEP_HEADS))]
        return [(is_steep, heads) for is_steep, heads in parts if len(heads)]


class _Factors(NamedTuple):
    """The decays in the chunks of gentle heads, as products."""

    u: Tensor  # c b g q e 1
    v: Tensor  # c b g q e 1, without Δ
    enter: Tensor  # b g 1 e 1, the factor 2^m on the state before the segment
    leave: Tensor  # c b g 1 e 1, the factor on the state after each chunk, with 2^m of the next chunk

    @classmethod
    def of(cls, L: Tensor, dtype: torch.dtype) -> "_Factors":
        first, last = L[:, :, :, :1], L[:, :, :, -1:]
        middle = (first + last) / 2
        factors = (L - middle).exp2_(), (middle - L).exp2_(), _decay(middle), (last - middle).exp2_()
        u, v, enter, leave = (factor.to(dtype).unsqueeze(-1) for factor in factors)
        leave[:-1] *= enter[1:]
        return cls(u, v, enter[0], leave)


class _Part(NamedTuple):
    """Parts of a chunk, `size` tokens each. Of a pair the second reads the first; a part alone reads itself."""

    size: int
    pairs: bool

    def readers(self, tensor: Tensor) -> Tensor:
        """`(c, b, g, q, ...)` to `(c, b, g, parts, size, ...)`, a view."""
        return self._split(tensor, 3).select(4, -1)

    def writers(self, tensor: Tensor) -> Tensor:
        """The same of those that are read."""
        return self._split(tensor, 3).select(4, 0)

    def weights(self, T: Tensor) -> Tensor:
        """`(c, r, q, q)` to `(c, r, parts, size, size)`, a view."""
        blocks = self._split(self._split(T, 3), 2)[:, :, :, -1, :, :, 0]
        return blocks.diagonal(dim1=2, dim2=4).movedim(-1, 2)

    def read(self, y: Tensor, x: Tensor, delta: Tensor, T: Tensor, u: Tensor, v: Tensor) -> Tensor:
        """Adds to y what the readers read of the writers, given the decays on both sides in bits."""
        u, v = (_decay(bits).to(x.dtype).unsqueeze(-1) for bits in (u, v))
        written = self.writers(x) * (self.writers(delta) * v)
        read = (self.weights(T) @ _rows(written, 1)).view(written.shape)
        self.readers(y).add_(read * u)
        return y

    def _split(self, tensor: Tensor, dim: int) -> Tensor:
        return tensor.unflatten(dim, (-1, 2 if self.pairs else 1, self.size))


def _log_decay(delta: Tensor, A: Tensor) -> Tensor:
    """L `(..., g, q, e)`, in float64: only its differences count, and float32 would round a long sum too much."""
    return (delta * (A.double().unsqueeze(-2) / math.log(2))).cumsum(dim=-2)


def _span(L: Tensor) -> Tensor:
    return (L[..., 0, :] - L[..., -1, :]).abs()


def _decay(bits: Tensor) -> Tensor:
    return bits.masked_fill(bits < -_ZERO_BITS, -math.inf).exp2_()


def _rows(tensor: Tensor, dim: int = 0) -> Tensor:
    """Merges b and g, which are at `dim`, and the last two, e and p: matrices for a product."""
    return tensor.flatten(-2).flatten(dim, dim + 1)


def _scan_segment(chunks: _Chunks, state: Tensor, y: Tensor) -> None:
    """Writes y `(c, b, g, q, e, p)` and takes the state `(b, g, n, e, p)` to the end of the segment."""
    parts = chunks.by_steepness()
    for is_steep, heads in parts:
        scan = _scan_steep if is_steep else _scan_gentle
        if len(parts) == 1:
            return scan(chunks, state, y)
        some, state_ = chunks.of_some(heads), state.index_select(3, heads)
        y_ = torch.empty_like(some.x)
        scan(some, state_, y_)
        state.index_copy_(3, heads, state_)
        y.index_copy_(4, heads, y_)


def _scan_gentle(chunks: _Chunks, state: Tensor, y: Tensor) -> None:
    """`_scan_segment` of gentle heads."""
    size, (batch, groups, state_size, heads, head_dim) = y.shape[3], state.shape
    factors = _Factors.of(chunks.L, state.dtype)
    sources = state.new_empty(batch, groups, size + state_size, heads, head_dim)
    written, entered = sources[:, :, :size], sources[:, :, size:]
    read = state.new_empty(batch, groups, size, heads, head_dim)
    sources_, written_, entered_, read_ = (_rows(tensor) for tensor in (sources, written, entered, read))
    weights, v = torch.cat([chunks.T, chunks.C], dim=3), factors.v * chunks.delta.unsqueeze(-1)
    torch.mul(state, factors.enter, out=entered)
    for x_, u_, v_, D_, weights_, B_, leave_, y_ in zip(
        chunks.x, factors.u, v, chunks.D, weights, chunks.B.mT, factors.leave, y, strict=True
    ):
        torch.mul(x_, v_, out=written)
        torch.bmm(weights_, sources_, out=read_)
        torch.addcmul(read.mul_(u_), x_, D_, out=y_)
        entered_.baddbmm_(B_, written_)
        entered.mul_(leave_)
    state.copy_(entered)


def _scan_steep(chunks: _Chunks, state: Tensor, y: Tensor) -> None:
    """`_scan_segment` of steep heads."""
    read, last = _read_steep(chunks.x, chunks.delta, chunks.B, chunks.C, chunks.T, chunks.L, state)
    torch.addcmul(read, chunks.x, chunks.D, out=y)
    state.copy_(last)


def _read_steep(
    x: Tensor, delta: Tensor, B: Tensor, C: Tensor, T: Tensor, L: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """y `(c, b, g, q, e, p)` of steep heads without D, and the state after the segment.

    L has a gradient as far as tokens read, none as far as they write, which that of delta gives already.
    """
    dtype, fixed, delta = x.dtype, L.detach(), delta.unsqueeze(-1)

    # The states before all chunks and after the last, from chunk to chunk.
    last = fixed[:, :, :, -1:]
    added = B.mT @ _rows(x * (delta * _decay(last - fixed).to(dtype).unsqueeze(-1)), 1)
    states = []
    for added_, decay in zip(added.view(len(x), *state.shape), _decay(last).to(dtype).unsqueeze(-1), strict=True):
        states.append(state)
        state = torch.addcmul(added_, state, decay)
    y = (C @ _rows(torch.stack(states), 1)).view(x.shape) * _decay(L).to(dtype).unsqueeze(-1)

    # What tokens of a chunk read of each other: the second of two parts the first, until parts may read themselves.
    size = L.shape[3]
    while size > 1 and _span(_Part(size, pairs=False).readers(fixed)).max() > _MAX_BITS:
        size //= 2
        part = _Part(size, pairs=True)
        boundary = part.writers(fixed)[..., -1:, :]
        y = part.read(y, x, delta, T, part.readers(L) - boundary, boundary - part.writers(fixed))
    if size > 1:
        part = _Part(size, pairs=False)
        parts = part.writers(fixed)
        middle = (parts[..., :1, :] + parts[..., -1:, :]) / 2
        y = part.read(y, x, delta, T, part.readers(L) - middle, middle - parts)
    return y, state


class _Gradients(NamedTuple):
    """The gradients of what a segment is computed from."""

    reads: Tensor  # c b g q e, <gradient of y_t, what token t reads of the past>
    writes: Tensor  # c b g q e, <gradient of what token s writes, what it writes>, without Δ
    D: Tensor  # c b g q e
    B: Tensor  # c r q n
    C: Tensor  # c r q n
    T: Tensor  # c r q q
    first: Tensor  # b g n e p, of the state before the segment
    last: Tensor  # b g n e p, the state after the segment itself


def _scan_segment_backward(
    chunks: _Chunks, state: Tensor, grad_y: Tensor, grad_state: Tensor, grad_x: Tensor
) -> tuple[Tensor, ...]:
    """The gradients of `_scan_segment`, given its state and the gradients of y and of the state that it leaves.

    Writes that of x `(c, b, g, q, e, p)`, takes that of the state to the start of the segment, and returns those of
    delta `(c, b, g, q, e)`, A and D `(g, e)`, and B and C `(c, b, g, q, n)`.
    """
    parts = chunks.by_steepness()
    grad_delta, grad_A = torch.empty_like(chunks.delta), torch.empty_like(chunks.A)
    grad_D, shared = torch.empty_like(chunks.A), []
    for is_steep, heads in parts:
        gradients_of = _steep_gradients if is_steep else _gentle_gradients
        if len(parts) == 1:
            gradients = gradients_of(chunks, state, grad_y, grad_state, grad_x)
            return _input_gradients(chunks, state, grad_state, gradients)
        some, grad_y_ = chunks.of_some(heads), grad_y.index_select(4, heads)
        grad_x_ = torch.empty_like(some.x)
        state_, grad_state_ = (tensor.index_select(3, heads) for tensor in (state, grad_state))
        gradients = gradients_of(some, state_, grad_y_, grad_state_, grad_x_)
        grad_delta_, grad_A_, grad_D_, *rest = _input_gradients(some, state_, grad_state_, gradients)
        shared.append(rest)
        grad_x.index_copy_(4, heads, grad_x_)
        grad_state.index_copy_(3, heads, grad_state_)
        grad_delta.index_copy_(4, heads, grad_delta_)
        grad_A.index_copy_(1, heads, grad_A_)
        grad_D.index_copy_(1, heads, grad_D_)
    grad_B, grad_C = (torch.stack(grads).sum(dim=0) for grads in zip(*shared, strict=True))
    return grad_delta, grad_A, grad_D, grad_B, grad_C


def _gentle_gradients(
    chunks: _Chunks, state: Tensor, grad_y: Tensor, grad_state: Tensor, grad_x: Tensor
) -> _Gradients:
    """Those of gentle heads; writes that of x."""
    size, (batch, groups, state_size, heads, head_dim) = grad_y.shape[3], state.shape
    factors = _Factors.of(chunks.L, state.dtype)
    sources = state.new_empty(len(grad_y), batch, groups, size + state_size, heads, head_dim)
    written, entered = sources[:, :, :, :size], sources[:, :, :, size:]
    v = factors.v * chunks.delta.unsqueeze(-1)
    torch.mul(chunks.x, v, out=written)
    last = state * factors.enter
    for c, (written_, B_, leave_) in enumerate(zip(_rows(written, 1), chunks.B.mT, factors.leave, strict=True)):
        entered[c] = last
        _rows(last).baddbmm_(B_, written_)
        last.mul_(leave_)

    grads = torch.empty_like(sources[0])
    grad_read, grad_left = grads[:, :, :size], grads[:, :, size:]
    grad_written, product = (state.new_empty(grad_read.shape) for _ in range(2))
    weights, transposed = torch.cat([chunks.T, chunks.C], 3), torch.cat([chunks.T.mT, chunks.B], 3)
    per_head = state.new_empty(batch * groups * heads, size, size + state_size)
    grad_weights, grad_B = torch.empty_like(weights), torch.empty_like(chunks.B)
    reads, writes, grad_D = (torch.empty_like(chunks.delta) for _ in range(3))
    grad_left.copy_(grad_state)
    for c in reversed(range(len(grad_y))):
        x_, grad_y_ = chunks.x[c], grad_y[c]
        grad_left.mul_(factors.leave[c])
        torch.mul(grad_y_, factors.u[c], out=grad_read)
        torch.bmm(transposed[c], _rows(grads), out=_rows(grad_written))
        torch.bmm(_rows(written[c]), _rows(grad_left).mT, out=grad_B[c])
        # What each head's tokens read, times its gradient: summed over heads, and weighted and summed over sources.
        torch.bmm(
            grad_read.transpose(2, 3).flatten(0, 2), sources[c].permute(0, 1, 3, 4, 2).flatten(0, 2), out=per_head
        )
        by_head = per_head.view(batch * groups, heads, size, -1)
        torch.sum(by_head, dim=1, out=grad_weights[c])
        reads[c] = by_head.mul_(weights[c].unsqueeze(1)).sum(dim=-1).mT.view(reads[c].shape)
        writes[c] = torch.mul(x_, grad_written, out=product).sum(dim=-1)
        grad_D[c] = torch.mul(x_, grad_y_, out=product).sum(dim=-1)
        torch.addcmul(grad_written.mul_(v[c]), grad_y_, chunks.D[c], out=grad_x[c])
        _rows(grad_left).baddbmm_(chunks.C[c].mT, _rows(grad_read))
    grad_T, grad_C = grad_weights.split([size, state_size], dim=3)
    writes = writes.mul_(factors.v.squeeze(-1))
    return _Gradients(reads, writes, grad_D, grad_B, grad_C, grad_T, grad_left * factors.enter, last)


def _steep_gradients(chunks: _Chunks, state: Tensor, grad_y: Tensor, grad_state: Tensor, grad_x: Tensor) -> _Gradients:
    """Those of steep heads; writes that of x."""
    x, delta, L = chunks.x, chunks.delta, chunks.L
    with torch.enable_grad():
        inputs = [t.detach().requires_grad_() for t in (x, delta, chunks.B, chunks.C, chunks.T, L, state)]
        read, last = _read_steep(*inputs)
    grad_read_x, writes, grad_B, grad_C, grad_T, grad_L, first = torch.autograd.grad(
        (read, last), inputs, (grad_y, grad_state)
    )
    torch.addcmul(grad_read_x, grad_y, chunks.D, out=grad_x)
    reads, grad_D = (grad_L / math.log(2)).to(writes.dtype), (x * grad_y).sum(dim=-1)
    return _Gradients(reads, writes, grad_D, grad_B, grad_C, grad_T, first, last.detach())


def _input_gradients(chunks: _Chunks, state: Tensor, grad_state: Tensor, gradients: _Gradients) -> tuple[Tensor, ...]:
    """The gradients of delta, A, D, B and C; takes that of the state to the start of the segment."""
    A, grad_D = chunks.A.unsqueeze(1), gradients.D
    ends = (state * gradients.first).sum(dim=(2, 4)), (gradients.last * grad_state).sum(dim=(2, 4))
    grad_state.copy_(gradients.first)
    grad_scores = gradients.T.tril(-1)
    grad_scores.diagonal(dim1=2, dim2=3).copy_((grad_D * chunks.delta).sum(dim=-1).flatten(1, 2))
    grad_B = gradients.B + grad_scores.mT @ chunks.C
    grad_C = gradients.C + grad_scores @ chunks.B
    reads, writes = (t.permute(1, 2, 4, 0, 3).flatten(3) for t in (gradients.reads, gradients.writes * chunks.delta))
    grad_log = _passing_tokens(reads, writes, *ends)
    grad_log = grad_log.unflatten(3, (-1, grad_D.shape[3])).permute(3, 0, 1, 4, 2).to(A.dtype)
    grad_log = grad_log.masked_fill(chunks.delta * A < -_ZERO_BITS * math.log(2), 0)  # of a decay that is zero
    grad_delta = gradients.writes + grad_D * chunks.CB + grad_log * A
    grad_A = (grad_log * chunks.delta).sum(dim=(0, 1, 3))
    grad_B, grad_C = (grad.unflatten(1, tuple(grad_D.shape[1:3])) for grad in (grad_B, grad_C))
    return grad_delta, grad_A, grad_D.sum(dim=(0, 1, 3)), grad_B, grad_C


def _passing_tokens(reads: Tensor, writes: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """What passes each token, which is the gradient of the logarithm of its decay: `(b, g, e, tokens)`.

    This is what the token and later ones in its segment read, less what they wrote, plus what passes the end of the
    segment. It is also what passes the start, plus what earlier tokens wrote, less what they read. The terms may be
    much larger than their sum, so each token takes the way with the smaller terms.
    """
    start, end = start.unsqueeze(-1), end.unsqueeze(-1)
    change, size = (reads - writes).double(), (reads.abs() + writes.abs()).double()
    before, size_before = change.cumsum(dim=-1) - change, size.cumsum(dim=-1) - size
    earlier, later = start - before, end + change.sum(dim=-1, keepdim=True) - before
    earlier_size, later_size = start.abs() + size_before, end.abs() + size.sum(dim=-1, keepdim=True) - size_before
    return torch.where(earlier_size < later_size, earlier, later)


def _shares(x: Tensor, B: Tensor) -> list[_Share]:
    batch, length, heads, head_dim = x.shape
    groups = B.shape[2]
    chunk_size = min(_CHUNK_SIZE, 2 ** (length - 1).bit_length())
    in_group, limit = heads // groups, max(_MAX_HEADS, _MAX_NUMBERS // (chunk_size * head_dim))
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
        torch.get_num_threads()  # a thread takes over the number of the others when it first asks for it
        torch.set_num_threads(1)
        started.wait()

    threads = ThreadPoolExecutor(count, "mambamia-scan")
    try:
        for _ in range(count):
            threads.submit(start)
        started.wait()
    finally:
        started.abort()  # after Ctrl-C too, no thread waits for ever
        # With OpenMP the number counts for the calling thread alone, and for threads that are new to PyTorch.
        torch.set_num_threads(count)
    return threads
