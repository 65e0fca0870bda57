from importlib.util import find_spec

import pytest
import torch
from golden import load_golden
from scans import recurrence, scan_inputs
from torch.nn.functional import conv1d, silu

from mambamia_hf import ssd
from mambamia_hf.ssd import causal_conv1d_silu, ssd_chunk_scan, ssd_final_states, ssd_reference


@pytest.mark.parametrize("name", ["scan_aligned", "scan_ragged"])
def test_golden_scan(name):
    tensors, _ = load_golden(name)
    y, final_state = ssd_chunk_scan(
        *(tensors[key] for key in ("x", "dt", "A", "B", "C")),
        chunk_size=64,
        D=tensors["D"],
        dt_bias=tensors["dt_bias"],
        initial_states=tensors.get("initial_state"),
        dt_softplus=True,
        return_final_states=True,
    )
    torch.testing.assert_close(y, tensors["y"], atol=1e-4, rtol=0)
    torch.testing.assert_close(final_state, tensors["final_state"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("length", [1, 7, 8, 37, 64])
def test_equals_recurrence(length):
    inputs = scan_inputs(length=length)
    y, state = ssd_chunk_scan(**inputs, chunk_size=8, dt_softplus=True, return_final_states=True)
    expected_y, expected_state = recurrence(**inputs, dt_softplus=True)
    torch.testing.assert_close(y, expected_y)
    torch.testing.assert_close(state, expected_state)


@pytest.mark.parametrize("length", [1, 7, 8, 37, 64])
def test_reference_equals_recurrence(length):
    """The listing that `ssd_reference` teaches, which needs Δ itself and every argument."""
    inputs = scan_inputs(length=length)
    delta = (inputs.pop("dt") + inputs.pop("dt_bias")).exp()
    states = inputs.pop("initial_states")
    y, state = ssd_reference(**inputs, delta=delta, states=states, chunk_size=8)
    expected_y, expected_state = recurrence(**inputs, dt=delta, initial_states=states)
    torch.testing.assert_close(y, expected_y)
    torch.testing.assert_close(state, expected_state)


@pytest.mark.slow
def test_compiles_to_one_graph_of_any_length():
    scan = torch.compile(ssd_chunk_scan, backend="eager", fullgraph=True, dynamic=True)
    for length in (37, 64):
        inputs = scan_inputs(length=length)
        torch.testing.assert_close(
            scan(**inputs, chunk_size=16, dt_softplus=True), ssd_chunk_scan(**inputs, chunk_size=16, dt_softplus=True)
        )


@pytest.mark.parametrize("left_out", ["D", "dt_bias", "initial_states"])
def test_optional_inputs(left_out):
    inputs = {**scan_inputs(), left_out: None}
    y = ssd_chunk_scan(**inputs, chunk_size=16, dt_softplus=True)
    torch.testing.assert_close(y, recurrence(**inputs, dt_softplus=True)[0])


def test_step_size_limit_and_no_softplus():
    inputs = scan_inputs()
    y = ssd_chunk_scan(**inputs, chunk_size=16, dt_limit=(0.1, 0.4))
    torch.testing.assert_close(y, recurrence(**inputs, dt_limit=(0.1, 0.4))[0])


def test_skip_per_channel():
    inputs = {**scan_inputs(), "D": torch.arange(32, dtype=torch.float64).reshape(4, 8)}
    torch.testing.assert_close(
        ssd_chunk_scan(**inputs, chunk_size=16, dt_softplus=True), recurrence(**inputs, dt_softplus=True)[0]
    )


def test_gradient_equals_recurrence():
    ours, theirs = scan_inputs(grad=True), scan_inputs(grad=True)
    ssd_chunk_scan(**ours, chunk_size=8, dt_softplus=True).square().sum().backward()
    recurrence(**theirs, dt_softplus=True)[0].square().sum().backward()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor.grad, theirs[name].grad, msg=lambda message, name=name: f"{name}: {message}")


def test_step_of_size_zero_changes_nothing_and_has_a_gradient():
    ours, theirs = scan_inputs(grad=True), scan_inputs(grad=True)
    mask = torch.arange(37)[None, :, None] % 3 > 0
    outputs = []
    for inputs, scan in ((ours, lambda **kwargs: ssd_chunk_scan(**kwargs, chunk_size=8)), (theirs, recurrence)):
        bare = {name: tensor for name, tensor in inputs.items() if name not in ("dt", "dt_bias")}
        y = scan(**bare, dt=inputs["dt"].abs() * mask)
        y = y if isinstance(y, torch.Tensor) else y[0]
        outputs.append(y)
        y.square().sum().backward()
    torch.testing.assert_close(*outputs)
    for name in ("x", "dt", "A", "B", "C", "D"):
        torch.testing.assert_close(ours[name].grad, theirs[name].grad)


def test_half_precision_keeps_float32_inside():
    inputs = scan_inputs(dtype=torch.float32)
    half = {name: tensor.bfloat16() for name, tensor in inputs.items()}
    y, state = ssd_chunk_scan(**half, chunk_size=16, dt_softplus=True, return_final_states=True)
    assert y.dtype == torch.bfloat16 and state.dtype == torch.float32
    expected, _ = recurrence(**{name: tensor.double() for name, tensor in half.items()}, dt_softplus=True)
    torch.testing.assert_close(y.double(), expected, atol=2e-2, rtol=1e-2)  # one rounding of the output to 8 bits


def test_decay_that_underflows_is_finite():
    inputs = scan_inputs(dtype=torch.float32, grad=True)
    y = ssd_chunk_scan(**{**inputs, "dt": inputs["dt"] + 1e4}, chunk_size=16, dt_softplus=True)
    y.sum().backward()
    assert torch.isfinite(y).all() and all(torch.isfinite(tensor.grad).all() for tensor in inputs.values())


def test_negative_step_sizes_are_refused():
    with pytest.raises(ValueError, match="dt_limit"):
        ssd_chunk_scan(**scan_inputs(), chunk_size=8, dt_limit=(-1.0, 1.0))


def test_wrong_shapes_are_named():
    inputs = scan_inputs()
    with pytest.raises(ValueError, match="dt"):
        ssd_chunk_scan(**{**inputs, "dt": inputs["dt"][:, 1:]}, chunk_size=8)
    with pytest.raises(ValueError, match="groups"):
        ssd_chunk_scan(**{**inputs, "B": inputs["B"][:, :, :1].repeat(1, 1, 3, 1)}, chunk_size=8)


@pytest.mark.parametrize("length", [1, 3, 20])
def test_convolution(length):
    x, weight, bias = torch.randn(2, length, 5), torch.randn(5, 4), torch.randn(5)
    expected = conv1d(x.mT, weight.unsqueeze(1), bias, padding=3, groups=5)[..., :length].mT
    torch.testing.assert_close(causal_conv1d_silu(x, weight, bias), silu(expected))


@pytest.mark.parametrize("with_states", [False, True])
def test_final_states_alone(with_states):
    inputs = scan_inputs(length=53)
    x, dt, A, B, C = (inputs[name] for name in ("x", "dt", "A", "B", "C"))
    states = inputs["initial_states"] if with_states else None
    _, expected = recurrence(x, dt.abs(), A, B, C, initial_states=states)
    torch.testing.assert_close(ssd_final_states(x, dt.abs(), A, B, states), expected)


def test_convolution_goes_on_after_a_context():
    x, weight, bias = torch.randn(2, 20, 5), torch.randn(5, 4), torch.randn(5)
    whole = causal_conv1d_silu(x, weight, bias)
    torch.testing.assert_close(causal_conv1d_silu(x[:, 8:], weight, bias, context=x[:, 5:8]), whole[:, 8:])


@pytest.mark.skipif(find_spec("mamba_ssm") is not None, reason="with mamba-ssm these are kernels, which need a GPU")
def test_without_kernels_a_gpu_takes_the_same_path():
    inputs = scan_inputs()
    arguments = {**inputs, "chunk_size": 16, "dt_softplus": True, "dt_limit": (0.1, 2.0), "return_final_states": True}
    y, state = ssd._kernel_chunk_scan(**arguments)
    expected_y, expected_state = recurrence(**inputs, dt_softplus=True, dt_limit=(0.1, 2.0))
    torch.testing.assert_close(y, expected_y)
    torch.testing.assert_close(state, expected_state)


@pytest.mark.skipif(find_spec("causal_conv1d") is not None, reason="with causal-conv1d this is a kernel for a GPU")
def test_without_kernels_a_gpu_takes_the_same_convolution():
    x, weight, bias = torch.randn(2, 20, 5), torch.randn(5, 4), torch.randn(5)
    y = ssd._kernel_causal_conv1d(x.mT, weight, bias, activation="silu").mT
    torch.testing.assert_close(y, causal_conv1d_silu(x, weight, bias))
