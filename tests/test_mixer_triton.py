"""The Triton kernels of the convolution and the gated norm, interpreted on a CPU, and the compressor through all."""

import pytest
import torch
from tiny_model import tiny_compressor_config
from triton_on_cpu import interpreted, stand_in_for_the_gpu

from mambamia_hf import MambaMiaCompressor, compressor_segments, mixer_triton, ssd, ssd_triton


pytestmark = interpreted
TYPES = [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)]


@pytest.fixture(autouse=True)
def gpu():
    stand_in_for_the_gpu()


def tiny_compressor(**settings) -> MambaMiaCompressor:
    torch.manual_seed(0)
    return MambaMiaCompressor(tiny_compressor_config(initializer_range=0.3, **settings)).eval()


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("taps", [1, 2, 4])
@pytest.mark.parametrize(("dtype", "tolerance"), TYPES)
def test_convolution(taps, reverse, dtype, tolerance):
    x = torch.randn(2, 70, 150, dtype=torch.float64)[..., 3:143]  # a view, as of a projection
    weight, bias, context = torch.randn(140, taps).double(), torch.randn(140).double(), torch.randn(2, taps - 1, 140)
    for before in (None, context):
        expected = ssd.causal_conv1d_silu(x, weight, bias, None if before is None else before.double(), reverse)
        tensors = (None if tensor is None else tensor.to(dtype) for tensor in (x, weight, bias, before))
        y = mixer_triton.causal_conv1d_silu(*tensors, reverse)
        assert y.dtype == dtype
        torch.testing.assert_close(y.double(), expected, atol=tolerance * expected.abs().max().item(), rtol=tolerance)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize(("dtype", "tolerance"), TYPES)
def test_gated_norm(groups, dtype, tolerance):
    y, add, z = torch.randn(3, 2, 9, 60, dtype=torch.float64)[..., :48]
    weight = torch.rand(48, dtype=torch.float64)
    for anchors in (slice(None), slice(2, None, 3)):
        for others in ((None, None), (add[:, anchors], None), (None, z[:, anchors]), (add[:, anchors], z[:, anchors])):
            expected = ssd.gated_norm(y[:, anchors], weight, 1e-5, groups, *others)
            y_, weight_, *others_ = (
                None if tensor is None else tensor.to(dtype) for tensor in (y[:, anchors], weight, *others)
            )
            actual = mixer_triton.gated_norm(y_, weight_, 1e-5, groups, *others_)
            assert actual.dtype == dtype
            torch.testing.assert_close(actual.double(), expected, atol=tolerance * 4, rtol=tolerance)


@pytest.mark.parametrize("placement", ["post_mixer", "pre_mixer", None])
def test_compressor_in_segments(placement, monkeypatch):
    """Every kernel from both ends, with the states that one segment leaves the next."""
    monkeypatch.setattr(ssd_triton, "CHUNK_SIZE", 16)
    monkeypatch.setattr(ssd_triton, "CHUNKS_OF_PART", 1)
    monkeypatch.setitem(compressor_segments.SEGMENT_TOKENS, "cpu", 24)
    compressor = tiny_compressor(gpa_placement=placement)
    features = torch.randn(1, 5, 9, 12)
    with torch.no_grad():
        expected = compressor(features, return_dict=True)
        monkeypatch.setattr(ssd, "_has_triton", lambda x: True)
        actual = compressor(features, return_dict=True)
    torch.testing.assert_close(actual.last_hidden_state, expected.last_hidden_state, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(actual.frame_deltas, expected.frame_deltas)


def test_compressor_trains(monkeypatch):
    compressor = tiny_compressor(num_hidden_layers=1)
    features = torch.randn(1, 2, 6, 12)

    def gradients() -> dict[str, torch.Tensor]:
        compressor.zero_grad()
        output = compressor(features, return_dict=True)
        (output.last_hidden_state.square().sum() + output.frame_deltas.sum()).backward()
        return {name: parameter.grad for name, parameter in compressor.named_parameters()}

    expected = gradients()
    monkeypatch.setattr(ssd, "_has_triton", lambda x: True)
    actual = gradients()
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, atol=1e-4 * gradient.abs().max().item(), rtol=1e-3)
