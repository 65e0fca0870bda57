"""The GPU's engine of the SSD scan, which runs on any device: exact at any steepness, however it is divided."""

import pytest
import torch
from scans import KINDS, assert_near, outputs_and_gradients, recurrence, scan_inputs, steepness_inputs

from mambamia_hf import ssd_gpu


def chunk_scan(dt: torch.Tensor, initial_states: torch.Tensor, chunk_size: int = 64, **inputs: torch.Tensor):
    """Δ itself as dt, within its limits as `ssd_chunk_scan` has it."""
    delta = dt.clamp(0.0, float("inf"))
    return ssd_gpu.chunk_scan(**inputs, delta=delta, states=initial_states, chunk_size=chunk_size)


@pytest.fixture(params=[1, 2**27], ids=["segments of a chunk", "one segment"])
def segments(request, monkeypatch):
    monkeypatch.setattr(ssd_gpu, "_SEGMENT_ELEMENTS", request.param)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 3e-5)])
def test_exact_at_any_steepness(kind, dtype, tolerance, segments):
    inputs = steepness_inputs(kind)
    actual = outputs_and_gradients(chunk_scan, inputs, dtype)
    assert_near(actual, outputs_and_gradients(recurrence, inputs, torch.float64), tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_final_states_at_any_steepness(kind, segments):
    inputs = {name: tensor.float() for name, tensor in steepness_inputs(kind).items()}
    states = ssd_gpu.final_states(*(inputs[name] for name in ("x", "dt", "A", "B", "initial_states")))
    _, expected = recurrence(**{name: tensor.double() for name, tensor in inputs.items()})
    assert_near({"states": states}, {"states": expected}, 1e-6)


@pytest.mark.parametrize("length", [1, 7, 8, 37, 64])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_equals_recurrence(length, groups, segments):
    inputs = scan_inputs(length=length, groups=groups)
    inputs["dt"] = (inputs.pop("dt_bias") + inputs["dt"]).exp()
    actual = chunk_scan(**inputs, chunk_size=8)
    for tensor, expected in zip(actual, recurrence(**inputs), strict=True):
        torch.testing.assert_close(tensor, expected)


def test_gradcheck(monkeypatch):
    monkeypatch.setattr(ssd_gpu, "_MAX_BITS", 8.0)  # one head of the four is steep
    inputs = scan_inputs(batch=1, length=11, head_dim=2, state=3, grad=True)
    inputs["dt"] = inputs["dt"].detach().sigmoid().requires_grad_()
    names = ("x", "dt", "A", "B", "C", "D", "initial_states")
    tensors = tuple(inputs[name] for name in names)
    assert torch.autograd.gradcheck(
        lambda *args: chunk_scan(**dict(zip(names, args, strict=True)), chunk_size=4), tensors
    )


def test_bfloat16_products_add_up_in_float32():
    inputs = scan_inputs(batch=1, length=700, heads=8, head_dim=64, groups=1, state=128, dtype=torch.float32)
    half = {name: inputs[name].bfloat16() for name in "xBC"}
    dt = torch.nn.functional.softplus(inputs["dt"] + inputs.pop("dt_bias") - 4)
    inputs = {**inputs, **half, "dt": dt}
    y, states = chunk_scan(**inputs)
    expected, expected_states = recurrence(**{name: tensor.double() for name, tensor in inputs.items()})
    assert y.dtype == torch.bfloat16 and states.dtype == torch.float32
    assert_near({"y": y, "states": states}, {"y": expected, "states": expected_states}, 5e-3)
