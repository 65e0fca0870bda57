"""The needle videos: the file shows what the ground truth says, and nothing else."""

from dataclasses import replace
from itertools import combinations

import av
import numpy as np
import pytest

from mambamia_hf.needle import (
    COLOURS,
    DIGITS,
    NEEDLE_SIZES,
    SHAPES,
    Needle,
    NeedleVideo,
    needle_image,
    needle_questions,
    questions,
    render_frames,
    write_needle_video,
)


def decode(path):
    """All frames of a file (frames, height, width, 3) and their times in seconds."""
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
    return np.stack([frame.to_ndarray(format="rgb24") for frame in frames]), np.array([frame.time for frame in frames])


def render(video):
    return np.stack([np.asarray(frame) for frame in render_frames(video)]).astype(np.int16)


def still(value, colour="white", size=0.3):
    """The pixels of a glyph in the middle of a 96 x 96 frame, and of that frame without it."""
    kind = "shape" if value in SHAPES else "digit"
    needle = Needle(kind, value, colour, start=0.0, duration=1.0, x=0.5, y=0.5, size=size, halo=False)
    video = NeedleVideo(seed=0, num_frames=1, fps=1.0, size=(96, 96), needles=[needle])
    return render(video)[0], render(replace(video, needles=[]))[0]


@pytest.mark.parametrize(
    "seed, settings",
    [
        (0, {}),
        (1, {"duration": 10.0, "fps": 12.5, "size": (96, 160), "needle_seconds": 1.0}),
        (2, {"duration": 120.0, "fps": 1.0, "size": (120, 96)}),
        (3, {"duration": 10.0, "fps": 30000 / 1001, "needle_seconds": 0.03}),
        (4, {"duration": 40.0, "fps": 0.5, "size": (64, 64)}),
        (5, {"duration": 10.0, "fps": 4.0, "needle_seconds": 10.0}),
    ],
)
def test_the_needle_is_in_its_frames_and_in_no_others(tmp_path, seed, settings):
    video = write_needle_video(tmp_path / "video.mp4", seed, **settings)
    (needle,) = video.needles
    frames, times = decode(video.path)
    off = np.abs(frames - render(replace(video, needles=[]))).max(axis=-1)
    area = (off > 64).mean(axis=(1, 2))  # coding noise is smaller than that
    # Half a frame before the edges, where no frame lies.
    shown = (times > needle.start - 0.5 / video.fps) & (times < needle.start + needle.duration - 0.5 / video.fps)
    assert shown.sum() == round(needle.duration * video.fps)
    assert area[shown].min() > 0.008
    assert area[~shown].max(initial=0.0) < 0.004


def test_the_needle_is_where_the_truth_says():
    for seed in range(8):
        _, needle = needle_image(seed, (96, 128))
        video = NeedleVideo(seed, 1, 1.0, (96, 128), [replace(needle, halo=False)])
        rows, columns = np.nonzero((render(video) != render(replace(video, needles=[])))[0].any(axis=-1))
        assert (columns.min() + columns.max() + 1) / 2 == pytest.approx(needle.x * 128, abs=2)
        assert (rows.min() + rows.max() + 1) / 2 == pytest.approx(needle.y * 96, abs=3)
        assert rows.max() + 1 - rows.min() == pytest.approx(needle.size * 96, rel=0.25)
        assert NEEDLE_SIZES[0] <= needle.size <= NEEDLE_SIZES[1]


def test_a_glyph_shows_its_colour():
    for value in SHAPES + DIGITS:
        for name, colour in COLOURS.items():
            with_glyph, without = still(value, name)
            glyph = with_glyph[(with_glyph != without).any(axis=-1)]
            assert (np.abs(glyph - colour).max(axis=-1) < 4).mean() > 0.3, (value, name)


def test_glyphs_differ_from_each_other():
    drawn = {value: still(value)[0] for value in SHAPES + DIGITS}
    for one, other in combinations(drawn, 2):
        assert (np.abs(drawn[one] - drawn[other]).max(axis=-1) > 100).sum() > 40, (one, other)


def test_the_same_seed_gives_the_same_file(tmp_path):
    one = write_needle_video(tmp_path / "one.mp4", 7, duration=10.0)
    other = write_needle_video(tmp_path / "other.mp4", 7, duration=10.0)
    assert replace(one, path=None) == replace(other, path=None)
    assert one.path.read_bytes() == other.path.read_bytes()
    np.testing.assert_array_equal(render(one), render(other))


