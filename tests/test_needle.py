"""The needle videos: the file shows what the ground truth says, and nothing else."""

import json
import subprocess
import sys
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import av
import numpy as np
import pytest
from av.video.reformatter import VideoReformatter
from video_files import draw_number, read_number, write_video

from mambamia_hf import MambaMiaVideoProcessor
from mambamia_hf.needle import (
    CHOICE_QUESTIONS,
    COLOURS,
    DIGITS,
    LATTICE,
    NEEDLE_SIZES,
    SHAPES,
    TASKS,
    Needle,
    NeedleVideo,
    multiple_choice,
    needle_frames,
    needle_image,
    needle_multiple_choice,
    needle_questions,
    questions,
    render_frames,
    write_needle_video,
)
from mambamia_hf.video_decoding import decode_video


GENERATE = Path(__file__).parents[1] / "examples" / "needle" / "generate.py"


def decode(path):
    """All frames of a file (frames, height, width, 3) and their times in seconds."""
    reformatter = VideoReformatter()
    with av.open(str(path)) as container:
        frames = [reformatter.reformat(frame, format="rgb24") for frame in container.decode(video=0)]
    return np.stack([frame.to_ndarray() for frame in frames]), np.array([frame.time for frame in frames])


def sample(video, num_frames):
    """The numbers of the frames that a model reads, and these frames (frames, height, width, 3)."""
    processor = MambaMiaVideoProcessor(num_frames=num_frames, fps=2)
    frames, metadata = decode_video(video.path, processor.sample_frames)
    return np.array(metadata.frames_indices), frames.permute(0, 2, 3, 1).numpy()


def render(video):
    return np.stack([np.asarray(frame) for frame in render_frames(video)]).astype(np.int16)


def changed_area(frames, without):
    """The share of each frame that is not as it is `without` needles; coding noise is smaller than that."""
    return (np.abs(frames - without).max(axis=-1) > 64).mean(axis=(1, 2))


def still(value, colour="white", size=0.3):
    """The pixels of a glyph in the middle of a 96 x 96 frame, and of that frame without it."""
    kind = "shape" if value in SHAPES else "digit"
    needle = Needle(kind, value, colour, start=0.0, duration=1.0, x=0.5, y=0.5, size=size, halo=False)
    video = NeedleVideo(seed=0, total_num_frames=1, fps=1.0, size=(96, 96), needles=[needle])
    return render(video)[0], render(replace(video, needles=[]))[0]


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


def test_tasks_have_their_needles(tmp_path):
    counts = set()
    for seed in range(24):
        retrieval, ordering, counting = (
            write_needle_video(tmp_path / "video.mp4", seed, task=task, duration=10.0, size=(32, 32)) for task in TASKS
        )
        assert (retrieval.task, ordering.task, counting.task) == TASKS
        assert len(retrieval.needles) == 1
        assert len({needle.value for needle in ordering.needles}) == len(ordering.needles) == 3
        assert len({needle.value for needle in counting.needles}) == 1
        for video in (ordering, counting):
            starts = [needle.start for needle in video.needles]
            assert starts == sorted(starts)
        counts.add(len(counting.needles))
    assert counts == {1, 2, 3, 4}


def test_splits_share_neither_places_nor_backgrounds():
    stills = {split: [needle_image(seed, (64, 96), split) for seed in range(60)] for split in ("train", "test")}
    places = {split: {(needle.x, needle.y) for _, needle in drawn} for split, drawn in stills.items()}
    assert not places["train"] & places["test"]
    for split, fields in places.items():
        steps = np.array(sorted(fields)) * LATTICE
        np.testing.assert_allclose(steps, steps.round(), atol=1e-9)
        assert set(steps.round().astype(int).sum(axis=1) % 2) == {0 if split == "train" else 1}
        assert len(fields) > 50
    for (one, _), (other, _) in zip(*stills.values(), strict=True):
        assert np.abs(np.asarray(one, int) - np.asarray(other, int)).mean() > 4


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


def test_a_glyph_shows_its_colour():
    for value in SHAPES + DIGITS:
        for name, colour in COLOURS.items():
            with_glyph, without = still(value, name)
            glyph = with_glyph[(with_glyph != without).any(axis=-1)]
            assert (np.abs(glyph - colour).max(axis=-1) < 6).mean() > 0.3, (value, name)


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
    frames = render(NeedleVideo(2, 64, 2.0, (64, 64), []))
    change = np.abs(np.diff(frames, axis=0)).mean(axis=(1, 2, 3))
    assert change.min() > 0
    assert change.max() > 4 * np.median(change)


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


