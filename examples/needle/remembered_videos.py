"""Videos and stills as a model remembers them, and what is asked about them.

The vision tower and the compressor look at a video once. After that its frames are a few numbers each, and at every
look any of them can be dropped, as frame selection does, and have any time. Stills are in between, lest the language
model forgets them.
"""

import random
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mambamia_hf import MambaMiaForConditionalGeneration, MambaMiaProcessor, VideoMemory
from mambamia_hf.frame_selection import select_frames

from .evaluate import load
from .glyphs import DIGITS, SHAPES
from .plan import TASKS, Needle, NeedleVideo, plan_video
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
from .training_data import spaced_video
from .video import needle_frames, write_needle_video


FIRST_SEED = 100_000  # of videos and stills that no other stage learns from
LENGTHS = (16, 32, 64, 128, 256, 384, 384, 384)  # frames of a video, each with the same probability
LONG = 256
TASK_WEIGHTS = {"retrieval": 3, "when": 3, "ordering": 2, "counting": 2, "nothing": 1}
QUESTIONS_PER_LOOK = 6
STILLS_PER_SEED = 4
SHARE_OF_STILLS = 0.25  # of looks
HOUR = 3600.0


def video_settings(seed: int) -> dict[str, Any]:
    """Settings of the video of a seed, as `plan_video` and `write_needle_video` take them."""
    rng = random.Random(seed)
    return spaced_video(seed, rng, rng.choice(LENGTHS), "train", TASKS)


def remember(checkpoint: str, folder: Path, seed: int) -> None:
    """Writes `SEED.memory`, what the model of a checkpoint remembers of the video of a seed, unless it is there."""
    file = folder / f"{seed}.memory"
    if not file.exists():
        model, processor = load(checkpoint)
        with tempfile.TemporaryDirectory() as temporary:
            video = write_needle_video(Path(temporary) / f"{seed}.mp4", seed, **video_settings(seed))
            memory = model.encode_video(video.path, processor, num_frames=video.total_num_frames)
        memory.save(file)


@dataclass(frozen=True)
class RememberedVideo:
    """A video and its frames as the language model reads them, without times.

    Args:
        plan: what is in it; its times do not count.
        tokens: `(num_frames, tokens_per_frame, hidden_size)`.
        deltas: `(num_frames,)`.
    """

    plan: NeedleVideo
    tokens: Tensor
    deltas: Tensor

    @classmethod
    @torch.no_grad()
    def load(cls, model: MambaMiaForConditionalGeneration, folder: Path, seed: int) -> "RememberedVideo":
        """The video of a seed from the memory that `remember` wrote.

        Raises:
            ValueError: if the memory is of another model or another video.
        """
        file = folder / f"{seed}.memory"
        memory, plan = VideoMemory.load(file, model), plan_video(seed, **video_settings(seed))
        if len(memory) != plan.total_num_frames or memory.frame_deltas is None:
            raise ValueError(
                f"{file} has {len(memory)} frames and the video of this seed {plan.total_num_frames}; remove the file."
            )
        return cls(plan, model.model.project(memory.anchors), memory.frame_deltas)

    @property
    def first_frames(self) -> list[int]:
        """The frame in which each needle appears; a model samples all frames."""
        return [round(needle.start * self.plan.fps) for needle in self.plan.needles]


@dataclass(frozen=True)
class RememberedStill:
    """A still as the language model reads it.

    Args:
        needle: what is in it, if anything.
        tokens: `(1, tokens_per_frame, hidden_size)`.
    """

    needle: Needle | None
    tokens: Tensor


@torch.no_grad()
def remember_stills(
    model: MambaMiaForConditionalGeneration, processor: MambaMiaProcessor, seed: int
) -> list[RememberedStill]:
    """The `STILLS_PER_SEED` stills of a seed, half of them at random without a needle."""
    images, needles = zip(*needle_frames(seed, STILLS_PER_SEED), strict=True)
    pixels = processor.image_processor(list(images), return_tensors="pt")
    tokens = model.get_image_features(**pixels).pooler_output
    return [RememberedStill(needle, still[None]) for needle, still in zip(needles, tokens, strict=True)]


@dataclass(frozen=True)
class Asked:
    """A question, its answer, and the kind that it counts as."""

    kind: str
    question: str
    answer: str


@dataclass(frozen=True)
class Look:
    """One look at a video, at the frames that are kept, or at a still, and what is asked about it.

    Args:
        tokens: `(num_kept_frames, tokens_per_frame, hidden_size)`.
        times: of these frames, in seconds; None for a still.
        asked: the questions.
    """

    tokens: Tensor
    times: list[float] | None
    asked: list[Asked]


