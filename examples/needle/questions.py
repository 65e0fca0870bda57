"""Questions about needle videos and stills, with their answers: open ones, and multiple choice with four options."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from random import Random

import numpy as np

from mambamia_hf.frame_times import format_time

from .glyphs import DIGITS, SHAPES
from .plan import MAX_COUNT, Needle, NeedleVideo, Stream, random_generator


NUM_OPTIONS = 4
NOTHING = "nothing"  # the answer where there is no needle

# `{medium}` is "video" or "image"; the first of each list is the plainest. Both spellings of colour are asked.
OPEN_QUESTIONS = {
    "shape": [
        "What shape appears in the {medium}?",
        "Which shape is shown in the {medium}?",
        "What shape can be seen in the {medium}?",
        "Which shape shows up in the {medium}?",
        "Name the shape that appears in the {medium}.",
    ],
    "digit": [
        "Which digit appears in the {medium}?",
        "What digit is shown in the {medium}?",
        "What number can be seen in the {medium}?",
        "Which number shows up in the {medium}?",
        "Name the digit that appears in the {medium}.",
    ],
    "colour": [
        "What colour is the {kind}?",
        "What color is the {kind}?",
        "Which colour does the {kind} in the {medium} have?",
        "Which color does the {kind} in the {medium} have?",
        "Name the colour of the {kind} in the {medium}.",
        "Name the color of the {kind} in the {medium}.",
    ],
    "symbol": [
        "What appears in the {medium}?",
        "Which symbol appears in the {medium}?",
        "Which symbol is shown in the {medium}?",
        "What can be seen in the {medium}?",
        "What shows up in the {medium}?",
    ],
    "when": [
        "When does the {value} appear?",
        "When does the {value} appear in the {medium}?",
        "When is the {value} shown in the {medium}?",
        "When does the {value} show up in the {medium}?",
        "At what time does the {value} appear in the {medium}?",
        "At what time can the {value} be seen in the {medium}?",
    ],
}

# By task; the plainest wording first.
CHOICE_QUESTIONS = {
    "retrieval": [
        "What appears in the {medium}?",
        "Which symbol appears in the {medium}?",
        "Which symbol is shown in the {medium}?",
        "Which of these can be seen in the {medium}?",
        "What shows up in the {medium}?",
    ],
    "ordering": [
        "In which order do the symbols appear in the {medium}?",
        "In what order are the symbols shown in the {medium}?",
        "What is the order of the symbols in the {medium}?",
        "Which order do the symbols in the {medium} have?",
        "In which order do the symbols show up in the {medium}?",
    ],
    "counting": [
        "How many times does the {value} appear in the {medium}?",
        "How many times is the {value} shown in the {medium}?",
        "How often does the {value} appear in the {medium}?",
        "How often is the {value} shown in the {medium}?",
        "How many times can the {value} be seen in the {medium}?",
    ],
}


@dataclass(frozen=True)
class Question:
    """A question, the options to choose from (none in an open question) and the answer, in words."""

    text: str
    options: tuple[str, ...]
    answer: str

    @property
    def prompt(self) -> str:
        """The question with its options, as a model is asked."""
        return f"{self.text} Options: {'; '.join(self.options)}." if self.options else self.text


def questions(video: NeedleVideo) -> list[tuple[str, str]]:
    """The open questions about a video of one needle or of none, in all wordings, with their answers (one lowercase
    word each).

    Raises:
        ValueError: if the video has several needles.
    """
    if len(video.needles) > 1:
        raise ValueError(
            f"questions are about a video of one needle or none, this one has {len(video.needles)}; give one or none."
        )
    return needle_questions(video.needles[0] if video.needles else None, "video")


def needle_questions(needle: Needle | None, medium: str) -> list[tuple[str, str]]:
    """The open questions about a "video" or an "image": what `needle` is, then what colour it has.

    Where there is no needle, the answer to what it is, asked for shapes, digits and symbols alike, is "nothing".
    """
    if needle is None:
        wordings = [wording for kind in ("symbol", "shape", "digit") for wording in OPEN_QUESTIONS[kind]]
        return [(wording.format(medium=medium), NOTHING) for wording in wordings]
    asked = [(wording, needle.value) for wording in OPEN_QUESTIONS[needle.kind] + OPEN_QUESTIONS["symbol"]]
    asked += [(wording, needle.colour) for wording in OPEN_QUESTIONS["colour"]]
    return [(wording.format(medium=medium, kind=needle.kind), answer) for wording, answer in asked]


def task_question(video: NeedleVideo, seed: int) -> Question:
    """The question of the video's task; `seed` decides on wording and options.

    "When" is an open question, and so is, half of the time, what appears in a video without a needle.
    """
    rng = random_generator(seed, video.split, Stream.CHOICE, video.seed)
    values = [needle.value for needle in video.needles]
    if video.task == "when":
        return when_question(video.needles[0], rng)
    if video.task == "nothing" and rng.random() < 0.5:
        asked = needle_questions(None, "video")
        text, answer = asked[rng.integers(len(asked))]
        return Question(text, (), answer)
    if video.task in ("retrieval", "nothing"):
        return _retrieval_question(values[0] if values else NOTHING, "video", rng)
    text = str(rng.choice(CHOICE_QUESTIONS[video.task])).format(medium="video", value=values[0])
    if video.task == "counting":
        return Question(text, tuple(str(count) for count in range(1, MAX_COUNT + 1)), str(len(values)))
    wrong = [" ".join(order) for order in permutations(values) if list(order) != values]
    return _with_options(text, " ".join(values), wrong, rng)


def when_question(needle: Needle, rng: np.random.Generator | Random) -> Question:
    """When `needle` appears in a video, in random words; the answer is the time at which it starts, as `mm:ss`."""
    text = str(rng.choice(OPEN_QUESTIONS["when"])).format(medium="video", value=needle.value)
    return Question(text, (), format_time(needle.start, "mm:ss"))


def accepted_answers(question: Question, interval: float) -> list[str]:
    """The answers that count as right, where sampled frames are `interval` seconds apart: the answer itself, or times
    that are off by at most one interval, or by a second where it is shorter."""
    match = re.fullmatch(r"(\d\d):([0-5]\d)", question.answer)
    if match is None:
        return [question.answer]
    time, margin = 60 * int(match[1]) + int(match[2]), math.floor(max(interval, 1.0))
    return [format_time(second, "mm:ss") for second in range(max(time - margin, 0), min(time + margin, 5999) + 1)]


def needle_multiple_choice(needle: Needle | None, medium: str, seed: int) -> Question:
    """Which of four symbols `needle` in a "video" or an "image" is, "nothing" where there is none; `seed` decides on
    wording and options."""
    value = NOTHING if needle is None else needle.value
    return _retrieval_question(value, medium, random_generator(seed, "train", Stream.CHOICE))


def _retrieval_question(value: str, medium: str, rng: np.random.Generator) -> Question:
    """Half of the time "nothing" is a wrong option, so that it does not give itself away where it is right."""
    text = str(rng.choice(CHOICE_QUESTIONS["retrieval"])).format(medium=medium)
    wrong = [other for other in SHAPES + DIGITS if other != value]
    if value != NOTHING and rng.random() < 0.5:
        return _with_options(text, value, wrong, rng, [NOTHING])
    return _with_options(text, value, wrong, rng)


def _with_options(
    text: str, answer: str, wrong: list[str], rng: np.random.Generator, always: Sequence[str] = ()
) -> Question:
    """The question with the answer, the wrong options `always` and random ones of `wrong`, in random order."""
    options = [answer, *always]
    options += list(rng.choice(wrong, NUM_OPTIONS - len(options), replace=False))
    return Question(text, tuple(str(option) for option in rng.permutation(options)), answer)
