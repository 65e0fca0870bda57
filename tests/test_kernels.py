"""Kernels: the official ones interpreted on the CPU where that is asked for, and all on a GPU where there is one.

TRITON_INTERPRET=1 pytest tests/test_kernels.py  # needs mamba-ssm, without its CUDA parts
pytest -m gpu  # on a GPU, with mamba-ssm and causal-conv1d or without
"""

import os
import subprocess
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from tiny_model import prompt, random_videos, tiny_model

from mambamia_hf import MambaMiaCompressor, MambaMiaCompressorConfig, mixer_triton, ssd
from mambamia_hf.ssd import causal_conv1d_silu, gated_norm, ssd_chunk_scan, ssd_final_states


interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1" or find_spec("mamba_ssm") is None or find_spec("triton") is None,
    reason="opt in with TRITON_INTERPRET=1 and mamba-ssm without its CUDA parts: MAMBA_SKIP_CUDA_BUILD=TRUE "
    "MAMBA_FORCE_BUILD=TRUE pip install --no-build-isolation --no-deps mamba-ssm einops triton",
)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Per case, the tensors of the kernels and of the PyTorch engine, from tests/helpers/interpreted_kernels.py."""
    output = tmp_path_factory.mktemp("kernels") / "results.pt"
    script = Path(__file__).parent / "helpers" / "interpreted_kernels.py"
    subprocess.run([sys.executable, script, output], check=True)
    return torch.load(output)


def assert_all_close(results: tuple[dict, dict], tolerance: float):
    """Every tensor within `tolerance` of the largest entry of what it has to equal."""
    actual, expected = results
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        scale = tensor.abs().max().item()
        assert scale > 0, f"{name} is all zero and so shows nothing"
        torch.testing.assert_close(
            actual[name], tensor, atol=tolerance * scale, rtol=0, msg=lambda message, name=name: f"{name}: {message}"
        )


@interpreted
@pytest.mark.parametrize("case", ["everything", "raw step sizes", "one token"])
def test_kernels_equal_the_pytorch_engine(results, case):
    assert_all_close(results[case], 1e-5)


@interpreted
def test_kernels_in_bfloat16_equal_the_pytorch_engine(results):
    assert_all_close(results["bfloat16"], 2e-2)


@interpreted
def test_compressor_trains_through_the_kernels(results):
    assert results["trained compressor, calls"] == 3  # both directions of stage 1, and the temporal block
    assert_all_close(results["trained compressor"], 1e-4)


@interpreted
def test_compressor_runs_in_segments_through_the_kernels(results):
    segments = 3  # 80 tokens, 30 at once
    assert results["compressor in segments, calls"] == 2 * segments + 1
    assert_all_close(results["compressor in segments"], 1e-4)


@interpreted
def test_kernels_get_the_models_tensors_as_they_are(results):
    forward, backward = results["boundary"]["calls"]
    for call in (forward, backward):
        x, B, C = (call[name] for name in "xBC")
        assert {tensor["dtype"] for tensor in (x, B, C)} == {torch.bfloat16}
        # All three are views of what the convolution wrote, which the kernels read without a copy.
        assert x["storage"] == B["storage"] == C["storage"]
        assert x["storage_bytes"] == 2 * 70 * (64 + 32 + 32)
        assert all(tensor["stride"][1] == 128 and tensor["stride"][-1] == 1 for tensor in (x, B, C))
        assert call["dt"]["dtype"] == call["A"]["dtype"] == torch.float32
        y, states = call["output"]
        assert y["dtype"] == torch.bfloat16 and states["dtype"] == torch.float32
    assert forward["x"]["storage"] != backward["x"]["storage"]
    assert results["boundary"]["copies"] == ["flip"] * 3  # into the backward direction, and its y and Δ out of it


gpu = pytest.mark.gpu
with_scan_kernel = pytest.mark.skipif(find_spec("mamba_ssm") is None, reason="mamba-ssm is not installed")
with_conv_kernel = pytest.mark.skipif(find_spec("causal_conv1d") is None, reason="causal-conv1d is not installed")


@pytest.fixture
def device():
    if not torch.cuda.is_available():
        pytest.skip("there is no NVIDIA GPU")
    return torch.device("cuda")


@pytest.fixture
def without_triton(monkeypatch):
    """As where Triton cannot build kernels."""
    monkeypatch.setattr(ssd, "_has_triton", lambda x: False)


@pytest.fixture
def without_kernels(monkeypatch, without_triton):
    """As where neither mamba-ssm nor causal-conv1d is installed, either."""
    monkeypatch.setattr(ssd, "_kernel_chunk_scan", ssd._torch_chunk_scan)
    monkeypatch.setattr(ssd, "_kernel_causal_conv1d", ssd._torch_causal_conv1d)


def scan_inputs(device: torch.device | str, dtype: torch.dtype = torch.float32, length: int = 600) -> dict:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    inputs = {
        "x": draw(2, length, 8, 64).to(dtype),
        "dt": draw(2, length, 8).sigmoid() / 5,
        "A": -draw(8).sigmoid() * 4 - 0.5,
        "B": draw(2, length, 2, 128).to(dtype),
        "C": draw(2, length, 2, 128).to(dtype),
        "D": draw(8),
        "initial_states": draw(2, 8, 64, 128),
    }
    return {name: tensor.to(device).requires_grad_() for name, tensor in inputs.items()}


def scan_and_gradients(engine, inputs: dict) -> dict:
    y, states = engine(**inputs, chunk_size=256, return_final_states=True)
    weights = torch.linspace(0, 50, y[0].numel(), device=y.device).sin().view_as(y[0])
    gradients = torch.autograd.grad((y.float() * weights).sum() + states.sum(), list(inputs.values()))
    return {"y": y, "final states": states, **dict(zip(inputs, gradients, strict=True))}


def assert_all_near(actual: dict, expected: dict, tolerance: float):
    """As a whole: tensor cores round single entries by more than they do the sum over all."""
    for name, tensor in expected.items():
        wanted = tensor.detach().double().cpu()
        error = (actual[name].detach().double().cpu() - wanted).norm() / wanted.norm()
        assert error < tolerance, f"{name} is off by {error:.2g} of its norm"


@gpu
@with_scan_kernel
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-3), (torch.bfloat16, 2e-2)])
def test_official_scan_on_a_gpu(device, without_triton, dtype, tolerance):
    actual = scan_and_gradients(ssd_chunk_scan, scan_inputs(device, dtype))
    expected = scan_and_gradients(ssd._torch_chunk_scan, scan_inputs("cpu", dtype))
    assert actual["final states"].dtype == torch.float32
    assert_all_near(actual, expected, tolerance)


@gpu
@with_conv_kernel
@pytest.mark.parametrize("channels", [64, 60])  # the kernel reads rows at multiples of 8 only
def test_official_convolution_on_a_gpu(device, without_triton, channels):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 50, 101)[..., :channels], torch.randn(channels, 4), torch.randn(channels)
    context = torch.randn(2, 3, channels)
    y = causal_conv1d_silu(*(tensor.to(device) for tensor in (x, weight, bias, context)))
    torch.testing.assert_close(y.cpu(), causal_conv1d_silu(x, weight, bias, context), atol=1e-4, rtol=1e-4)


@gpu
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 5e-3), (torch.bfloat16, 2e-2)])
def test_triton_scan_on_a_gpu(device, dtype, tolerance, reverse):
    assert mixer_triton.runs_on(torch.ones(1, dtype=dtype, device=device))
    scan = partial(ssd_chunk_scan, reverse=reverse)
    length = 2200  # two parts and some
    actual = scan_and_gradients(scan, scan_inputs(device, dtype, length))
    assert_all_near(actual, scan_and_gradients(scan, scan_inputs("cpu", dtype, length)), tolerance)
    with torch.no_grad():
        x, dt, A, B, _, _, states = scan_inputs(device, dtype, length).values()
        states = ssd_final_states(x, dt, A, B, states, reverse)
    assert_all_near({"final states": states}, {"final states": actual["final states"]}, tolerance)


@gpu
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 2e-3), (torch.bfloat16, 1e-2)])
@torch.no_grad()
def test_triton_convolution_and_norm_on_a_gpu(device, dtype, tolerance, reverse):
    torch.manual_seed(0)
    x, z, y, add = torch.randn(4, 2, 50, 101)[..., :60].to(dtype)
    weight, bias, context = (torch.randn(*shape).to(dtype) for shape in ((60, 4), (60,), (2, 3, 60)))

    def run(*tensors: torch.Tensor) -> dict:
        x, weight, bias, context, y, add, z = tensors
        return {
            "convolution": causal_conv1d_silu(x, weight, bias, context, reverse),
            "norm": gated_norm(y, bias, 1e-5, 2, add, z),
        }

    tensors = (x, weight, bias, context, y, add, z)
    actual = run(*(tensor.to(device) for tensor in tensors))
    assert_all_near(actual, run(*(tensor.double() for tensor in tensors)), tolerance)


@gpu
@pytest.mark.parametrize(("dtype", "tolerance", "of_A"), [(torch.float32, 1e-4, 1e-4), (torch.bfloat16, 2e-2, 0.1)])
def test_pytorch_engine_on_a_gpu(device, without_kernels, dtype, tolerance, of_A):
    actual = scan_and_gradients(ssd_chunk_scan, scan_inputs(device, dtype))
    expected = scan_and_gradients(ssd_chunk_scan, scan_inputs("cpu", dtype))
    # A's is the small difference of large sums, whose terms this engine rounds to the type of x.
    assert_all_near({"A": actual.pop("A")}, {"A": expected.pop("A")}, of_A)
    assert_all_near(actual, expected, tolerance)


@gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-2), (torch.bfloat16, 0.1)])
def test_compressor_trains_on_a_gpu(device, dtype, tolerance):
    torch.manual_seed(0)
    config = MambaMiaCompressorConfig(
        input_size=64, output_size=32, hidden_size=256, patches_per_anchor=8, initializer_range=0.1
    )
    model, features = MambaMiaCompressor(config).eval(), torch.randn(1, 6, 64, 64)

    def train() -> dict:
        model.zero_grad()
        output = model(features.to(model.device, model.dtype), return_dict=True)
        (output.last_hidden_state.square().sum() + output.frame_deltas.sum()).backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        return {"anchors": output.last_hidden_state, "deltas": output.frame_deltas, **gradients}

    expected = {name: tensor.detach().clone() for name, tensor in train().items()}
    model.to(device, dtype)
    assert_all_near(train(), expected, tolerance)


@gpu
def test_model_on_a_gpu(device):
    model, videos, input_ids = tiny_model(), random_videos(1, 4), prompt([1, 2], 4, [5, 6])
    with torch.no_grad():
        expected = model(input_ids, pixel_values_videos=videos)
        actual = model.to(device)(input_ids.to(device), pixel_values_videos=videos.to(device))
    assert_all_near(
        {"logits": actual.logits, "deltas": actual.frame_deltas},
        {"logits": expected.logits, "deltas": expected.frame_deltas},
        2e-2,
    )
    output = model.generate(input_ids.to(device), pixel_values_videos=videos.to(device), max_new_tokens=3)
    assert output.shape[1] == input_ids.shape[1] + 3 and output[:, : input_ids.shape[1]].tolist() == input_ids.tolist()


@gpu
def test_model_in_bfloat16_on_a_gpu(device):
    model, videos, input_ids = tiny_model(), random_videos(1, 4), prompt([1, 2], 4, [5, 6])
    expected = model(input_ids, pixel_values_videos=videos).logits
    model = model.to(device, torch.bfloat16)
    logits = model(input_ids.to(device), pixel_values_videos=videos.to(device)).logits
    assert logits.dtype == torch.bfloat16
    assert_all_near({"logits": logits}, {"logits": expected}, 0.1)


@gpu
def test_generate_without_kernels_on_a_gpu(device, without_kernels):
    model, videos, input_ids = tiny_model(), random_videos(1, 8), prompt([1, 2], 4, [5, 6])  # 4 of 8 frames
    expected = model.generate(input_ids, pixel_values_videos=videos, max_new_tokens=5)
    model.to(device)
    output = model.generate(input_ids.to(device), pixel_values_videos=videos.to(device), max_new_tokens=5)
    assert output.tolist() == expected.tolist()
