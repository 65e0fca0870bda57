from dataclasses import replace

import pytest
from needle.glyphs import DIGITS, SHAPES
from needle.plan import Needle, NeedleVideo
from needle.questions import (
    CHOICE_QUESTIONS,
    NOTHING,
    OPEN_QUESTIONS,
    needle_multiple_choice,
    needle_questions,
    questions,
    task_question,
)


def test_questions_name_the_needle():
    needle = Needle("shape", "star", "red", 1.0, 1.0, 0.5, 0.5, 0.3, False)
    asked = dict(questions(NeedleVideo(0, 64, 2.0, (128, 128), [needle])))
    assert asked["What shape appears in the video?"] == "star"
    assert asked["What appears in the video?"] == "star"
    assert asked["What colour is the shape?"] == "red"
    assert asked["What color is the shape?"] == "red"
    assert set(asked.values()) == {"star", "red"}

    asked = dict(needle_questions(replace(needle, kind="digit", value="7"), "image"))
    assert asked["Which digit appears in the image?"] == "7"
    assert asked["What colour is the digit?"] == "red"
    assert not any("{" in question or "video" in question or "shape" in question for question in asked)

    asked = questions(NeedleVideo(0, 64, 2.0, (128, 128), []))
    assert {answer for _, answer in asked} == {NOTHING}
    assert {"What appears in the video?", "What shape appears in the video?"} < dict(asked).keys()

    with pytest.raises(ValueError, match="one needle or none, this one has 2"):
        questions(NeedleVideo(0, 64, 2.0, (128, 128), [needle, needle]))


def test_task_questions_with_options():
    needles = [
        Needle("shape" if value in SHAPES else "digit", value, "red", start, 1.0, 0.5, 0.5, 0.3, False)
        for value, start in (("7", 1.0), ("heart", 5.0), ("star", 9.0))
    ]
    retrieval = NeedleVideo(0, 64, 2.0, (128, 128), needles[:1])
    ordering = NeedleVideo(0, 64, 2.0, (128, 128), needles, task="ordering")
    counting = NeedleVideo(0, 64, 2.0, (128, 128), [needles[1]] * 3, task="counting")
    for video, answer in ((retrieval, "7"), (ordering, "7 heart star"), (counting, "3")):
        asked = [task_question(video, seed) for seed in range(60)]
        assert {question.answer for question in asked} == {answer}
        assert all(answer in question.options and len(set(question.options)) == 4 for question in asked)
        assert len({question.text for question in asked}) == len(CHOICE_QUESTIONS[video.task])
        assert not any("{" in question.text for question in asked)
        assert asked == [task_question(video, seed) for seed in range(60)]
        if video is counting:
            assert {question.options for question in asked} == {("1", "2", "3", "4")}
            assert all("heart" in question.text for question in asked)
        else:
            assert {question.options.index(answer) for question in asked} == {0, 1, 2, 3}
    for question in (task_question(ordering, seed) for seed in range(9)):
        assert all(sorted(option.split()) == ["7", "heart", "star"] for option in question.options)
    options = {option for seed in range(60) for option in task_question(retrieval, seed).options}
    assert options == {*SHAPES, *DIGITS, NOTHING}

    question = needle_multiple_choice(needles[1], "image", 3)
    assert question.answer == "heart"
    assert "image" in question.text or "these" in question.text
    assert question.prompt == f"{question.text} Options: {'; '.join(question.options)}."


@pytest.mark.parametrize("start, answer", [(8.75, "00:08"), (83.5, "01:23"), (3599.0, "59:59")])
def test_when(start, answer):
    needle = Needle("shape", "heart", "red", start, 1.0, 0.5, 0.5, 0.3, False)
    video = NeedleVideo(0, 3600, 1.0, (128, 128), [needle], task="when")
    asked = [task_question(video, seed) for seed in range(60)]
    assert asked == [task_question(video, seed) for seed in range(60)]
    assert {question.text for question in asked} == {
        wording.format(medium="video", value="heart") for wording in OPEN_QUESTIONS["when"]
    }
    assert all(question.prompt == question.text and question.answer == answer for question in asked)


def test_nothing_does_not_give_itself_away():
    """Where "nothing" is an option, it is right about as often as not, and half of the questions have no options."""
    needle = Needle("digit", "7", "red", 1.0, 1.0, 0.5, 0.5, 0.3, False)
    empty = NeedleVideo(0, 64, 2.0, (128, 128), [], task="nothing")
    asked = [task_question(empty, seed) for seed in range(200)]
    assert {question.answer for question in asked} == {NOTHING}
    offered = [question for question in asked if question.options]
    assert 70 < len(offered) < 130
    assert all(NOTHING in question.options and len(set(question.options)) == 4 for question in offered)
    retrieval = NeedleVideo(0, 64, 2.0, (128, 128), [needle])
    wrong = sum(NOTHING in task_question(retrieval, seed).options for seed in range(200))
    assert 70 < wrong < 130