def test_multiple_choice(tmp_path):
    needles = [
        Needle("shape" if value in SHAPES else "digit", value, "red", start, 1.0, 0.5, 0.5, 0.3, False)
        for value, start in (("7", 1.0), ("heart", 5.0), ("star", 9.0))
    ]
    retrieval = NeedleVideo(0, 64, 2.0, (128, 128), needles[:1])
    ordering = NeedleVideo(0, 64, 2.0, (128, 128), needles, task="ordering")
    counting = NeedleVideo(0, 64, 2.0, (128, 128), [needles[1]] * 3, task="counting")
    for video, answer in ((retrieval, "7"), (ordering, "7 heart star"), (counting, "3")):
        asked = [multiple_choice(video, seed) for seed in range(60)]
        assert {question.answer for question in asked} == {answer}
        assert all(answer in question.options and len(set(question.options)) == 4 for question in asked)
        assert len({question.text for question in asked}) == len(CHOICE_QUESTIONS[video.task])
        assert not any("{" in question.text for question in asked)
        assert asked == [multiple_choice(video, seed) for seed in range(60)]
        if video is counting:
            assert {question.options for question in asked} == {("1", "2", "3", "4")}
            assert all("heart" in question.text for question in asked)
        else:
            assert {question.options.index(answer) for question in asked} == {0, 1, 2, 3}
    for question in (multiple_choice(ordering, seed) for seed in range(9)):
        assert all(sorted(option.split()) == ["7", "heart", "star"] for option in question.options)
    options = {option for seed in range(60) for option in multiple_choice(retrieval, seed).options}
    assert options == {*SHAPES, *DIGITS}

    question = needle_multiple_choice(needles[1], "image", 3)
    assert question.answer == "heart"
    assert "image" in question.text or "these" in question.text
    assert question.prompt == f"{question.text} Options: {'; '.join(question.options)}."


def numbered_clip(path, num_frames=20, fps=4):
    images = [draw_number(number, 120, 160) for number in range(num_frames)]
    return write_video(path, num_frames=num_frames, fps=fps, images=images)


def test_a_video_as_background(tmp_path):
    clip = numbered_clip(tmp_path / "clip.mp4")
    starts = set()
    for seed in range(4):
        video = write_needle_video(tmp_path / "video.mp4", seed, duration=20.0, size=(96, 128), background=clip)
        assert video.background == clip
        frames, times = decode(video.path)
        (needle,) = video.needles
        numbers = np.array([read_number(frame.transpose(2, 0, 1)) for frame in frames])
        hidden = (times > needle.start - 0.1) & (times < needle.start + needle.duration - 0.1)
        # Twice a second of four frames a second, and after 5 s from the start.
        expected = (numbers[0 if not hidden[0] else -10] + 2 * np.arange(len(times))) % 20
        assert (numbers == expected)[~hidden].all()
        area = changed_area(frames, render(replace(video, needles=[])))
        assert area[hidden].min() > 0.008 and area[~hidden].max() < 0.004
        starts.add(numbers[0])
    assert len(starts) > 1


def test_a_background_is_cropped_to_the_middle(tmp_path):
    white = np.zeros((48, 160, 3), np.uint8)
    white[:, 56:104] = 255
    clip = write_video(tmp_path / "clip.mp4", num_frames=3, images=[white] * 3)
    video = NeedleVideo(0, 2, 1.0, (64, 64), [], background=clip)
    assert render(video).min() > 230


