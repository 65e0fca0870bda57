import random
from collections import Counter

import pytest
from needle.plan import MAX_COUNT, NUM_ORDERED, TASKS
from needle.seen_videos import SeenVideo
from needle.spliced_videos import AFTER, BEFORE, QUIET, TASK_WEIGHTS, Splicer
from test_seen_videos import make_video


NUM_FRAMES = 48


def make_videos(tasks=TASKS, count: int = 30) -> list[SeenVideo]:
    """Videos whose features say which video and which frame they are."""
    videos = [make_video(tasks[seed % len(tasks)], NUM_FRAMES, seed) for seed in range(count)]
    return [SeenVideo(video.plan, 1000 * number + video.features) for number, video in enumerate(videos)]


def test_spliced_videos_are_what_their_plan_says():
    videos, rng, tasks, sources = make_videos(), random.Random(0), Counter(), set()
    splicer = Splicer(videos)
    for _ in range(300):
        spliced = splicer.draw(rng, 384)
        plan, frames = spliced.plan, spliced.features.flatten().int().tolist()
        tasks[plan.task] += 1
        values = [needle.value for needle in plan.needles]
        num_symbols = {"ordering": NUM_ORDERED, "nothing": 0}.get(plan.task, 1)
        assert len(set(values)) == num_symbols
        assert len(values) == num_symbols or plan.task == "counting" and len(values) <= MAX_COUNT
        for needle, shown in zip(plan.needles, spliced.shown, strict=True):
            number, first = divmod(frames[shown.start], 1000)
            which = [there.start for there in videos[number].shown].index(first)
            source = videos[number].plan.needles[which]
            assert (needle.value, needle.colour) == (source.value, source.colour)
            assert [frames[place] for place in shown] == [
                1000 * number + frame for frame in videos[number].shown[which]
            ]
            sources.add((number, which))
        # Nothing appears that the plan does not know, and all of it does.
        for place, (number, frame) in enumerate(divmod(feature, 1000) for feature in frames):
            is_needle = any(frame in shown for shown in videos[number].shown)
            assert is_needle == any(place in shown for shown in spliced.shown)
        ends = zip(spliced.shown, spliced.shown[1:], strict=False)
        assert all(earlier.stop < later.start for earlier, later in ends)
        assert plan.total_num_frames == 384
    assert set(tasks) == set(TASKS) == set(TASK_WEIGHTS)
    assert {which for _, which in sources} >= {0, 1, 2}  # later needles of a video, too


def test_windows_need_room():
    splicer, rng = Splicer(make_videos()), random.Random(2)
    lengths = {len(splicer.draw(rng, 16).features) for _ in range(100)}
    assert 16 in lengths and 16 < max(lengths) <= MAX_COUNT * (BEFORE + AFTER + 6)


def test_the_same_needles_come_again_in_another_order_at_other_places():
    splicer, rng = Splicer(make_videos(("ordering",), 6)), random.Random(1)
    drawn = {tuple((needle.value, needle.start) for needle in splicer.draw(rng, 384).plan.needles) for _ in range(100)}
    assert len(drawn) > 80


def test_a_task_needs_enough_symbols():
    splicer = Splicer(make_videos(("nothing",), 2))
    assert {splicer.draw(random.Random(seed), 384).plan.task for seed in range(5)} == {"nothing"}
    with pytest.raises(ValueError, match=f"None of 1 videos has {QUIET} frames in a row without a needle"):
        Splicer([make_video("nothing", QUIET - 1)])
