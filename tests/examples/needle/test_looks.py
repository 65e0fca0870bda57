from random import Random

import pytest
import torch
from needle import looks
from needle.looks import Look, Looks, random_times
from needle.questions import NOTHING
from needle.seen_videos import SeenStill, SeenVideo
from test_seen_videos import make_video

from mambamia_hf.frame_times import format_time


@pytest.fixture(autouse=True)
def share_of_splices(monkeypatch):
    monkeypatch.setattr(looks, "SHARE_OF_SPLICES", 0)


def draw(count: int, videos, stills, seed: int, most_frames: int = 384) -> list[Look]:
    looks, rng, sizes = Looks(videos, stills), Random(seed), Random(seed + 1)
    return [looks.draw(rng, sizes, most_frames) for _ in range(count)]


def test_a_look_keeps_needles():
    video = make_video("ordering")
    deltas, others, numbers_kept, by_delta = torch.rand(32), torch.rand(32), set(), set()
    for look in draw(60, [video], [], 0):
        kept = look.kept(deltas)
        numbers_kept.add(len(kept))
        assert {shown.start for shown in video.shown} <= set(kept) and kept == sorted(kept)
        assert len(look.times) == len(look.features) == 32 and look.times == sorted(look.times)
        assert "ordering" in {asked.kind.removeprefix("open ") for asked in look.asked}
        if len(kept) < 20:
            by_delta.add(kept != look.kept(others))
    assert 32 in numbers_kept and min(numbers_kept) < 20
    assert by_delta == {True, False}


def test_how_many_needles_have_appeared():
    video = make_video("ordering")
    (look,) = draw(1, [video], [], 0)
    first, second, third = (shown.start for shown in video.shown)
    expected = [0] * first + [1] * (second - first) + [2] * (third - second) + [3] * (32 - third)
    assert look.num_appeared.tolist() == expected


@pytest.mark.parametrize("most_frames", [1, 6, 12])
def test_a_look_at_few_frames(most_frames):
    looked = draw(40, [make_video("ordering")], [], 5, most_frames)
    counts = [len(look.kept(torch.rand(32))) for look in looked]
    assert min(counts) >= 3 and most_frames <= max(counts) <= most_frames + 3


def test_the_answer_to_when_is_the_new_time_of_the_first_frame():
    video = make_video("when")
    answers = set()
    for look in draw(40, [video], [], 1):
        expected = format_time(look.times[video.shown[0].start], "mm:ss")
        given = {asked.answer for asked in look.asked if asked.kind == "when"}
        assert given <= {expected}
        answers |= given
    assert len(answers) > 5


def stills_of(video: SeenVideo) -> list[SeenStill]:
    return [SeenStill(needle, torch.full((1, 1, 1), -1.0)) for needle in (video.plan.needles[0], None)]


def test_stills_come_in_between():
    stills = stills_of(make_video("when"))
    looked = [look for look in draw(200, [make_video("when")], stills, 3) if look.times is None]
    assert 15 < len(looked) < 50 and all(look.features.tolist() == [[[-1.0]]] for look in looked)
    answers = {asked.answer for look in looked for asked in look.asked}
    assert answers == {stills[0].needle.value, stills[0].needle.colour, NOTHING}
    assert all("image" in asked.question or "colo" in asked.question for look in looked for asked in look.asked)


@pytest.mark.parametrize("num_frames", [16, 384])
def test_times_are_even_and_within_an_hour(num_frames):
    rng = Random(2)
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
    looked = draw(80, videos, [], 4)
    spliced = [look for look in looked if (look.features.flatten().diff() != 1).any()]  # frames of several videos
    assert 45 <= len(spliced) <= 75
    assert {"ordering", "counting"} <= {asked.kind for look in spliced for asked in look.asked}


def test_looks_of_the_same_sizes_are_about_as_long(monkeypatch):
    """So processes that draw other looks of the same sizes do not wait for each other."""
    monkeypatch.setattr(looks, "SHARE_OF_SPLICES", 0.5)
    videos = [make_video("counting", num_frames, seed) for num_frames in (64, 128, 384) for seed in range(3)]
    both = [Looks(videos, stills_of(videos[0])), Looks(videos, stills_of(videos[0]))]
    others, sizes, contents = 0, [Random(6), Random(6)], [Random(7), Random(8)]
    for _ in range(100):
        first, second = (one.draw(rng, size, 384) for one, rng, size in zip(both, contents, sizes, strict=True))
        assert (first.times is None) == (second.times is None)
        assert len(first.features) == pytest.approx(len(second.features), abs=64)  # windows of a short splice
        assert first.keep_frames == second.keep_frames
        others += first.times is not None and not torch.equal(first.features, second.features)
    assert others > 25
