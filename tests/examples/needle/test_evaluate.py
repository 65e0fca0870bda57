from argparse import Namespace

import pytest
from needle.evaluate import evaluate, matches
from needle.questions import NOTHING, Question

from mambamia_hf import BUNDLED_CHECKPOINT


@pytest.mark.parametrize("task", ["retrieval", "when", "nothing"])
def test_answers_about_fresh_videos(task):
    arguments = Namespace(
        model=BUNDLED_CHECKPOINT,
        num_frames=32,
        duration=16.0,
        fps=2.0,
        size=(128, 128),
        background=None,
        keep_ratios=[1.0, 0.5],
    )
    answers = [evaluate(arguments, task, seed) for seed in range(8)]
    assert all(answer.keys() == {1.0, 0.5} for answer in answers)
    assert sum(answer[1.0] for answer in answers) >= 6
    assert sum(answer[0.5] for answer in answers) >= 6


@pytest.mark.parametrize(
    "answer, given, interval, right",
    [
        ("01:00", "01:00", 9.4, True),
        ("01:00", "00:51", 9.4, True),
        ("01:00", "01:09", 9.4, True),
        ("01:00", "01:10", 9.4, False),
        ("01:00", "00:59", 0.5, True),
        ("01:00", "00:58", 0.5, False),
        ("01:00", "1:00", 9.4, False),
        ("01:00", "00:60", 9.4, False),
        ("01:00", "at 01:00", 9.4, False),
        ("01:00", NOTHING, 9.4, False),
        ("star", "star", 9.4, True),
        ("star", "stars", 9.4, False),
        (NOTHING, "01:00", 9.4, False),
    ],
)
def test_a_time_may_be_off_by_one_interval(answer, given, interval, right):
    assert matches(Question("?", (), answer), given, interval) is right
