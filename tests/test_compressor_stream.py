"""The compressor over a stream: a causal one is exact, a bidirectional one works in windows with a look-ahead."""

import pytest
import torch
from accelerate import cpu_offload
from tiny_model import tiny_compressor_config

from mambamia_hf import MambaMiaCompressor, compressor_segments
from mambamia_hf.compressor_stream import compress_next, compress_pending, stream_state


NUM_FRAMES = 23
PORTIONS = [[23], [1] * 23, [5, 1, 9, 8], [22, 1], [2, 21]]


@pytest.fixture(autouse=True)
def short_segments(monkeypatch):
    monkeypatch.setitem(compressor_segments.SEGMENT_TOKENS, "cpu", 40)


def tiny_compressor(**kwargs) -> MambaMiaCompressor:
    """One whose anchors leave it as they leave stage 2."""
    torch.manual_seed(0)
    compressor = MambaMiaCompressor(tiny_compressor_config(initializer_range=0.3, **kwargs)).eval()
    for layer in compressor.layers if compressor.config.gpa_placement is not None else ():
        layer.gpa.weight_proj.weight.data.normal_()
        layer.gpa.gate_proj.weight.data.normal_()
    compressor.norm = compressor.output_proj = torch.nn.Identity()
    return compressor


def features(num_frames: int = NUM_FRAMES, batch_size: int = 1) -> torch.Tensor:
    return torch.randn(batch_size, num_frames, 9, 12, generator=torch.Generator().manual_seed(1))


def stream(compressor, frames, portions, window=4, look_ahead=3, end=True):
    """Anchors and Δ of a video that comes in portions."""
    state, anchors, deltas = stream_state(compressor), [], []
    for portion in frames.split(portions, dim=1):
        settled, delta, state = compress_next(compressor, portion, state, window, look_ahead)
        anchors += [] if settled is None else [settled]
        deltas += [] if delta is None else [delta]
    rest, delta = compress_pending(compressor, state) if end else (None, None)
    anchors += [] if rest is None else [rest]
    deltas += [] if delta is None else [delta]
    return torch.cat(anchors, dim=1), torch.cat(deltas, dim=1) if deltas else None


def relative_error(found, expected):
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize(
    "variant",
    [
        {},
        {"gpa_placement": "pre_mixer"},
        {"gpa_placement": None},
        {"input_norm": True},
        {"n_groups": 2},
        {"conv_kernel": 1},
        {"conv_kernel": 7},
        {"patches_per_anchor": 9},
        {"patches_per_anchor": 1},
        {"num_hidden_layers": 1},
        {"num_temporal_layers": 2},
        {"num_temporal_layers": 0},
    ],
    ids=str,
)
@pytest.mark.parametrize("portions", PORTIONS, ids=str)
def test_a_causal_compressor_gives_what_it_gives_for_the_whole_video(variant, portions):
    compressor = tiny_compressor(bidirectional=False, **variant)
    with torch.no_grad():
        whole = compressor(features())
    anchors, deltas = stream(compressor, features(), portions, end=False)
    torch.testing.assert_close(anchors, whole.last_hidden_state, rtol=1e-5, atol=1e-5)
    assert (deltas is None) == (whole.frame_deltas is None)
    if deltas is not None:
        torch.testing.assert_close(deltas, whole.frame_deltas, rtol=1e-5, atol=1e-5)


def test_a_causal_compressor_settles_frames_at_once_and_keeps_no_features():
    compressor = tiny_compressor(bidirectional=False)
    settled, deltas, state = compress_next(compressor, features(6), stream_state(compressor), 4, 3)
    assert settled.shape[:2] == (1, 6) == deltas.shape and state.pending is None


def test_a_bidirectional_compressor_waits_for_its_look_ahead():
    compressor = tiny_compressor()
    state, settled_frames = stream_state(compressor), []
    for number, frame in enumerate(features().split(1, dim=1), start=1):
        settled, _, state = compress_next(compressor, frame, state, 4, 3)
        settled_frames.append(0 if settled is None else settled.shape[1])
        pending = 0 if state.pending is None else state.pending.shape[1]
        assert pending == number - sum(settled_frames) < 4 + 3
    assert settled_frames == [4 * (number >= 7 and number % 4 == 3) for number in range(1, NUM_FRAMES + 1)]