def test_seeds_give_different_backgrounds_and_needles():
    videos = [NeedleVideo(seed, 1, 1.0, (64, 64), []) for seed in (*range(20), 2**32)]
    for one, other in combinations([render(video) for video in videos], 2):
        assert np.abs(one - other).mean() > 4
    needles = [needle_image(seed, (64, 64))[1] for seed in range(200)]
    assert {needle.value for needle in needles} == {*SHAPES, *DIGITS}
    assert {needle.colour for needle in needles} == {*COLOURS}
    assert len({(needle.x, needle.y, needle.size) for needle in needles}) == 200


def test_the_picture_moves_and_cuts():
    frames = render(NeedleVideo(11, 64, 2.0, (64, 64), []))
    change = np.abs(np.diff(frames, axis=0)).mean(axis=(1, 2, 3))
    assert change.min() > 0
    assert change.max() > 4 * np.median(change)


@pytest.mark.parametrize(
    "duration, fps, size", [(10.0, 2.0, (128, 128)), (12.0, 24.0, (90, 160)), (11.0, 29.97, (64, 48))]
)
def test_the_file_is_h264_of_the_stated_length(tmp_path, duration, fps, size):
    video = write_needle_video(tmp_path / "video.mp4", 1, duration=duration, fps=fps, size=size)
    assert video.num_frames == round(duration * fps)
    assert video.duration == pytest.approx(duration, abs=0.5 / fps)
    with av.open(str(video.path)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert (stream.height, stream.width) == size
        assert stream.frames == video.num_frames
        assert float(stream.average_rate) == pytest.approx(fps)
        assert float(stream.duration * stream.time_base) == pytest.approx(duration, abs=0.5 / fps)
        keys = np.array([packet.is_keyframe for packet in container.demux(stream) if packet.size])
    assert np.diff(np.flatnonzero(keys), append=len(keys)).max() <= 60


def test_sampling_at_the_default_rate_meets_every_needle(tmp_path):
    for seed in range(12):
        duration = (10.0, 32.0, 100.0)[seed % 3]
        video = write_needle_video(tmp_path / "video.mp4", seed, duration=duration, fps=6.0, size=(32, 32))
        (needle,) = video.needles
        count = min(64, round(2 * duration))
        times = np.arange(count) * (duration / count)
        hits = ((times >= needle.start) & (times < needle.start + needle.duration)).sum()
        assert 1 <= hits <= 4


def test_questions_name_the_needle():
    needle = Needle("shape", "star", "red", 1.0, 1.0, 0.5, 0.5, 0.3, False)
    asked = dict(questions(NeedleVideo(0, 64, 2.0, (128, 128), [needle])))
    assert asked["What shape appears in the video?"] == "star"
    assert asked["What colour is the shape?"] == "red"
    assert asked["What color is the shape?"] == "red"
    assert set(asked.values()) == {"star", "red"}

    asked = dict(needle_questions(replace(needle, kind="digit", value="7"), "image"))
    assert asked["Which digit appears in the image?"] == "7"
    assert asked["What colour is the digit?"] == "red"
    assert not any("{" in question or "video" in question or "shape" in question for question in asked)

    with pytest.raises(ValueError, match="one needle, this one has 2"):
        questions(NeedleVideo(0, 64, 2.0, (128, 128), [needle, needle]))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"seed": -1}, "seed must not be negative, got -1"),
        ({"fps": 0}, "fps must be above 0 and at most 240, got 0"),
        ({"fps": float("nan")}, "fps must be above 0"),
        ({"duration": 0.0}, "duration 0.0 s holds no frame"),
        ({"duration": float("inf")}, "duration inf s holds no frame"),
        ({"size": (127, 128)}, r"size must be \(height, width\), both even and at least 32, got \(127, 128\)"),
        ({"size": (128,)}, r"size must be \(height, width\)"),
        ({"needle_seconds": 0.0}, "needle_seconds must be above 0"),
        ({"needle_seconds": 33.0}, r"at most the duration \(32.0 s\), got 33.0"),
    ],
)
def test_impossible_settings_leave_no_file(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        write_needle_video(tmp_path / "video.mp4", **{"seed": 0, **settings})
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_nothing_behind(tmp_path):
    (tmp_path / "video.mp4").mkdir()
    with pytest.raises(OSError):
        write_needle_video(tmp_path / "video.mp4", 0, duration=2.0)
    assert [path.name for path in tmp_path.iterdir()] == ["video.mp4"]