def looks(videos: Sequence[RememberedVideo], stills: Sequence[RememberedStill], rng: random.Random) -> Iterator[Look]:
    """Looks at random videos and stills, without end; at long videos and tasks that are hard to learn more often."""
    weights = [TASK_WEIGHTS[video.plan.task] * (2 if len(video.deltas) >= LONG else 1) for video in videos]
    while True:
        if stills and rng.random() < SHARE_OF_STILLS:
            still = rng.choice(stills)
            yield Look(still.tokens, None, [ask_about_still(still.needle, rng) for _ in range(QUESTIONS_PER_LOOK)])
            continue
        (video,) = rng.choices(videos, weights)
        times = random_times(len(video.deltas), rng)
        kept = random_frames(video, rng)
        plan = replace(
            video.plan,
            needles=[
                replace(needle, start=times[frame])
                for needle, frame in zip(video.plan.needles, video.first_frames, strict=True)
            ],
        )
        asked = [ask(plan, rng) for _ in range(QUESTIONS_PER_LOOK)]
        yield Look(video.tokens[kept], [times[frame] for frame in kept], asked)


def random_times(num_frames: int, rng: random.Random) -> list[float]:
    """Times of evenly spaced frames, from half a second apart to over a whole hour, which is the most frequent."""
    span = HOUR if rng.random() < 0.4 else HOUR * (0.5 * num_frames / HOUR) ** rng.random()
    start = rng.uniform(0, HOUR - span) if rng.random() < 0.3 else 0.0
    return [start + span * frame / num_frames for frame in range(num_frames)]


def random_frames(video: RememberedVideo, rng: random.Random) -> list[int]:
    """The numbers of kept frames: all of them, some by Δ or some at random; always those where needles appear."""
    num_frames = len(video.deltas)
    keep = torch.ones(num_frames, dtype=torch.bool)
    if rng.random() < 0.5:
        ratio = rng.uniform(0.2, 1.0)
        if rng.random() < 0.5:
            keep = select_frames(video.deltas[None], keep_ratio=ratio)[0]
        else:
            keep = torch.tensor([rng.random() < ratio for _ in range(num_frames)])
    keep[video.first_frames or [0]] = True
    return keep.nonzero()[:, 0].tolist()


def ask(video: NeedleVideo, rng: random.Random) -> Asked:
    """A question of the video's task, or another one that a user may ask about it."""
    chance = rng.random()
    if video.task == "nothing" and chance < 0.5:
        return _ask_in_vain(rng)
    if video.task in ("retrieval", "when"):
        return _ask_about_one(video, chance, rng)
    question = task_question(video, rng.randrange(10**9))
    if video.task in ("ordering", "counting") and chance > 0.75:
        return Asked(f"open {video.task}", question.text, question.answer)
    return Asked(video.task, question.prompt, question.answer)


def ask_about_still(needle: Needle | None, rng: random.Random) -> Asked:
    """An open question or a multiple choice about a still."""
    if rng.random() < 0.5:
        return Asked("open still", *rng.choice(needle_questions(needle, "image")))
    question = needle_multiple_choice(needle, "image", rng.randrange(10**9))
    return Asked("still", question.prompt, question.answer)


def _ask_about_one(video: NeedleVideo, chance: float, rng: random.Random) -> Asked:
    (needle,) = video.needles
    if chance < 0.50:
        question = when_question(needle, rng)
        return Asked("when", question.prompt, question.answer)
    if chance < 0.72:
        text, answer = rng.choice(questions(video))
        if answer == needle.value:
            return Asked("open retrieval", text, answer)
        return Asked("colour", _wording("colour", rng.choice([needle.kind, needle.value]), rng), needle.colour)
    if chance < 0.80:
        text = rng.choice(CHOICE_QUESTIONS["counting"]).format(medium="video", value=needle.value)
        return Asked("open counting", text, "1")
    question = task_question(replace(video, task="retrieval"), rng.randrange(10**9))
    return Asked("retrieval", question.prompt, question.answer)


def _ask_in_vain(rng: random.Random) -> Asked:
    """What has another answer where there is a symbol."""
    value, about = rng.choice(SHAPES + DIGITS), rng.choice(["no time", "no colour", "no count"])
    if about == "no count":
        return Asked(about, rng.choice(CHOICE_QUESTIONS["counting"]).format(medium="video", value=value), "0")
    if about == "no time":
        return Asked(about, _wording("when", value, rng), NOTHING)
    return Asked(about, _wording("colour", rng.choice(["shape", "digit", value]), rng), NOTHING)


def _wording(kind: str, name: str, rng: random.Random) -> str:
    """A wording of a kind of open questions about a symbol that is called `name`."""
    return rng.choice(OPEN_QUESTIONS[kind]).format(medium="video", kind=name, value=name)
