import random
from collections import Counter

import pytest
import torch
from needle.plan import MAX_COUNT, NUM_ORDERED, TASKS
from needle.remembered_videos import LENGTHS, RememberedVideo
from needle.spliced_videos import AFTER, BEFORE, QUIET, Splicer
from test_remembered_videos import make_video


NUM_FRAMES = 48


def make_videos(tasks=TASKS, count: int = 30) -> list[RememberedVideo]:
    """Videos whose tokens say which video and which frame they are."""
    videos = [make_video(tasks[seed % len(tasks)], NUM_FRAMES, seed) for seed in range(count)]
    return [
        RememberedVideo(video.plan, 1000 * number + video.tokens, video.deltas) for number, video in enumerate(videos)
    ]


def needle_frames(video: RememberedVideo) -> list[range]:
    fps = video.plan.fps
    return [
        range(round(needle.start * fps), round((needle.start + needle.duration) * fps))
        for needle in video.plan.needles
    ]


def test_spliced_videos_are_what_their_plan_says():
    videos, rng, tasks = make_videos(), random.Random(0), Counter()
    splicer = Splicer(videos)
    for _ in range(300):
        spliced = splicer.draw(rng)
        plan, frames = spliced.plan, spliced.tokens.flatten().int().tolist()
        tasks[plan.task] += 1
        assert len(frames) == len(spliced.deltas) == plan.total_num_frames
        values = [needle.value for needle in plan.needles]
        num_symbols = {"ordering": NUM_ORDERED, "nothing": 0}.get(plan.task, 1)
        assert len(set(values)) == num_symbols
        assert len(values) == num_symbols or plan.task == "counting" and len(values) <= MAX_COUNT
        shown = {}
        for needle, first in zip(plan.needles, spliced.first_frames, strict=True):
            number, frame = divmod(frames[first], 1000)
            source = videos[number].plan.needles[0]
            assert (needle.value, needle.colour) == (source.value, source.colour)
            assert frame == videos[number].first_frames[0]
            shown.update({first + index: needle for index in range(len(needle_frames(videos[number])[0]))})
        for place, (number, frame) in enumerate(divmod(token, 1000) for token in frames):
            is_needle = any(frame in needle for needle in needle_frames(videos[number]))
            assert is_needle == (place in shown)  # nothing appears that the plan does not know, and all of it does
            later = videos[number].first_frames[1:]
            assert not later or frame < later[0]
        firsts = spliced.first_frames
        assert all(later - first > 1 for first, later in zip(firsts, firsts[1:], strict=False))
        assert plan.total_num_frames <= max(LENGTHS) + MAX_COUNT * (BEFORE + AFTER + 6)
    assert set(tasks) == set(TASKS)


def test_the_same_needles_come_again_in_another_order_at_other_places():
    splicer, rng = Splicer(make_videos(("ordering",), 6)), random.Random(1)
    drawn = {tuple((needle.value, needle.start) for needle in splicer.draw(rng).plan.needles) for _ in range(100)}
    assert len(drawn) > 80


def test_a_task_needs_enough_symbols():
    splicer = Splicer(make_videos(("nothing",), 2))
    assert {splicer.draw(random.Random(seed)).plan.task for seed in range(5)} == {"nothing"}
    video = make_video("nothing", QUIET - 1)
    with pytest.raises(ValueError, match=f"None of 1 videos begins with {QUIET} frames without a needle"):
        Splicer([RememberedVideo(video.plan, torch.zeros(QUIET - 1, 1, 1), video.deltas)])
