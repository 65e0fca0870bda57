"""The needle videos: the file shows what the ground truth says, and nothing else."""

from dataclasses import replace

import av
import numpy as np
import pytest
from needle.plan import LATTICE, NEEDLE_SIZES, TASKS, NeedleVideo, plan_video
from needle.video import needle_frames, needle_image, render_frames, write_needle_video
from needle_pixels import changed_area, decode, render
from PIL import Image

from mambamia_hf import MambaMiaVideoProcessor
from mambamia_hf.video_decoding import decode_video


def sample(video, num_frames):
    """The numbers of the frames that a model reads, and these frames (frames, height, width, 3)."""
    processor = MambaMiaVideoProcessor(num_frames=num_frames, fps=2)
    frames, metadata = decode_video(video.path, processor.sample_frames)
    return np.array(metadata.frames_indices), frames.permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize(
    "seed, settings",
    [
        (0, {}),
        (1, {"duration": 10.0, "fps": 12.5, "size": (96, 160), "needle_seconds": 1.0}),
        (2, {"duration": 120.0, "fps": 1.0, "size": (120, 96), "task": "counting"}),
        (3, {"duration": 10.0, "fps": 30000 / 1001, "needle_seconds": 0.51, "task": "ordering"}),
        (4, {"duration": 40.0, "fps": 0.5, "size": (64, 64), "split": "test"}),
        (5, {"duration": 10.0, "fps": 4.0, "needle_seconds": 10.0}),
        (6, {"duration": 750.0, "fps": 5.3, "size": (48, 66), "task": "ordering"}),  # pictures of several frames
    ],
)
def test_the_needles_are_in_their_frames_and_in_no_others(tmp_path, seed, settings):
    video = write_needle_video(tmp_path / "video.mp4", seed, **settings)
    frames, times = decode(video.path)
    area = changed_area(frames, render(replace(video, needles=[])))
    shown = np.zeros(len(frames), bool)
    for needle in video.needles:
        # Half a frame before the edges, where no frame lies.
        start, end = needle.start - 0.5 / video.fps, needle.start + needle.duration - 0.5 / video.fps
        here = (times > start) & (times < end)
        assert here.sum() == round(needle.duration * video.fps)
        shown |= here
    assert area[shown].min() > 0.008
    assert area[~shown].max(initial=0.0) < 0.004


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(
    "num_frames, settings",
    [
        (384, {"duration": 10.0, "fps": 2.0}),
        (384, {"duration": 10.0, "fps": 12.7}),
        (8, {"duration": 60.0, "fps": 3.0}),
        (16, {"duration": 100.0, "fps": 0.2}),
        (100, {"duration": 1000.0, "fps": 2.5}),
        (384, {"duration": 3600.0, "fps": 0.7, "split": "test"}),
    ],
)
def test_sampling_meets_every_needle_and_the_time_between(tmp_path, task, num_frames, settings):
    for seed in range(2):
        path = tmp_path / "video.mp4"
        video = write_needle_video(path, seed, task=task, size=(48, 32), num_frames=num_frames, **settings)
        indices, frames = sample(video, num_frames)
        assert len(indices) == min(num_frames, round(2 * settings["duration"]), video.total_num_frames)
        shown = changed_area(frames, render(replace(video, needles=[]))[indices]) > 0.006
        edges = np.flatnonzero(np.diff(shown, prepend=False, append=False)).reshape(-1, 2)  # first, first after
        assert len(edges) == len(video.needles)
        assert np.all(edges[:, 1] - edges[:, 0] <= 5)
        assert np.all(edges[1:, 0] - edges[:-1, 1] >= (2 if len(indices) >= 20 else 1))
        if len(indices) < 1000:
            assert len(np.unique(indices // video.frames_per_picture)) == len(indices)


def test_frames_with_and_without_needles():
    frames = needle_frames(5, 64, (64, 96))
    shown = [needle for _, needle in frames if needle is not None]
    assert 20 < len(shown) < 44
    assert len({needle.value for needle in shown}) > 10
    blank = NeedleVideo(5, 64, 1.0, (64, 96), [])
    for (image, needle), background in zip(frames, render_frames(blank), strict=True):
        off = np.abs(np.asarray(image, int) - np.asarray(background, int)).max(axis=-1) > 64
        if needle is None:
            assert not off.any()
            continue
        rows, columns = np.nonzero(off)
        assert off.mean() > 0.008
        reach = (1.0 if needle.halo else 0.6) * needle.size * 64
        assert np.abs(rows - 64 * needle.y).max() < reach
        assert np.abs(columns - 96 * needle.x).max() < reach


def test_the_needle_is_where_the_truth_says():
    for seed in range(8):
        _, needle = needle_image(seed, (96, 128))
        video = NeedleVideo(seed, 1, 1.0, (96, 128), [replace(needle, halo=False)])
        off = np.abs(render(video) - render(replace(video, needles=[])))[0].max(axis=-1) > 2
        rows, columns = np.nonzero(off)
        assert (columns.min() + columns.max() + 1) / 2 == pytest.approx(needle.x * 128, abs=2.5)
        assert (rows.min() + rows.max() + 1) / 2 == pytest.approx(needle.y * 96, abs=3)
        assert rows.max() + 1 - rows.min() == pytest.approx(needle.size * 96, rel=0.25)
        assert NEEDLE_SIZES[0] <= needle.size <= NEEDLE_SIZES[1]


@pytest.mark.parametrize(
    "seed, settings, shown, pictures",
    [
        (
            0,
            {},
            [("cross", "red", 17.5, 1.5, 11, 37, 0.3697, False)],
            {0: [[98, 75, 91], [92, 66, 69], [99, 71, 83]], 63: [[60, 48, 46], [53, 34, 47], [49, 42, 30]]},
        ),
        (
            4,
            {"duration": 40.0, "fps": 0.5, "size": (64, 64), "split": "test"},
            [("4", "purple", 22.0, 4.0, 15, 20, 0.4349, True)],
            {0: [[49, 67, 82], [116, 112, 85], [108, 102, 83]], 19: [[61, 81, 87], [86, 53, 105], [46, 39, 101]]},
        ),
        (
            6,
            {"duration": 750.0, "fps": 5.3, "size": (48, 66), "task": "ordering"},
            [
                ("7", "white", 40.755, 6.792, 17, 11, 0.3962, True),
                ("triangle", "purple", 656.604, 4.528, 25, 37, 0.3284, False),
                ("9", "green", 710.943, 6.792, 38, 14, 0.379, True),
            ],
            {0: [[91, 50, 57], [125, 65, 68], [116, 84, 72]], 3974: [[45, 75, 80], [85, 88, 80], [59, 74, 89]]},
        ),
    ],
)
def test_seeds_keep_their_videos(seed, settings, shown, pictures):
    """The bundled model was trained and scored on these videos, so later versions have to make the same ones."""
    video = plan_video(seed, **settings)
    for needle, (value, colour, start, duration, column, row, size, halo) in zip(video.needles, shown, strict=True):
        assert (needle.value, needle.colour, needle.halo) == (value, colour, halo)
        assert (needle.x, needle.y) == (column / LATTICE, row / LATTICE)
        assert (needle.start, needle.duration) == pytest.approx((start, duration), abs=1e-3)
        assert needle.size == pytest.approx(size, abs=1e-4)
    for number, frame in enumerate(render_frames(video)):
        if number in pictures:
            brightness = np.asarray(frame.resize((3, 3), Image.Resampling.BOX)).mean(axis=-1)
            np.testing.assert_allclose(brightness, pictures[number], atol=1.5)


def test_the_same_seed_gives_the_same_file(tmp_path):
    one = write_needle_video(tmp_path / "one.mp4", 7, duration=10.0)
    other = write_needle_video(tmp_path / "other.mp4", 7, duration=10.0)
    assert replace(one, path=None) == replace(other, path=None)
    assert one.path.read_bytes() == other.path.read_bytes()
    np.testing.assert_array_equal(render(one), render(other))


@pytest.mark.parametrize(
    "duration, fps, size", [(10.0, 2.0, (128, 128)), (12.0, 24.0, (90, 160)), (11.0, 29.97, (64, 48))]
)
def test_the_file_is_h264_of_the_stated_length(tmp_path, duration, fps, size):
    video = write_needle_video(tmp_path / "video.mp4", 1, duration=duration, fps=fps, size=size)
    assert video.total_num_frames == round(duration * fps)
    assert video.duration == pytest.approx(duration, abs=0.5 / fps)
    with av.open(str(video.path)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert (stream.height, stream.width) == size
        assert stream.frames == video.total_num_frames
        assert float(stream.average_rate) == pytest.approx(fps)
        assert float(stream.duration * stream.time_base) == pytest.approx(duration, abs=0.5 / fps)
        keys = np.array([packet.is_keyframe for packet in container.demux(stream) if packet.size])
    assert np.diff(np.flatnonzero(keys), append=len(keys)).max() <= 60


def test_an_hour_is_a_small_file(tmp_path):
    video = write_needle_video(tmp_path / "video.mp4", 0, duration=3600.0, fps=30.0, size=(48, 64))
    assert video.path.stat().st_size < 30e6
    with av.open(str(video.path)) as container:
        stream = container.streams.video[0]
        assert stream.frames == video.total_num_frames == 108_000
        assert float(stream.duration * stream.time_base) == pytest.approx(3600.0)


def test_a_picture_may_be_shown_for_many_frames(tmp_path, monkeypatch):
    monkeypatch.setattr("needle.plan.MAX_PICTURES", 4)
    settings = {"duration": 60.0, "fps": 10.1, "size": (48, 64), "num_frames": 4}
    video = write_needle_video(tmp_path / "video.mp4", 0, **settings)
    assert video.frames_per_picture == 151
    frames, _ = decode(video.path)
    assert np.abs(frames - render(video)).mean(axis=(1, 2, 3)).max() < 8
    for start in range(0, 606, 151):
        assert (frames[start : start + 151] == frames[start]).all()


def test_a_small_file_stays_legible(tmp_path, monkeypatch):
    monkeypatch.setattr("needle.video.MAX_FILE_BYTES", 100e3)
    video = write_needle_video(tmp_path / "video.mp4", 0, duration=60.0, size=(240, 320), task="ordering")
    assert video.path.stat().st_size < 200e3
    frames, times = decode(video.path)
    original = render(video)
    for needle in video.needles:
        number = np.flatnonzero(times > needle.start - 0.1)[0]
        top, left = (round(place * side) for place, side in ((needle.y, 240), (needle.x, 320)))
        around = np.s_[number, top - 30 : top + 30, left - 30 : left + 30]
        assert np.abs(frames[around] - original[around]).mean() < 16


def test_a_failed_write_leaves_nothing_behind(tmp_path):
    (tmp_path / "video.mp4").mkdir()
    with pytest.raises(OSError):
        write_needle_video(tmp_path / "video.mp4", 0, duration=2.0)
    assert [path.name for path in tmp_path.iterdir()] == ["video.mp4"]
