"""Inputs of the SSD scan, and the recurrence as it is defined, for the tests of its engines."""

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


def step_sizes(kind: str, batch: int, length: int, heads: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    uniform, chance = torch.rand(2, batch, length, heads, generator=generator, dtype=torch.float64)
    return {
        "typical": 10 ** (3 * uniform - 3),
        "1e-6 to 1e3": 10 ** (9 * uniform - 6),
        "all tiny": torch.full_like(uniform, 1e-6),
        "all huge": torch.full_like(uniform, 1e3),
        "all equal": torch.full_like(uniform, 0.1),
        "zero": torch.zeros_like(uniform),
        "mostly zero": 10 ** (4 * uniform - 2) * (chance > 0.9),
        "resets": torch.where(chance[..., :1] > 0.9, 1e3, 1e-3).expand_as(uniform),
        "per head": torch.logspace(-6, 3, heads, dtype=torch.float64).flip(0).expand_as(uniform),
    }[kind].clone()


KINDS = ["typical", "1e-6 to 1e3", "all tiny", "all huge", "all equal", "zero", "mostly zero", "resets", "per head"]


def steepness_inputs(kind: str) -> dict[str, torch.Tensor]:
    """A from -1e-3 to -64, 200 tokens: three chunks of the engine and a part of one."""
    inputs = scan_inputs(length=200, heads=8, groups=2, state=16)
    del inputs["dt_bias"]
    inputs["A"] = -torch.logspace(-3, 1.80618, 8, dtype=torch.float64)
    return {**inputs, "dt": step_sizes(kind, 2, 200, 8)}


def outputs_and_gradients(scan, inputs: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    inputs = {name: tensor.detach().to(dtype).requires_grad_() for name, tensor in inputs.items()}
    y, state = scan(**inputs)
    weights = torch.linspace(0, 50, y.numel(), dtype=torch.float64).sin().view_as(y).to(y.dtype)
    gradients = torch.autograd.grad((y * weights).sum() + state.square().sum(), list(inputs.values()))
    return {"y": y.detach(), "state": state.detach(), **dict(zip(inputs, gradients, strict=True))}


def assert_near(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float):
    for name, tensor in expected.items():
        assert torch.isfinite(actual[name]).all(), f"{name} is not finite"
        error = (actual[name].double() - tensor.double()).norm()
        assert error <= tolerance * tensor.double().norm(), f"{name} is off by {error / tensor.double().norm():.1e}"
