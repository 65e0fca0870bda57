"""What a seed decides, and which settings no video can have."""

import numpy as np
import pytest
from needle.plan import LATTICE, SPLITS, TASKS, plan_video


def test_tasks_have_their_needles():
    counts = set()
    for seed in range(24):
        videos = [plan_video(seed, task=task, duration=10.0) for task in TASKS]
        retrieval, ordering, counting, when, nothing = videos
        assert tuple(video.task for video in videos) == TASKS
        assert len(retrieval.needles) == len(when.needles) == 1 and nothing.needles == []
        assert len({needle.value for needle in ordering.needles}) == len(ordering.needles) == 3
        assert len({needle.value for needle in counting.needles}) == 1
        for video in (ordering, counting):
            starts = [needle.start for needle in video.needles]
            assert starts == sorted(starts)
        counts.add(len(counting.needles))
    assert counts == {1, 2, 3, 4}


def test_splits_share_no_places():
    places = {split: set() for split in SPLITS}
    for split, fields in places.items():
        for seed in range(60):
            (needle,) = plan_video(seed, split=split, size=(64, 96)).needles
            fields.add((needle.x, needle.y))
    assert not places["train"] & places["test"]
    for split, fields in places.items():
        steps = np.array(sorted(fields)) * LATTICE
        np.testing.assert_allclose(steps, steps.round(), atol=1e-9)
        assert set(steps.round().astype(int).sum(axis=1) % 2) == {0 if split == "train" else 1}
        assert len(fields) > 50


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
        ({"task": "reading"}, "task must be one of retrieval, ordering, counting, when, nothing, got 'reading'"),
        ({"split": "dev"}, "split must be one of train, test, got 'dev'"),
        ({"num_frames": 0}, "num_frames must be at least 1, got 0"),
        ({"duration": 2.0, "task": "ordering"}, "4 sampled frames have no room for 3 needles of 0.5 s, as ordering"),
        ({"num_frames": 6, "task": "counting"}, "6 sampled frames have no room for 4 needles of 5.5 s, as counting"),
        ({"needle_seconds": 9.0, "task": "counting"}, "no room for 4 needles"),
        ({"needle_seconds": 0.4}, "needle_seconds is 0.4, but 64 frames sampled from 32.0 s lie 0.5 s apart"),
        ({"needle_seconds": 0.0}, "needle_seconds must be above 0"),
        ({"needle_seconds": 33.0}, r"at most the duration \(32.0 s\), got 33.0"),
    ],
)
def test_impossible_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        plan_video(**{"seed": 0, **settings})
