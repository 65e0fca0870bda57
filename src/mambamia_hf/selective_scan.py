"""The state-space scan of Mamba-1 (Gu and Dao 2023), as a pure function.

As in `ssd.py`, the official kernels run on CUDA where they can be imported, and PyTorch everywhere else.

Letters in the shapes: b batch, l length, d channels, n state size, c chunks, q tokens of a chunk.
"""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.integrations import use_kernel_func_from_hub_with_fallback


# Tokens of a chunk are computed one after the other, all chunks of a segment at once.
_CHUNK_SIZE = 32
# Elements of the states of a segment's chunks, which are held together.
_SEGMENT_ELEMENTS = {"cpu": 2**20, "cuda": 2**26}


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
) -> Tensor:
    r"""$h_t = e^{\Delta_t A} h_{t-1} + \Delta_t B_t u_t$, $y_t = C_t h_t + D u_t$, with n states per channel.

    Time is linear in the length. The PyTorch engine holds one segment of the sequence at a time, which its backward
    computes again. It computes in float32, or float64 for float64 inputs.

    Args:
        u: `(b, l, d)`.
        delta: `(b, l, d)`, the step size Δ, after bias and softplus.
        A: `(d, n)`, negative.
        B: `(b, l, n)`.
        C: `(b, l, n)`.
        D: `(d,)`, the skip connection.

    Returns:
        `(b, l, d)` in the type of u.
    """
    if u.is_cuda:
        channels_first = (tensor.transpose(1, 2).contiguous() for tensor in (u, delta.to(u.dtype)))
        return _kernel_selective_scan(*channels_first, A, B.mT.contiguous(), C.mT.contiguous(), D.float()).mT
    return _torch_selective_scan(u.mT, delta.mT, A, B.mT, C.mT, D).mT


def _torch_selective_scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    dtype = torch.promote_types(u.dtype, torch.float32)
    tokenwise = [tensor.mT.to(dtype) for tensor in (u, delta, B, C)]
    state = u.new_zeros(u.shape[0], *A.shape, dtype=dtype)
    budget = _SEGMENT_ELEMENTS.get(u.device.type, _SEGMENT_ELEMENTS["cuda"])
    segment_length = _CHUNK_SIZE * max(1, budget // state.numel())
    outputs = []
    for segment in zip(*(tensor.split(segment_length, dim=1) for tensor in tokenwise), strict=True):
        y, state = checkpoint(_scan_segment, *segment, A.to(dtype), state, use_reentrant=False)
        outputs.append(y)
    y = torch.cat(outputs, dim=1) + tokenwise[0] * D.to(dtype)
    return y.to(u.dtype).mT


# On a GPU: the Hub's kernels if the model was loaded with `use_kernels=True`, else installed packages, else PyTorch.
_kernel_selective_scan = use_kernel_func_from_hub_with_fallback("selective_scan_fn", "mamba_ssm")(
    _torch_selective_scan
)


def _scan_segment(u: Tensor, delta: Tensor, B: Tensor, C: Tensor, A: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """From the state `(b, d, n)` before the segment: y `(b, l, d)` without the skip, and the state after it.

    Each chunk is scanned twice: from zero, which gives what it adds to the state, and from the state that enters it.
    """
    length = u.shape[1]
    padding = -length % _CHUNK_SIZE  # a step of size zero neither decays the state nor adds to it
    u, delta, B, C = (
        nn.functional.pad(tensor, (0, 0, 0, padding)).unflatten(1, (-1, _CHUNK_SIZE)) for tensor in (u, delta, B, C)
    )  # b c q ...

    def scan_chunks(states: Tensor) -> tuple[Tensor, Tensor]:
        """From the states `(b, c, d, n)` that enter the chunks: y `(b, c, q, d)` and the states that leave them."""
        y = []
        for t in range(_CHUNK_SIZE):
            step = delta[:, :, t, :, None]
            states = states * (step * A).exp() + step * u[:, :, t, :, None] * B[:, :, t, None]
            y.append((states @ C[:, :, t, :, None]).squeeze(-1))
        return torch.stack(y, dim=2), states

    _, added = scan_chunks(torch.zeros_like(state)[:, None].expand(-1, u.shape[1], -1, -1))
    decay = (delta.sum(dim=2).unsqueeze(-1) * A).exp()
    entering = []
    for chunk in range(u.shape[1]):
        entering.append(state)
        state = state * decay[:, chunk] + added[:, chunk]
    y, _ = scan_chunks(torch.stack(entering, dim=1))
    return y.flatten(1, 2)[:, :length], state
