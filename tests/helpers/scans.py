"""Inputs of the SSD scan, and the recurrence as it is defined, for test_ssd.py and test_ssd_cpu.py."""

import torch
from torch import Tensor
from torch.nn.functional import softplus


def scan_inputs(
    batch: int = 2,
    length: int = 37,
    heads: int = 4,
    head_dim: int = 8,
    groups: int = 2,
    state: int = 6,
    dtype: torch.dtype = torch.float64,
    grad: bool = False,
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(length)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(grad)

    return {
        "x": draw(batch, length, heads, head_dim),
        "dt": draw(batch, length, heads),
        "A": (-torch.linspace(0.5, 8, heads, dtype=dtype)).requires_grad_(grad),
        "B": draw(batch, length, groups, state),
        "C": draw(batch, length, groups, state),
        "D": draw(heads),
        "dt_bias": draw(heads),
        "initial_states": draw(batch, heads, head_dim, state),
    }


def recurrence(
    x, dt, A, B, C, D=None, dt_bias=None, initial_states=None, dt_softplus=False, dt_limit=(0.0, float("inf"))
):
    """The scan as it is defined, one token after the other."""
    batch, length, heads, head_dim = x.shape
    dt = dt if dt_bias is None else dt + dt_bias
    dt = (softplus(dt) if dt_softplus else dt).clamp(*dt_limit)
    B, C = (tensor.repeat_interleave(heads // tensor.shape[2], dim=2) for tensor in (B, C))
    state = x.new_zeros(batch, heads, head_dim, B.shape[-1]) if initial_states is None else initial_states
    y = []
    for t in range(length):
        decay = torch.exp(dt[:, t] * A)[..., None, None]
        state = state * decay + (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None]
        y.append((state * C[:, t, :, None]).sum(-1))
    y = torch.stack(y, dim=1)
    return (y if D is None else y + x * D.reshape(heads, -1)), state
