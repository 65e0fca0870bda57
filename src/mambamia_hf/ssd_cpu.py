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
                for heads, chunks in _Chunks.of(share, segment, *tensors).by_steepness():
                    some_state, some_y = heads.take(state), heads.take(y_)
                    _scan_segment(chunks, some_state, some_y)
                    heads.put(some_state, state)
                    heads.put(some_y, y_)
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
                share, state, grad_state = ctx.shares[index], kept[index * steps + step], grad_states[index]
                grad_y_, grad_x_ = (segment.chunks(share.of(tensor), dtype) for tensor in (grad_y, grad_x))
                grad_delta_ = segment.chunks(share.of(grad_delta), dtype)
                grad_A_, grad_D_ = (torch.empty_like(share.of_heads(tensor)) for tensor in (A, D))
                grad_B_ = grad_C_ = 0
                for heads, chunks in _Chunks.of(share, segment, *tensors).by_steepness():
                    some_state = heads.take(grad_state)
                    grads = _scan_segment_backward(chunks, heads.take(state), heads.take(grad_y_), some_state)
                    heads.put(some_state, grad_state)
                    heads.put(grads[0], grad_x_)
                    for grad, target in zip(grads[1:4], (grad_delta_, grad_A_, grad_D_), strict=True):
                        heads.put(grad.unsqueeze(-1), target.unsqueeze(-1))
                    grad_B_, grad_C_ = grad_B_ + grads[4], grad_C_ + grads[5]
                segment.put(grad_x_, share.of(grad_x))
                segment.put(grad_delta_, share.of(grad_delta))
                return grad_A_, grad_D_, grad_B_, grad_C_

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


class _Heads(NamedTuple):
    """Some heads of a share, or all where there is no index."""

    index: Tensor | None

    def take(self, tensor: Tensor, dim: int = -2) -> Tensor:
        """From a tensor with e at `dim`: a copy, or the tensor itself where all heads are meant."""
        return tensor if self.index is None else tensor.index_select(dim, self.index)

    def put(self, some: Tensor, tensor: Tensor) -> None:
        """The way back, into a tensor `(..., e, p)`."""
        if self.index is not None:
            tensor.index_copy_(-2, self.index, some)
        elif some is not tensor:
            tensor.copy_(some)