@pytest.mark.parametrize("portions", PORTIONS, ids=str)
def test_a_bidirectional_compressor_does_not_depend_on_the_portions(portions):
    compressor = tiny_compressor()
    whole, deltas = stream(compressor, features(), [NUM_FRAMES])
    anchors, portion_deltas = stream(compressor, features(), portions)
    torch.testing.assert_close(anchors, whole)
    torch.testing.assert_close(portion_deltas, deltas)


@pytest.mark.parametrize("placement", ["post_mixer", "pre_mixer", None])
def test_a_look_ahead_to_the_end_is_exact(placement):
    compressor = tiny_compressor(gpa_placement=placement).double()
    frames = features().double()
    with torch.no_grad():
        whole = compressor(frames)
    for window, look_ahead in ((4, NUM_FRAMES), (NUM_FRAMES - 1, 1), (NUM_FRAMES, 0)):
        anchors, deltas = stream(compressor, frames, [5, 18], window, look_ahead)
        torch.testing.assert_close(anchors, whole.last_hidden_state)
        torch.testing.assert_close(deltas, whole.frame_deltas)


def test_a_longer_look_ahead_comes_closer():
    compressor = tiny_compressor(num_hidden_layers=1)
    with torch.no_grad():
        whole = compressor(features()).last_hidden_state
    errors = [
        relative_error(stream(compressor, features(), [NUM_FRAMES], 4, look_ahead)[0], whole)
        for look_ahead in (0, 1, 4, 12)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0] / 3


def test_the_forward_state_is_exact():
    """With the backward scans silent, a bidirectional compressor in windows is exact."""
    compressor = tiny_compressor()
    for layer in compressor.layers:
        layer.mixer.backward_ssm.norm.data.zero_()
    with torch.no_grad():
        whole = compressor(features()).last_hidden_state
    anchors, _ = stream(compressor, features(), [7, 9, 7], 4, 0)
    torch.testing.assert_close(anchors, whole, rtol=1e-5, atol=1e-5)


def test_frames_that_wait_change_nothing_and_can_be_seen_at_any_moment():
    compressor = tiny_compressor()
    _, _, state = compress_next(compressor, features()[:, :9], stream_state(compressor), 4, 3)
    first = compress_pending(compressor, state)
    second = compress_pending(compressor, state)
    assert first[0].shape[1] == 5
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    with_peeks, _, _ = compress_next(compressor, features()[:, 9:], state, 4, 3)
    plain, _ = stream(compressor, features(), [9, 14], end=False)
    assert torch.equal(with_peeks, plain[:, 4:])


def test_videos_of_a_batch_do_not_mix():
    compressor = tiny_compressor(bidirectional=False)
    anchors, deltas = stream(compressor, features(batch_size=3), [5, 18], end=False)
    for video in range(3):
        alone, delta = stream(compressor, features(batch_size=3)[video : video + 1], [5, 18], end=False)
        torch.testing.assert_close(anchors[video : video + 1], alone)
        torch.testing.assert_close(deltas[video : video + 1], delta)


def test_bfloat16_stays_close_to_the_whole_video():
    compressor = tiny_compressor(bidirectional=False).bfloat16()
    frames = features().bfloat16()
    with torch.no_grad():
        whole = compressor(frames).last_hidden_state.float()
    anchors, _ = stream(compressor, frames, [5, 18])
    assert anchors.dtype == torch.bfloat16
    assert relative_error(anchors.float(), whole) < 0.02


def test_no_gradient_is_kept_from_frame_to_frame():
    compressor = tiny_compressor(bidirectional=False)
    anchors, _, state = compress_next(compressor, features(2), stream_state(compressor), 4, 0)
    assert not anchors.requires_grad and not state.spatial[0].ssm.requires_grad


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mixer_type": "mamba1"}, "mixer_type='mamba2'"),
        ({"temporal_bidirectional": True}, "temporal_bidirectional=True"),
    ],
)
def test_a_compressor_that_needs_whole_videos_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        stream_state(tiny_compressor(**settings))


def test_an_offloaded_compressor_is_refused():
    compressor = tiny_compressor()
    cpu_offload(compressor, execution_device="cpu")
    with pytest.raises(ValueError, match="offloaded"):
        stream_state(compressor)
