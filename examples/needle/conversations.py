"""What a model learns to answer about a needle video or a still, as a user may ask it, question after question."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random

from .glyphs import DIGITS, SHAPES
from .plan import Needle, NeedleVideo
from .questions import (
    CHOICE_QUESTIONS,
    NOTHING,
    OPEN_QUESTIONS,
    needle_multiple_choice,
    needle_questions,
    questions,
    task_question,
    when_question,
)


@dataclass(frozen=True)
class Asked:
    """A question, its answer, and the kind that it counts as."""

    kind: str
    question: str
    answer: str


def ask_about_video(video: NeedleVideo, rng: Random) -> list[Asked]:
    """Questions about a video in random order, half of the time that of its task first: later ones may name what
    appears, so only the first has to be answered from the video alone."""
    first, others = ask_task(video, rng), ask_others(video, rng)
    others.insert(0 if rng.random() < 0.5 else rng.randrange(len(others) + 1), first)
    return others


def ask_task(video: NeedleVideo, rng: Random) -> Asked:
    """The question of the video's task, with its options three times out of four. "When" would name the symbol, so
    what appears is asked in its place."""
    if video.task == "when":
        video = replace(video, task="retrieval")
    question = task_question(video, rng.randrange(10**9))
    if rng.random() < 0.75:
        return Asked(video.task, question.prompt, question.answer)
    if video.task in ("retrieval", "nothing"):
        return _ask_what(video, rng)
    return Asked(f"open {video.task}", question.text, question.answer)


def ask_others(video: NeedleVideo, rng: Random) -> list[Asked]:
    """All other questions about a video, in random order."""
    values = sorted({needle.value for needle in video.needles})
    others = []
    if video.task == "counting":
        others.append(_ask_what(video, rng))
    else:
        for needle in video.needles:
            others += [_ask_when(needle, rng), _ask_colour(needle, len(values), rng)]
        if len(values) == 1:
            others.append(Asked("open counting", _wording_of_count(values[0], rng), "1"))
    missing = [_no_time, _no_colour, _no_count]
    others += [ask(values, rng) for ask in (rng.sample(missing, rng.randrange(2)) if values else missing)]
    rng.shuffle(others)
    return others


def ask_about_still(needle: Needle | None, rng: Random) -> Asked:
    """An open question or a multiple choice about a still."""
    if rng.random() < 0.5:
        return Asked("open still", *rng.choice(needle_questions(needle, "image")))
    question = needle_multiple_choice(needle, "image", rng.randrange(10**9))
    return Asked("still", question.prompt, question.answer)


def _ask_what(video: NeedleVideo, rng: Random) -> Asked:
    """What appears, where it is at most one symbol, once or several times."""
    asked = questions(replace(video, needles=video.needles[:1]))
    answer = video.needles[0].value if video.needles else NOTHING
    kind = "open retrieval" if video.needles else "nothing"
    return Asked(kind, *rng.choice([(text, given) for text, given in asked if given == answer]))


def _ask_when(needle: Needle, rng: Random) -> Asked:
    question = when_question(needle, rng)
    return Asked("when", question.prompt, question.answer)


def _ask_colour(needle: Needle, num_symbols: int, rng: Random) -> Asked:
    """By the symbol's kind only where it is the one symbol of the video."""
    name = rng.choice([needle.kind, needle.value]) if num_symbols == 1 else needle.value
    return Asked("colour", _wording("colour", name, rng), needle.colour)


def _no_time(values: Sequence[str], rng: Random) -> Asked:
    return Asked("no time", _wording("when", _missing_value(values, rng), rng), NOTHING)


def _no_colour(values: Sequence[str], rng: Random) -> Asked:
    kinds = [kind for kind, all_of_it in (("shape", SHAPES), ("digit", DIGITS)) if not set(values) & set(all_of_it)]
    return Asked("no colour", _wording("colour", rng.choice([*kinds, _missing_value(values, rng)]), rng), NOTHING)


def _no_count(values: Sequence[str], rng: Random) -> Asked:
    return Asked("no count", _wording_of_count(_missing_value(values, rng), rng), "0")


def _missing_value(values: Sequence[str], rng: Random) -> str:
    return rng.choice([value for value in SHAPES + DIGITS if value not in values])


def _wording(kind: str, name: str, rng: Random) -> str:
    """A wording of a kind of open questions about a symbol that is called `name`."""
    return rng.choice(OPEN_QUESTIONS[kind]).format(medium="video", kind=name, value=name)


def _wording_of_count(value: str, rng: Random) -> str:
    return rng.choice(CHOICE_QUESTIONS["counting"]).format(medium="video", value=value)
