"""Questions about needle videos and stills, with their answers: open ones, and multiple choice with four options."""

from dataclasses import dataclass
from itertools import permutations

import numpy as np

from .glyphs import DIGITS, SHAPES
from .plan import MAX_COUNT, Needle, NeedleVideo, Stream, random_generator


NUM_OPTIONS = 4

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
    """A question, the options to choose from and the right one, in words."""

    text: str
    options: tuple[str, ...]
    answer: str

    @property
    def prompt(self) -> str:
        """The question with its options, as a model is asked."""
        return f"{self.text} Options: {'; '.join(self.options)}."


def questions(video: NeedleVideo) -> list[tuple[str, str]]:
    """Every open question about a video of one needle, in all its wordings, with its answer (one lowercase word).

    Raises:
        ValueError: if the video has no needle or several.
    """
    if len(video.needles) != 1:
        raise ValueError(
            f"questions are about a video of one needle, this one has {len(video.needles)}; give one needle."
        )
    return needle_questions(video.needles[0], "video")


def needle_questions(needle: Needle, medium: str) -> list[tuple[str, str]]:
    """The open questions about `needle` in a "video" or an "image": what it is, then what colour it has."""
    asked = [(wording, needle.value) for wording in OPEN_QUESTIONS[needle.kind]]
    asked += [(wording, needle.colour) for wording in OPEN_QUESTIONS["colour"]]
    return [(wording.format(medium=medium, kind=needle.kind), answer) for wording, answer in asked]


def multiple_choice(video: NeedleVideo, seed: int) -> Question:
    """The question of the video's task; `seed` decides on wording and options."""
    rng = random_generator(seed, video.split, Stream.CHOICE, video.seed)
    values = [needle.value for needle in video.needles]
    if video.task == "retrieval":
        return _retrieval_question(values[0], "video", rng)
    text = str(rng.choice(CHOICE_QUESTIONS[video.task])).format(medium="video", value=values[0])
    if video.task == "counting":
        return Question(text, tuple(str(count) for count in range(1, MAX_COUNT + 1)), str(len(values)))
    wrong = [" ".join(order) for order in permutations(values) if list(order) != values]
    return _with_options(text, " ".join(values), wrong, rng)


def needle_multiple_choice(needle: Needle, medium: str, seed: int) -> Question:
    """Which of four symbols `needle` in a "video" or an "image" is; `seed` decides on wording and options."""
    return _retrieval_question(needle.value, medium, random_generator(seed, "train", Stream.CHOICE))


def _retrieval_question(value: str, medium: str, rng: np.random.Generator) -> Question:
    text = str(rng.choice(CHOICE_QUESTIONS["retrieval"])).format(medium=medium)
    return _with_options(text, value, [other for other in SHAPES + DIGITS if other != value], rng)


def _with_options(text: str, answer: str, wrong: list[str], rng: np.random.Generator) -> Question:
    """The question with the answer among random wrong options, in random order."""
    options = [answer, *rng.choice(wrong, NUM_OPTIONS - 1, replace=False)]
    return Question(text, tuple(str(option) for option in rng.permutation(options)), answer)
