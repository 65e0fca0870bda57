import random

import pytest
import torch
from needle import remembered_videos
from needle.plan import TASKS, plan_video
from needle.questions import NOTHING
from needle.remembered_videos import (
    Look,
    Looks,
    RememberedStill,
    RememberedVideo,
    random_times,
    remember,
    video_settings,
)

from mambamia_hf import BUNDLED_CHECKPOINT, MambaMiaForConditionalGeneration
from mambamia_hf.frame_times import format_time


def make_video(task: str, num_frames: int = 32, seed: int = 3) -> RememberedVideo:
    """A video whose tokens are the numbers of its frames, and whose Δ are random."""
    plan = plan_video(seed, task=task, duration=num_frames, fps=1.0, num_frames=num_frames)
    tokens = torch.arange(float(num_frames))[:, None, None]
    return RememberedVideo(plan, tokens, torch.rand(num_frames, generator=torch.Generator().manual_seed(seed)))


def test_memories_are_written_once_and_fit_the_plan(tmp_path, monkeypatch):
    monkeypatch.setattr(remembered_videos, "LENGTHS", (16,))
    remember(str(BUNDLED_CHECKPOINT), tmp_path, 23)
    written = (tmp_path / "23.memory").stat().st_mtime_ns
    remember(str(BUNDLED_CHECKPOINT), tmp_path, 23)
    assert (tmp_path / "23.memory").stat().st_mtime_ns == written

    model = MambaMiaForConditionalGeneration.from_pretrained(BUNDLED_CHECKPOINT)
    video = RememberedVideo.load(model, tmp_path, 23)
    assert video.tokens.shape == (16, 1, 128) and video.deltas.shape == (16,)
    assert video.plan.task == TASKS[23 % len(TASKS)] == "when" and video.plan.split == "train"
    (needle,) = video.plan.needles
    (first,) = video.first_frames
    assert needle.start == pytest.approx(first / video.plan.fps)
    # Frames differ most where the needle is, and just after it, as the compressor notices that it has gone.
    change = (video.tokens - video.tokens.median(dim=0).values).norm(dim=(1, 2))
    assert first <= change.argmax() <= first + round(needle.duration * video.plan.fps)

    (tmp_path / "23.memory").rename(tmp_path / "24.memory")
    monkeypatch.setattr(remembered_videos, "LENGTHS", (8,))
    with pytest.raises(ValueError, match=r"24.memory has 16 frames and the video of this seed 8; remove the file"):
        RememberedVideo.load(model, tmp_path, 24)


def test_settings_are_of_the_train_split_and_at_most_an_hour():
    videos = [plan_video(seed, **video_settings(seed)) for seed in range(60)]
    assert {video.task for video in videos} == set(TASKS)
    assert {video.total_num_frames for video in videos} == set(remembered_videos.LENGTHS)
    assert all(video.split == "train" and video.duration <= 3650 for video in videos)


def draw(count: int, videos, stills, rng: random.Random, most_frames: int = 384) -> list[Look]:
    looks = Looks(videos, stills, rng)
    return [looks.draw(most_frames) for _ in range(count)]


def test_a_look_keeps_needles_and_their_times():
    video, rng = make_video("ordering"), random.Random(0)
    numbers_kept = set()
    for look in draw(40, [video], [], rng):
        frames = look.tokens.flatten().int().tolist()
        numbers_kept.add(len(frames))
        assert set(video.first_frames) <= set(frames) and frames == sorted(frames)
        assert len(look.times) == len(frames) and look.times == sorted(look.times)
        assert "ordering" in {asked.kind.removeprefix("open ") for asked in look.asked}
    assert 32 in numbers_kept and min(numbers_kept) < 20


@pytest.mark.parametrize("most_frames", [1, 6, 12])
def test_a_look_at_few_frames(most_frames):
    video = make_video("ordering")
    counts = [len(look.tokens) for look in draw(40, [video], [], random.Random(5), most_frames)]
    assert min(counts) >= 3 and most_frames <= max(counts) <= most_frames + 3


def test_the_answer_to_when_is_the_new_time_of_the_first_frame():
    video, rng = make_video("when"), random.Random(1)
    answers = set()
    for look in draw(20, [video], [], rng):
        frames = look.tokens.flatten().int().tolist()
        expected = format_time(look.times[frames.index(video.first_frames[0])], "mm:ss")
        (given,) = (asked.answer for asked in look.asked if asked.kind == "when")
        assert given == expected
        answers.add(given)
    assert len(answers) > 5


def test_stills_come_in_between():
    stills = [
        RememberedStill(needle, torch.full((1, 1, 1), -1.0)) for needle in (make_video("when").plan.needles[0], None)
    ]
    looked = [look for look in draw(200, [make_video("when")], stills, random.Random(3)) if look.times is None]
    assert 30 < len(looked) < 70 and all(look.tokens.tolist() == [[[-1.0]]] for look in looked)
    answers = {asked.answer for look in looked for asked in look.asked}
    assert answers == {stills[0].needle.value, stills[0].needle.colour, NOTHING}
    assert all("image" in asked.question or "colo" in asked.question for look in looked for asked in look.asked)


@pytest.mark.parametrize("num_frames", [16, 384])
def test_times_are_even_and_within_an_hour(num_frames):
    rng = random.Random(2)
    intervals = set()
    for _ in range(200):
        times = random_times(num_frames, rng)
        interval = times[1] - times[0]
        assert 0 <= times[0] and times[-1] <= 3600
        assert times[-1] - times[0] == pytest.approx((num_frames - 1) * interval)
        intervals.add(round(interval, 6))
    assert min(intervals) >= 0.5 and max(intervals) == 3600 / num_frames
