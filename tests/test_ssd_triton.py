"""The scan's Triton kernels, interpreted on a CPU: exact at any steepness, from either end, however it is divided."""

from functools import partial

import pytest
import torch
from scans import KINDS, assert_near, outputs_and_gradients, recurrence, scan_inputs, steepness_inputs
from triton_on_cpu import interpreted, stand_in_for_the_gpu

from mambamia_hf import ssd_triton


pytestmark = interpreted


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Sequences of some tokens have several chunks, parts, and groups of parts."""
    stand_in_for_the_gpu()
    monkeypatch.setattr(ssd_triton, "CHUNK_SIZE", 16)
    monkeypatch.setattr(ssd_triton, "CHUNKS_OF_PART", 2)
    monkeypatch.setattr(ssd_triton, "_PARTS_OF_GRADIENT", 2)


def chunk_scan(dt: torch.Tensor, initial_states: torch.Tensor, reverse: bool = False, **inputs: torch.Tensor):
    delta = dt.clamp(0.0, float("inf"))  # as `ssd_chunk_scan` has it
    return ssd_triton.chunk_scan(**inputs, delta=delta, states=initial_states, reverse=reverse)


def reversed_recurrence(x, dt, B, C, **inputs):
    x, dt, B, C = (tensor.flip(1) for tensor in (x, dt, B, C))
    y, states = recurrence(x, dt, B=B, C=C, **inputs)
    return y.flip(1), states


@pytest.mark.parametrize("kind", KINDS)
def test_exact_at_any_steepness(kind):
    inputs = {
        name: tensor[:1, :70] if name in ("x", "dt", "B", "C") else tensor
        for name, tensor in steepness_inputs(kind).items()
    }
    inputs["initial_states"] = inputs["initial_states"][:1]
    actual = outputs_and_gradients(chunk_scan, inputs, torch.float32)
    assert_near(actual, outputs_and_gradients(recurrence, inputs, torch.float64), 1e-4)


def positive_steps(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    inputs["dt"] = torch.nn.functional.softplus(inputs["dt"] + inputs.pop("dt_bias") - 1)
    return inputs


@pytest.mark.parametrize(("length", "groups"), [(1, 2), (16, 1), (70, 2)])
def test_from_either_end(length, groups):
    inputs = positive_steps(scan_inputs(length=length, groups=groups))
    for scan, expected in (
        (chunk_scan, recurrence),
        (partial(chunk_scan, reverse=True), reversed_recurrence),
    ):
        actual = outputs_and_gradients(scan, inputs, torch.float32)
        assert_near(actual, outputs_and_gradients(expected, inputs, torch.float64), 3e-5)


@pytest.mark.parametrize("reverse", [False, True])
def test_final_states(reverse):
    inputs = positive_steps(scan_inputs(length=70, dtype=torch.float32))
    x, dt, A, B, _, _, states = inputs.values()
    _, expected = chunk_scan(**inputs, reverse=reverse)
    torch.testing.assert_close(ssd_triton.final_states(x, dt, A, B, states, reverse), expected)


def test_reads_views_and_any_layout():
    """x, B and C as the convolution leaves them, views of one tensor, and with tokens last."""
    inputs = positive_steps(scan_inputs(length=40, dtype=torch.float32))
    expected = chunk_scan(**inputs)
    whole = torch.cat([inputs[name].flatten(2) for name in "xBC"], dim=-1)
    for tensor in (whole, whole.transpose(1, 2).contiguous().transpose(1, 2)):
        views = tensor.split([inputs[name].flatten(2).shape[-1] for name in "xBC"], dim=-1)
        views = {name: view.unflatten(2, (inputs[name].shape[2], -1)) for name, view in zip("xBC", views, strict=True)}
        torch.testing.assert_close(chunk_scan(**{**inputs, **views}), expected)


@pytest.mark.parametrize("reverse", [False, True])
def test_bfloat16_rounds_what_goes_into_products_only(reverse):
    inputs = positive_steps(scan_inputs(batch=1, length=100, head_dim=32, state=32, dtype=torch.float32))
    inputs |= {name: inputs[name].bfloat16() for name in "xBC"}
    y, states = chunk_scan(**inputs, reverse=reverse)
    assert y.dtype == torch.bfloat16 and states.dtype == torch.float32
    double = {name: tensor.double() for name, tensor in inputs.items()}
    expected, expected_states = (reversed_recurrence if reverse else recurrence)(**double)
    assert_near({"y": y, "states": states}, {"y": expected, "states": expected_states}, 8e-3)
