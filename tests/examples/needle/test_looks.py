import random

import pytest
import torch
from needle import looks
from needle.looks import Look, Looks, random_times
from needle.questions import NOTHING
from needle.seen_videos import SeenStill
from test_seen_videos import make_video

from mambamia_hf.frame_times import format_time


@pytest.fixture(autouse=True)
def share_of_splices(monkeypatch):
    monkeypatch.setattr(looks, "SHARE_OF_SPLICES", 0)


def draw(count: int, videos, stills, rng: random.Random, most_frames: int = 384) -> list[Look]:
    looks = Looks(videos, stills, rng)
    return [looks.draw(most_frames) for _ in range(count)]


def test_a_look_keeps_needles():
    video, rng = make_video("ordering"), random.Random(0)
    deltas, others, numbers_kept, by_delta = torch.rand(32), torch.rand(32), set(), set()
    for look in draw(60, [video], [], rng):
        kept = look.kept(deltas)
        numbers_kept.add(len(kept))
        assert {shown.start for shown in video.shown} <= set(kept) and kept == sorted(kept)
        assert len(look.times) == len(look.features) == 32 and look.times == sorted(look.times)
        assert "ordering" in {asked.kind.removeprefix("open ") for asked in look.asked}
        if len(kept) < 20:
            by_delta.add(kept != look.kept(others))
    assert 32 in numbers_kept and min(numbers_kept) < 20
    assert by_delta == {True, False}


@pytest.mark.parametrize("most_frames", [1, 6, 12])
def test_a_look_at_few_frames(most_frames):
    looked = draw(40, [make_video("ordering")], [], random.Random(5), most_frames)
    counts = [len(look.kept(torch.rand(32))) for look in looked]
    assert min(counts) >= 3 and most_frames <= max(counts) <= most_frames + 3


def test_the_answer_to_when_is_the_new_time_of_the_first_frame():
    video, rng = make_video("when"), random.Random(1)
    answers = set()
    for look in draw(20, [video], [], rng):
        expected = format_time(look.times[video.shown[0].start], "mm:ss")
        (given,) = (asked.answer for asked in look.asked if asked.kind == "when")
        assert given == expected
        answers.add(given)
    assert len(answers) > 5


def test_stills_come_in_between():
    stills = [SeenStill(needle, torch.full((1, 1, 1), -1.0)) for needle in (make_video("when").plan.needles[0], None)]
    looked = [look for look in draw(200, [make_video("when")], stills, random.Random(3)) if look.times is None]
    assert 15 < len(looked) < 50 and all(look.features.tolist() == [[[-1.0]]] for look in looked)
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
    spliced = [look for look in looked if (look.features.flatten().diff() != 1).any()]  # frames of several videos
    assert 45 <= len(spliced) <= 75
    assert {"ordering", "counting"} <= {asked.kind for look in spliced for asked in look.asked}