def test_no_background_at_that_path(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.mp4"):
        write_needle_video(tmp_path / "video.mp4", 0, background=tmp_path / "nowhere.mp4")
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(ValueError, match="text.mp4' cannot be read as a video"):
        write_needle_video(tmp_path / "video.mp4", 0, background=tmp_path / "text.mp4")
    assert [path.name for path in tmp_path.iterdir()] == ["text.mp4"]


def test_an_hour_is_a_small_file(tmp_path):
    video = write_needle_video(tmp_path / "video.mp4", 0, duration=3600.0, fps=30.0, size=(48, 64))
    assert video.path.stat().st_size < 30e6
    with av.open(str(video.path)) as container:
        stream = container.streams.video[0]
        assert stream.frames == video.total_num_frames == 108_000
        assert float(stream.duration * stream.time_base) == pytest.approx(3600.0)


def test_a_picture_may_be_shown_for_many_frames(tmp_path, monkeypatch):
    monkeypatch.setattr("mambamia_hf.needle.MAX_PICTURES", 4)
    settings = {"duration": 60.0, "fps": 10.1, "size": (48, 64), "num_frames": 4}
    video = write_needle_video(tmp_path / "video.mp4", 0, **settings)
    assert video.frames_per_picture == 151
    frames, _ = decode(video.path)
    assert np.abs(frames - render(video)).mean(axis=(1, 2, 3)).max() < 8
    for start in range(0, 606, 151):
        assert (frames[start : start + 151] == frames[start]).all()


def test_a_small_file_stays_legible(tmp_path, monkeypatch):
    monkeypatch.setattr("mambamia_hf.needle.MAX_FILE_BYTES", 100e3)
    video = write_needle_video(tmp_path / "video.mp4", 0, duration=60.0, size=(240, 320), task="ordering")
    assert video.path.stat().st_size < 200e3
    frames, times = decode(video.path)
    original = render(video)
    for needle in video.needles:
        number = np.flatnonzero(times > needle.start - 0.1)[0]
        top, left = (round(place * side) for place, side in ((needle.y, 240), (needle.x, 320)))
        around = np.s_[number, top - 30 : top + 30, left - 30 : left + 30]
        assert np.abs(frames[around] - original[around]).mean() < 16


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
        ({"task": "reading"}, "task must be one of retrieval, ordering, counting, got 'reading'"),
        ({"split": "dev"}, "split must be one of train, test, got 'dev'"),
        ({"num_frames": 0}, "num_frames must be at least 1, got 0"),
        ({"duration": 2.0, "task": "ordering"}, "4 sampled frames have no room for 3 needles, as ordering needs"),
        ({"num_frames": 6, "task": "counting"}, "6 sampled frames have no room for 4 needles, as counting needs"),
        ({"needle_seconds": 9.0, "task": "counting"}, "no room for 4 needles"),
        ({"needle_seconds": 0.4}, "needle_seconds is 0.4, but 64 frames sampled from 32.0 s lie 0.5 s apart"),
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


def generate(folder, *arguments):
    command = [sys.executable, str(GENERATE), "--output", str(folder), "--duration", "10", "--size", "32", "48"]
    return subprocess.run([*command, "--workers", "1", *arguments], capture_output=True, text=True)


def test_generate_writes_a_data_set_and_goes_on_where_it_stopped(tmp_path):
    folder = tmp_path / "needles"
    assert generate(folder, "--num_videos", "2", "--split", "test", "--first_seed", "5").returncode == 0
    file = folder / "records.jsonl"
    records = [json.loads(line) for line in file.read_text().splitlines()]
    assert [record["id"] for record in records] == [f"{task}_test_{seed}" for task in TASKS for seed in (5, 6)]
    for record in records:
        video = write_needle_video(
            tmp_path / "again.mp4", record["seed"], task=record["task"], split="test", duration=10.0, size=(32, 48)
        )
        assert (folder / record["video"]).read_bytes() == video.path.read_bytes()
        question = multiple_choice(video, record["seed"])
        assert [turn["value"] for turn in record["conversations"]] == [f"<video>\n{question.prompt}", question.answer]
        assert (tuple(record["options"]), record["answer"]) == (question.options, question.answer)
        assert [Needle(**needle) for needle in record["needles"]] == video.needles

    # One file is lost, the line of another was cut off, and the others are not made again.
    (folder / records[0]["video"]).unlink()
    text = file.read_text()
    file.write_text(text[:-20])
    kept = folder / records[1]["video"]
    kept.write_bytes(b"kept")
    assert generate(folder, "--num_videos", "2", "--split", "test", "--first_seed", "5").returncode == 0
    assert file.read_text() == text
    assert (folder / records[0]["video"]).stat().st_size > 1000
    assert kept.read_bytes() == b"kept"

    result = generate(folder, "--num_videos", "2", "--split", "test", "--first_seed", "5", "--fps", "3")
    assert result.returncode == 1
    assert "other settings" in result.stderr and "Traceback" not in result.stderr
