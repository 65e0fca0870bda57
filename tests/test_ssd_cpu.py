"""The PyTorch engine of the SSD scan: exact at any steepness, however it is divided, with its gradients."""

import os

import pytest
import torch
from scans import KINDS, assert_near, outputs_and_gradients, recurrence, scan_inputs, steepness_inputs

from mambamia_hf import ssd_cpu
from mambamia_hf.ssd import ssd_chunk_scan, ssd_final_states, ssd_reference


def chunk_scan(chunk_size: int, **inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Δ itself as dt, no bias."""
    return ssd_chunk_scan(**inputs, chunk_size=chunk_size, return_final_states=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 3e-5)])
def test_exact_at_any_steepness(kind, dtype, tolerance):
    inputs = steepness_inputs(kind)
    actual = outputs_and_gradients(lambda **tensors: chunk_scan(256, **tensors), inputs, dtype)
    assert_near(actual, outputs_and_gradients(recurrence, inputs, torch.float64), tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_final_states_at_any_steepness(kind):
    inputs = {name: tensor.float() for name, tensor in steepness_inputs(kind).items()}
    states = ssd_final_states(*(inputs[name] for name in ("x", "dt", "A", "B", "initial_states")))
    _, expected = recurrence(**{name: tensor.double() for name, tensor in inputs.items()})
    assert_near({"states": states}, {"states": expected}, 1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_reference_at_any_steepness(kind):
    inputs = steepness_inputs(kind)
    arguments = {name: tensor for name, tensor in inputs.items() if name not in ("dt", "initial_states")}
    y, state = ssd_reference(**arguments, delta=inputs["dt"], states=inputs["initial_states"], chunk_size=64)
    expected_y, expected_state = recurrence(**inputs)
    torch.testing.assert_close(y, expected_y)
    torch.testing.assert_close(state, expected_state)


def test_steep_heads_change_nothing_in_the_others():
    """Whether a head is steep is decided per segment; its neighbours' results are those without it."""
    inputs = steepness_inputs("typical")
    steep = {**inputs, "dt": inputs["dt"].clone()}
    steep["dt"][:, 70, [1, 6]] = 1e3
    (y, state), (steep_y, steep_state) = (chunk_scan(64, **tensors) for tensors in (inputs, steep))
    others = [0, 2, 3, 4, 5, 7]
    torch.testing.assert_close(steep_y[:, :, others], y[:, :, others], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(steep_state[:, others], state[:, others], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shift", [-8.0, -4.0, 4.0])
def test_float32_gradients_against_float64(shift):
    """Also where nearly nothing passes a token, so that large sums could cancel in the gradient of Δ."""
    inputs = scan_inputs(length=300, dtype=torch.float32)
    inputs["dt_bias"] = inputs["dt_bias"] + shift

    def scan(**tensors):
        return ssd_chunk_scan(**tensors, chunk_size=64, dt_softplus=True, return_final_states=True)

    single, double = (outputs_and_gradients(scan, inputs, dtype) for dtype in (torch.float32, torch.float64))
    assert_near(single, double, 3e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("batch", "heads", "groups"), [(1, 2, 1), (2, 2, 2), (2, 2, 1)])
@pytest.mark.parametrize("max_bits", [120.0, 2.0, 0.0], ids=["gentle", "some steep", "steep"])
def test_gradcheck(batch, heads, groups, max_bits, monkeypatch):
    monkeypatch.setattr(ssd_cpu, "_MAX_BITS", max_bits)
    monkeypatch.setattr(ssd_cpu, "_SEGMENT_CHUNKS", 1)
    inputs = scan_inputs(batch=batch, length=7, heads=heads, head_dim=2, groups=groups, state=3, grad=True)

    def scan(*tensors):
        return ssd_chunk_scan(
            **dict(zip(inputs, tensors, strict=True)), chunk_size=4, dt_softplus=True, return_final_states=True
        )

    assert torch.autograd.gradcheck(scan, tuple(inputs.values()))


@pytest.mark.parametrize("length", [1, 7, 16, 37, 64])
@pytest.mark.parametrize(
    ("chunk_size", "segment_chunks", "heads_at_once", "max_bits"),
    [(1, 1, 1, 120.0), (8, 2, 1, 4.0), (8, 3, 3, 0.0), (16, 1, 2, 20.0), (64, 16, 16, 10.0)],
)
def test_result_does_not_depend_on_the_division(
    length, chunk_size, segment_chunks, heads_at_once, max_bits, monkeypatch
):
    monkeypatch.setattr(ssd_cpu, "_SEGMENT_CHUNKS", segment_chunks)
    monkeypatch.setattr(ssd_cpu, "_MAX_HEADS", heads_at_once)
    monkeypatch.setattr(ssd_cpu, "_STEEP_HEADS", 2)
    monkeypatch.setattr(ssd_cpu, "_MAX_BITS", max_bits)
    inputs = scan_inputs(batch=3, length=length, heads=6, groups=2)
    inputs["dt"] = inputs["dt"].abs()
    del inputs["dt_bias"]
    actual = outputs_and_gradients(lambda **tensors: chunk_scan(chunk_size, **tensors), inputs, torch.float64)
    assert_near(actual, outputs_and_gradients(recurrence, inputs, torch.float64), 1e-10)


@pytest.fixture
def two_threads(monkeypatch):
    """As on a machine with two cores; every scan is worth a thread."""
    monkeypatch.setattr(ssd_cpu, "_MIN_ELEMENTS", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_threads_give_the_same_bits(mode, two_threads, monkeypatch):
    inputs = scan_inputs(1, 200, heads=16, groups=1, dtype=torch.float32, grad=mode is torch.enable_grad)

    def scan() -> list[torch.Tensor]:
        with mode():
            y = ssd_chunk_scan(**inputs, chunk_size=64, dt_softplus=True)
        gradients = torch.autograd.grad(y.square().sum(), list(inputs.values())) if y.requires_grad else ()
        return [y, *gradients]

    def one_after_another(function, items, x):
        torch.set_num_threads(1)  # on some CPUs a product of two threads rounds otherwise
        results = [function(item) for item in items]
        torch.set_num_threads(2)
        return results

    assert len(ssd_cpu._shares(inputs["x"], inputs["B"])) == 2
    in_threads, once_more = scan(), scan()
    monkeypatch.setattr(ssd_cpu, "_for_each", one_after_another)
    for threads, again, alone in zip(in_threads, once_more, scan(), strict=True):
        assert torch.equal(threads, again) and torch.equal(threads, alone)
    assert in_threads[0].is_inference() == (mode is torch.inference_mode)


def test_threads_are_single_and_leave_pytorch_as_it_was(two_threads):
    ssd_chunk_scan(**scan_inputs(), chunk_size=16)
    assert torch.get_num_threads() == 2
    threads = ssd_cpu._threads(2, os.getpid())
    assert set(threads.map(lambda _: torch.get_num_threads(), range(8))) == {1}


def test_an_error_in_a_thread_is_raised(two_threads, monkeypatch):
    monkeypatch.setattr(ssd_cpu, "_scan_segment", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ssd_chunk_scan(**scan_inputs(), chunk_size=16)


def test_autocast_leaves_the_scan_as_it_is():
    inputs = scan_inputs(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = ssd_chunk_scan(**inputs, chunk_size=16)
    assert torch.equal(y, ssd_chunk_scan(**inputs, chunk_size=16))


def official_in_bfloat16(x, dt, A, B, C, D):
    """mamba-ssm's kernels in bfloat16, in float64 but for what they round: one chunk, so no states.

    They round the weight of each pair of tokens before its product with x, and y.
    """
    decay = (dt * A).cumsum(1).permute(0, 2, 1)  # b h l
    decay = (decay.unsqueeze(-1) - decay.unsqueeze(-2)).tril().exp().tril()
    weights = (C[:, :, 0] @ B[:, :, 0].mT).unsqueeze(1) * decay * dt.permute(0, 2, 1).unsqueeze(-2)
    y = torch.einsum("bhts,bshp->bthp", weights.bfloat16().double(), x) + x * D.unsqueeze(-1)
    return y.bfloat16().double()


@pytest.mark.parametrize("scale", [0.003, 0.03, 0.3])
def test_bfloat16_rounds_no_more_than_the_kernels(scale):
    inputs = scan_inputs(batch=1, length=256, heads=8, head_dim=32, groups=1, state=64)
    inputs = {name: tensor.bfloat16() for name, tensor in inputs.items() if name in ("x", "B", "C")} | {
        "dt": scale * inputs["dt"].exp().float(),
        "A": inputs["A"].float(),
        "D": inputs["D"].float(),
    }
    double = {name: tensor.double() for name, tensor in inputs.items()}
    expected, _ = recurrence(**double)
    official = (official_in_bfloat16(**double) - expected).norm()
    ours = ssd_chunk_scan(**inputs, chunk_size=256)
    assert ours.dtype == torch.bfloat16
    assert (ours.double() - expected).norm() <= official
