import pytest
import torch

from mambamia_hf import selective_scan as module
from mambamia_hf.selective_scan import selective_scan


def scan_inputs(batch=2, length=37, channels=4, state=3, dtype=torch.float64, grad=False):
    generator = torch.Generator().manual_seed(length)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    inputs = [
        draw(batch, length, channels),
        draw(batch, length, channels).abs(),
        -draw(channels, state).abs(),
        draw(batch, length, state),
        draw(batch, length, state),
        draw(channels),
    ]
    return [tensor.requires_grad_(grad) for tensor in inputs]


def recurrence(u, delta, A, B, C, D):
    """The scan as it is defined, one token after the other."""
    state, y = u.new_zeros(u.shape[0], *A.shape), []
    for t in range(u.shape[1]):
        step = delta[:, t, :, None]
        state = state * (step * A).exp() + step * B[:, t, None] * u[:, t, :, None]
        y.append((state * C[:, t, None]).sum(-1) + D * u[:, t])
    return torch.stack(y, dim=1)


@pytest.mark.parametrize("length", [1, 31, 32, 37, 200])
@pytest.mark.parametrize("segment_elements", [1, 2**20])
def test_equals_recurrence(length, segment_elements, monkeypatch):
    monkeypatch.setitem(module._SEGMENT_ELEMENTS, "cpu", segment_elements)
    inputs = scan_inputs(length=length)
    torch.testing.assert_close(selective_scan(*inputs), recurrence(*inputs))


@pytest.mark.parametrize("segment_elements", [1, 2**20])
def test_gradient_equals_recurrence(segment_elements, monkeypatch):
    monkeypatch.setitem(module._SEGMENT_ELEMENTS, "cpu", segment_elements)
    ours, theirs = scan_inputs(length=70, grad=True), scan_inputs(length=70, grad=True)
    selective_scan(*ours).square().sum().backward()
    recurrence(*theirs).square().sum().backward()
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our.grad, their.grad)


def test_half_precision_keeps_float32_inside():
    half = [tensor.bfloat16() for tensor in scan_inputs()]
    y = selective_scan(*half)
    assert y.dtype == torch.bfloat16
    expected = recurrence(*(tensor.double() for tensor in half))
    torch.testing.assert_close(y.double(), expected, atol=2e-2, rtol=1e-2)  # one rounding of the output to 8 bits


def test_decay_that_underflows_is_finite():
    inputs = scan_inputs(dtype=torch.float32, grad=True)
    y = selective_scan(inputs[0], inputs[1] + 1e4, *inputs[2:])
    y.sum().backward()
    assert torch.isfinite(y).all() and all(torch.isfinite(tensor.grad).all() for tensor in inputs)
