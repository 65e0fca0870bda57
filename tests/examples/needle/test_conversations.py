import random
from collections import defaultdict
from dataclasses import replace

import pytest
from needle.conversations import ask_about_video
from needle.glyphs import DIGITS, SHAPES
from needle.plan import plan_video
from needle.questions import NOTHING

from mambamia_hf.frame_times import format_time


MISSING = {"no time": NOTHING, "no colour": NOTHING, "no count": "0"}


def make_plan(task, seed=3):
    return plan_video(seed, task=task, duration=32, fps=1.0, num_frames=32)


@pytest.mark.parametrize(
    "task, kinds",
    [
        ("retrieval", {"when", "retrieval", "open retrieval", "colour", "open counting"}),
        ("when", {"when", "retrieval", "open retrieval", "colour", "open counting"}),
        ("ordering", {"ordering", "open ordering", "when", "colour"}),
        ("counting", {"counting", "open counting", "open retrieval"}),
        ("nothing", {"nothing"}),
    ],
)
def test_kinds_and_answers(task, kinds):
    video = make_plan(task)
    conversations = [ask_about_video(video, random.Random(seed)) for seed in range(200)]
    answers, own = defaultdict(set), "retrieval" if task == "when" else task
    for asked in conversations:
        assert len({one.question for one in asked}) == len(asked), "nothing is asked twice"
        assert sum(one.kind in (own, f"open {own}") for one in asked) == 1 or task == "counting"
        for one in asked:
            answers[one.kind].add(one.answer)
            assert ("Options:" in one.question) == (one.kind == own) or task == "nothing"
    assert set(answers) == kinds | MISSING.keys()
    assert {kind: answers[kind] for kind in MISSING} == {kind: {answer} for kind, answer in MISSING.items()}
    is_first = sum(asked[0].kind in (own, f"open {own}") for asked in conversations)
    assert 100 < is_first < 180

    values = [needle.value for needle in video.needles]
    if "when" in kinds:
        assert answers["when"] == {format_time(needle.start, "mm:ss") for needle in video.needles}
        assert answers["colour"] == {needle.colour for needle in video.needles}
    if own == "retrieval":
        assert answers["retrieval"] == answers["open retrieval"] == set(values)
        assert answers["open counting"] == {"1"}
    if task == "ordering":
        assert answers["ordering"] == answers["open ordering"] == {" ".join(values)}
    if task == "counting":
        assert answers["counting"] == answers["open counting"] == {str(len(values))}
        assert answers["open retrieval"] == {values[0]}
    if task == "nothing":
        assert answers["nothing"] == {NOTHING}


def test_what_is_missing_is_not_in_the_video():
    for seed in range(100):
        video = make_plan("ordering", seed)
        values = {needle.value for needle in video.needles}
        for one in ask_about_video(video, random.Random(seed)):
            if one.kind in MISSING:
                named = set(one.question.rstrip("?.").split()) & {*SHAPES, *DIGITS, "shape", "digit"}
                assert len(named) == 1 and not named & values
                assert named != {"shape"} or not values & set(SHAPES)
                assert named != {"digit"} or not values & set(DIGITS)


def test_a_colour_is_asked_by_kind_where_there_is_one_symbol():
    one = make_plan("retrieval")
    digits = [replace(one.needles[0], kind="digit", value=value) for value in "789"]
    for task, needles, expected in (("retrieval", digits[:1], {"7", "digit"}), ("ordering", digits, {*"789"})):
        video = replace(one, needles=needles, task=task)
        asked = [one for seed in range(60) for one in ask_about_video(video, random.Random(seed))]
        words = {word for one in asked if one.kind == "colour" for word in one.question.rstrip("?.").split()}
        assert words & {*"789", "digit", "shape"} == expected
