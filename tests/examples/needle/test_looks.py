import random

import pytest
import torch
from needle import looks
from needle.looks import Look, Looks, random_times
from needle.questions import NOTHING
from needle.remembered_videos import RememberedStill
from test_remembered_videos import make_video

from mambamia_hf.frame_times import format_time


@pytest.fixture(autouse=True)
def share_of_splices(monkeypatch):
    monkeypatch.setattr(looks, "SHARE_OF_SPLICES", 0)


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


def test_most_videos_are_spliced(monkeypatch):
    videos = [make_video("when", seed=seed) for seed in range(8)]
    monkeypatch.setattr(looks, "SHARE_OF_SPLICES", 0.75)
    looked = draw(80, videos, [], random.Random(4))
    spliced = [look for look in looked if (look.tokens.flatten().diff() < 0).any()]  # frames of several videos
    assert 45 <= len(spliced) <= 75
    assert {"ordering", "counting"} <= {asked.kind for look in spliced for asked in look.asked}
