import pytest
import torch
from baselines import FramePooling, NoCompression, PooledQueries, SelfAttention
from tiny_model import random_videos, tiny_compressor_config, tiny_config
from torch import nn

from mambamia_hf import MambaMiaCompressorConfig, MambaMiaForConditionalGeneration


BASELINES = [PooledQueries, SelfAttention, FramePooling, NoCompression]


def compressor_config(baseline: type, **kwargs) -> MambaMiaCompressorConfig:
    patches_per_anchor = 1 if baseline is NoCompression else 3
    settings = {"patches_per_anchor": patches_per_anchor, "initializer_range": 0.2, **kwargs}
    return tiny_compressor_config(**settings)


def make(baseline: type, **kwargs) -> nn.Module:
    torch.manual_seed(0)
    return baseline(compressor_config(baseline), **kwargs).eval()


@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("num_frames", [1, 4, 7])
@pytest.mark.parametrize("num_patches", [9, 6])  # a square grid, and rows of three
def test_tokens_of_every_frame(baseline, num_frames, num_patches):
    output = make(baseline)(torch.randn(2, num_frames, num_patches, 12))
    num_tokens = num_patches if baseline is NoCompression else num_patches // 3
    assert output.last_hidden_state.shape == (2, num_frames, num_tokens, 20)
    assert output.last_hidden_state.isfinite().all()
    assert output.frame_deltas is None


@pytest.mark.parametrize("baseline", BASELINES)
def test_padding_never_leaks(baseline):
    compressor = make(baseline)
    long, short = torch.randn(1, 7, 9, 12), torch.randn(1, 5, 9, 12)
    batch = torch.full((2, 7, 9, 12), 1e3)
    batch[0], batch[1, :5] = long[0], short[0]
    frame_mask = torch.arange(7) < torch.tensor([[7], [5]])
    together = compressor(batch, frame_mask=frame_mask).last_hidden_state
    torch.testing.assert_close(together[:1], compressor(long).last_hidden_state)
    torch.testing.assert_close(together[1:, :5], compressor(short).last_hidden_state)
    assert (together[1, 5:] == 0).all()


@pytest.mark.parametrize("baseline", BASELINES)
def test_every_parameter_learns(baseline):
    compressor = make(baseline).train()
    features = torch.randn(2, 6, 9, 12, requires_grad=True)
    compressor(features).last_hidden_state.pow(2).sum().backward()
    for name, parameter in compressor.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    assert (features.grad.abs().sum(dim=-1) > 0).all()


@pytest.mark.parametrize("baseline", BASELINES)
def test_in_place_of_the_compressor(baseline):
    settings = {"patches_per_anchor": 1 if baseline is NoCompression else 4}
    config = tiny_config(compressor_config=settings, delta_threshold=None)
    model = MambaMiaForConditionalGeneration(config)
    model.model.compressor = baseline(config.compressor_config)
    videos = random_videos(2, 3)
    input_ids = torch.tensor([[7] + 3 * config.tokens_per_frame() * [config.video_token_id] + [8, 9]]).repeat(2, 1)
    loss = model(
        input_ids=input_ids, pixel_values_videos=videos, labels=input_ids.masked_fill(input_ids < 8, -100)
    ).loss
    loss.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.model.compressor.parameters())
    generated = model.eval().generate(input_ids=input_ids, pixel_values_videos=videos, max_new_tokens=2)
    assert generated.shape == (2, input_ids.shape[1] + 2)


def reached(compressor: nn.Module, frame: int, num_frames: int = 8) -> list[int]:
    """The frames whose tokens change where the patches of `frame` do."""
    features = torch.randn(1, num_frames, 9, 12)
    changed = features.clone()
    changed[:, frame] += 1
    before, after = (compressor(tensor).last_hidden_state for tensor in (features, changed))
    return [index for index in range(num_frames) if (before - after)[0, index].abs().max() > 1e-6]


def test_which_frames_see_each_other():
    assert reached(make(PooledQueries), 3) == list(range(8))
    assert reached(make(SelfAttention), 3) == list(range(8))
    assert reached(make(SelfAttention, frames_per_window=2), 3) == [2, 3]
    assert reached(make(FramePooling), 3) == [3]
    assert reached(make(NoCompression), 3) == [3]


def test_queries_are_averages_over_space_and_time():
    compressor = make(PooledQueries)
    patches = torch.arange(5 * 36.0).view(1, 5, 36, 1).expand(-1, -1, -1, 16)
    # Four frames of 12 anchors together: 48 cells of 6 by 8 would not fit 6 by 6, so take a frame's grid of 3 anchors.
    compressor.config.patches_per_anchor = 12
    pooled = compressor.pool(patches[:, :4], 4)
    assert pooled.shape == (1, 4, 3, 16)
    grid = patches[0, :4, :, 0].view(4, 6, 6)
    expected = torch.stack(
        [
            grid[:, 2 * row : 2 * row + 2, column * 6 // 4 : -(-(column + 1) * 6 // 4)].mean()
            for row in range(3)
            for column in range(4)
        ]
    )
    torch.testing.assert_close(pooled[0, :, :, 0].flatten(), expected)
    # A frame that is left over is pooled by itself.
    last = compressor.pool(patches[:, 4:], 1)
    torch.testing.assert_close(last[0, 0, :, 0], patches[0, 4, :, 0].view(6, 3, 2).mean(dim=(0, 2)))


def test_frames_pooled_over_their_grid():
    compressor = make(FramePooling)
    compressor.config.patches_per_anchor = 9
    patches = torch.randn(1, 2, 36, 16)
    expected = patches.view(1, 2, 2, 3, 2, 3, 16).mean(dim=(3, 5)).flatten(2, 3)
    torch.testing.assert_close(compressor.pool(patches), expected)


def test_errors():
    with pytest.raises(ValueError, match="patches_per_anchor is 3; set it to 1"):
        NoCompression(compressor_config(FramePooling))
    with pytest.raises(ValueError, match="whole number of rows"):
        make(FramePooling)(torch.randn(1, 2, 8, 12))
    with pytest.raises(ValueError, match="video without frames"):
        make(PooledQueries)(torch.randn(1, 0, 9, 12))