class _Chunks(NamedTuple):
    """The share of a segment."""

    x: Tensor  # c b g q e p
    delta: Tensor  # c b g q e
    A: Tensor  # g e
    B: Tensor  # c r q n
    C: Tensor  # c r q n
    T: Tensor  # c r q q
    CB: Tensor  # c b g q 1, the diagonal that T leaves out
    D: Tensor  # c b g q e 1, with Δ C·B: all that a token reads of itself
    L: Tensor  # c b g q e
    size: int  # of the parts of a chunk in which L spans at most _MAX_BITS

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
        return cls(x, delta, A, B, C, scores.tril_(-1), CB, D, _log_decay(delta, A), segment.chunk_size)

    def by_steepness(self) -> Iterator[tuple[_Heads, "_Chunks"]]:
        """The heads whose chunks stay whole, and apart from them, a few of similar steepness together, the others."""
        spans = (self.L[:, :, :, 0] - self.L[:, :, :, -1]).abs().amax(dim=(0, 1, 2))
        order = spans.argsort()
        whole = int((spans <= _MAX_BITS).sum())
        if whole == len(spans):
            yield _Heads(None), self
            return
        some = _DIVIDED_HEADS.get(self.x.device.type, _DIVIDED_HEADS["cuda"])
        for index in (order[:whole], *order[whole:].split(some)):
            if len(index):
                heads = _Heads(index.sort().values)
                x, delta, D = heads.take(self.x), heads.take(self.delta, -1), heads.take(self.D)
                A, L = heads.take(self.A, -1), heads.take(self.L, -1)
                yield heads, self._replace(x=x, delta=delta, A=A, D=D, L=L, size=_factorised_size(L))

    @property
    def whole(self) -> bool:
        """Whether a chunk is not divided, so that tokens read it and the state before it in one product."""
        return self.size == self.x.shape[3]

    def decays(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """u and v without Δ `(c, b, g, q, e, 1)`, the factor on the state that enters the segment `(b, g, 1, e, 1)`,
        and the factors on it from chunk to chunk `(c, b, g, 1, e, 1)`.
        """
        first, last = self.L[:, :, :, :1], self.L[:, :, :, -1:]
        if self.whole:  # the state is kept as 2^m S
            middle = (first + last) / 2
            enter, leave = _decay(middle), (last - middle).exp2()
            leave[:-1] *= enter[1:]
            decays = (self.L - middle).exp2(), (middle - self.L).exp2(), enter[0], leave
        else:
            decays = _decay(self.L), _decay(last - self.L), torch.ones_like(last[0]), _decay(last)
        u, v, enter, carry = (decay.to(self.x.dtype).unsqueeze(-1) for decay in decays)
        return u, v, enter, carry

    def reads(self) -> Iterator[tuple["_Part", Tensor, Tensor]]:
        """How tokens of a chunk that is divided read each other: which, u, and v without Δ."""
        size = self.x.shape[3] // 2
        while size >= self.size:
            part = _Part(size, 2)
            reader, writer = part.readers(self.L), part.writers(self.L)
            boundary = writer[..., -1:, :]
            yield (
                part,
                *(_decay(bits).to(self.x.dtype).unsqueeze(-1) for bits in (reader - boundary, boundary - writer)),
            )
            size //= 2
        if 1 < self.size < self.x.shape[3]:
            part = _Part(self.size, 1)
            L = part.readers(self.L)
            middle = (L[..., :1, :] + L[..., -1:, :]) / 2
            yield part, *(bits.exp2().to(self.x.dtype).unsqueeze(-1) for bits in (L - middle, middle - L))


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


def _factorised_size(L: Tensor) -> int:
    """The largest parts of a chunk, by halves, in which L `(c, b, g, q, e)` spans at most `_MAX_BITS` everywhere."""
    size = L.shape[3]
    while size > 1:
        parts = L.unflatten(3, (-1, size))
        if (parts[..., 0, :] - parts[..., -1, :]).abs().max() <= _MAX_BITS:
            break
        size //= 2
    return size


def _rows(tensor: Tensor, dim: int = 0) -> Tensor:
    """Merges b and g, which are at `dim`, and the last two, e and p: matrices for a product."""
    return tensor.flatten(-2).flatten(dim, dim + 1)


def _advance(chunks: _Chunks, c: int, written: Tensor, carry: Tensor, state: Tensor) -> None:
    """Takes the state `(b, g, n, e, p)` through chunk c, whose tokens write v ⊙ x `(b, g, q, e, p)` to it."""
    if not chunks.whole:
        state.mul_(carry[c])
    _rows(state).baddbmm_(chunks.B[c].mT, _rows(written))
    if chunks.whole:
        state.mul_(carry[c])


def _scan_segment(chunks: _Chunks, state: Tensor, y: Tensor) -> None:
    """Writes y `(c, b, g, q, e, p)` and takes the state `(b, g, n, e, p)` to the end of the segment."""
    u, v, enter, carry = chunks.decays()
    v = v * chunks.delta.unsqueeze(-1)
    size, sizes = chunks.x.shape[3], list(state.shape)
    sources = state.new_empty(*sizes[:2], size + sizes[2], *sizes[3:])
    written, entered = sources[:, :, :size], sources[:, :, size:]
    read = torch.empty_like(written, memory_format=torch.contiguous_format)
    weights, read_from = (torch.cat([chunks.T, chunks.C], 3), sources) if chunks.whole else (chunks.C, entered)
    torch.mul(state, enter, out=entered)
    for c in range(len(y)):
        torch.mul(chunks.x[c], v[c], out=written)
        torch.bmm(weights[c], _rows(read_from), out=_rows(read))
        torch.mul(chunks.x[c], chunks.D[c], out=y[c]).addcmul_(read, u[c])
        _advance(chunks, c, written, carry, entered)
    state.copy_(entered)

    for part, u, v in chunks.reads():
        written = part.writers(chunks.x) * (part.writers(chunks.delta).unsqueeze(-1) * v)
        read = part.weights(chunks.T) @ _rows(written, 1)
        part.readers(y).addcmul_(read.view(written.shape), u)


def _scan_segment_backward(
    chunks: _Chunks, state: Tensor, grad_y: Tensor, grad_state: Tensor
) -> tuple[Tensor, ...]:
    """The gradients of `_scan_segment`, given its state and the gradients of y and of the state that it leaves.

    Takes the gradient of the state to the start of the segment, and returns those of x `(c, b, g, q, e, p)`, delta
    `(c, b, g, q, e)`, A and D `(g, e)`, and B and C `(c, b, g, q, n)`.
    """
    grad_x = torch.empty_like(chunks.x)
    u, v, enter, carry = chunks.decays()
    delta, size, sizes = chunks.delta.unsqueeze(-1), chunks.x.shape[3], list(state.shape)
    v_delta = v * delta
    sources = state.new_empty(len(u), *sizes[:2], size + sizes[2], *sizes[3:])
    written, entered = sources[:, :, :, :size], sources[:, :, :, size:]
    torch.mul(chunks.x, v_delta, out=written)
    state = state * enter
    for c in range(len(u)):
        entered[c] = state
        _advance(chunks, c, written[c], carry, state)
    crossing = (state * grad_state).sum(dim=(2, 4), dtype=torch.float64)  # b g e: what passes the end of the segment

    grads = torch.empty_like(sources[0])
    grad_read, grad_left = grads[:, :, :size], grads[:, :, size:]
    grad_written = torch.empty_like(grad_read, memory_format=torch.contiguous_format)
    grad_left.copy_(grad_state)
    if chunks.whole:
        weights, transposed = torch.cat([chunks.T, chunks.C], 3), torch.cat([chunks.T.mT, chunks.B], 3)
        read_from, grads_from = sources, grads
    else:
        weights, transposed, read_from, grads_from = chunks.C, chunks.B, entered, grad_left
    grad_weights, grad_B = torch.empty_like(weights), torch.empty_like(chunks.B)
    reads, writes = torch.empty_like(chunks.delta), torch.empty_like(chunks.delta)
    for c in reversed(range(len(u))):
        if chunks.whole:
            grad_left.mul_(carry[c])
        torch.mul(grad_y[c], u[c], out=grad_read)
        torch.bmm(transposed[c], _rows(grads_from), out=_rows(grad_written))
        torch.bmm(_rows(written[c]), _rows(grad_left).mT, out=grad_B[c])
        per_head = grad_read.transpose(2, 3) @ read_from[c].permute(0, 1, 3, 4, 2)  # b g e q and what is read
        torch.sum(per_head.flatten(0, 1), dim=1, out=grad_weights[c])
        reads[c] = per_head.mul_(weights[c].view(*sizes[:2], 1, size, -1)).sum(dim=-1).transpose(2, 3)
        if not chunks.whole:
            grad_left.mul_(carry[c])
        _rows(grad_left).baddbmm_(chunks.C[c].mT, _rows(grad_read))
        writes[c] = (chunks.x[c] * grad_written).sum(dim=-1)
        torch.mul(grad_y[c], chunks.D[c], out=grad_x[c]).addcmul_(grad_written, v_delta[c])
    torch.mul(grad_left, enter, out=grad_state)

    writes.mul_(v.squeeze(-1))
    if chunks.whole:
        grad_T, grad_C = grad_weights.split([size, sizes[2]], dim=3)
    else:
        grad_T, grad_C = torch.zeros_like(chunks.T), grad_weights
    for part, u, v in chunks.reads():
        x, written = part.writers(chunks.x), part.writers(chunks.x) * (v_part := v * part.writers(delta))
        grad_read, T = part.readers(grad_y) * u, part.weights(chunks.T)
        read = (T @ _rows(written, 1)).view(written.shape)
        grad_written = (T.mT @ _rows(grad_read, 1)).view(written.shape)
        part.weights(grad_T).copy_(_rows(grad_read, 1) @ _rows(written, 1).mT)
        part.readers(reads).add_((grad_read * read).sum(dim=-1))
        part.writers(writes).add_((x * grad_written).sum(dim=-1) * v.squeeze(-1))
        part.writers(grad_x).addcmul_(grad_written, v_part)

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
    grad_B, grad_C = (grad.unflatten(1, tuple(sizes[:2])) for grad in (grad_B, grad_C))
    return grad_x, grad_delta, grad_A, itself.sum(dim=(0, 1, 3)), grad_B, grad_C


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
