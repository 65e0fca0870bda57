"""What the arithmetic keeps whatever the type, the length and the company."""

import copy

import pytest
import torch
from tiny_model import IMAGE_SIZE, NUM_ANCHORS, VIDEO_TOKEN, random_videos, tiny_model

from mambamia_hf import compressor_segments, ssd_cpu


def prompt(num_frames: int) -> torch.Tensor:
    return torch.tensor([[11, 12] + [VIDEO_TOKEN] * num_frames * NUM_ANCHORS + [13, 14]])


def logits(model, videos, **kwargs):
    with torch.no_grad():
        ids = prompt(videos.shape[1]).repeat(len(videos), 1)
        return model(input_ids=ids, pixel_values_videos=videos, delta_threshold=0.0, **kwargs).logits


def relative_error(value, reference):
    return ((value.double() - reference).norm() / reference.norm()).item()


@pytest.mark.parametrize("mixer_type", ["mamba2", "mamba1"])
def test_float32_against_float64(mixer_type):
    model = tiny_model(compressor_config={"mixer_type": mixer_type})
    videos = random_videos(1, 6)
    reference = logits(copy.deepcopy(model).double(), videos.double())
    assert reference.dtype == torch.float64
    assert relative_error(logits(model, videos), reference) < 1e-5


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 0.1), (torch.float16, 0.02)])
def test_half_precision(dtype, bound):
    model = tiny_model()
    videos = random_videos(1, 6)
    reference = logits(copy.deepcopy(model).double(), videos.double())
    half = copy.deepcopy(model).to(dtype)
    assert relative_error(logits(half, videos.to(dtype)), reference) < bound
    deltas = half.get_video_features(videos).frame_deltas
    assert deltas.dtype == torch.float32


@pytest.mark.parametrize("mixer_type", ["mamba2", "mamba1"])
@pytest.mark.parametrize("shift", [-60.0, 60.0, 1e4])
def test_step_sizes_at_their_limits(shift, mixer_type):
    model = tiny_model(compressor_config={"mixer_type": mixer_type})
    for name, parameter in model.named_parameters():
        if name.endswith("dt_bias"):
            parameter.data += shift
    features = model.get_video_features(random_videos(1, 6))
    assert torch.isfinite(features.last_hidden_state).all() and torch.isfinite(features.frame_deltas).all()
    features.last_hidden_state.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.model.compressor.parameters() if p.grad is not None)


@pytest.mark.parametrize(
    "videos",
    [
        torch.zeros(1, 6, 3, IMAGE_SIZE, IMAGE_SIZE),
        random_videos(1, 1).expand(1, 6, -1, -1, -1),
        random_videos(1, 1),
        1e4 * random_videos(1, 3),
    ],
    ids=["black", "all equal", "one frame", "very bright"],
)
def test_unusual_videos(videos):
    features = tiny_model().get_video_features(videos, delta_threshold=0.1, delta_min_frames=0)
    assert torch.isfinite(features.last_hidden_state).all() and torch.isfinite(features.frame_deltas).all()
    assert features.keep_mask.any()


def test_one_row_of_patches():
    model = tiny_model(compressor_config={"patches_per_anchor": 16})
    features = model.get_video_features(random_videos(1, 3))
    assert features.last_hidden_state.shape[2] == 1 and torch.isfinite(features.last_hidden_state).all()


def test_result_does_not_depend_on_how_it_is_computed(monkeypatch):
    model = tiny_model()
    videos = random_videos(3, 6)
    expected = logits(model, videos)

    def check(**kwargs):
        torch.testing.assert_close(logits(model, videos, **kwargs), expected, rtol=1e-5, atol=1e-5)

    torch.testing.assert_close(logits(model, videos[1:2]), expected[1:2], rtol=1e-5, atol=1e-5)
    for vision_batch_size in (1, 5, 100):
        check(vision_batch_size=vision_batch_size)
    for segment_tokens in (40, 77):
        monkeypatch.setitem(compressor_segments.SEGMENT_TOKENS, "cpu", segment_tokens)
        check()
    for chunk_size in (1, 7, 64):
        monkeypatch.setattr(ssd_cpu, "_CHUNK_SIZE", chunk_size)
        check()
    monkeypatch.setattr(ssd_cpu, "_MAX_HEADS", 1)
    check()
    monkeypatch.setattr(ssd_cpu, "_SEGMENT_CHUNKS", 1)
    check()
