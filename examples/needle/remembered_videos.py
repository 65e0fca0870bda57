"""Videos and stills as a model remembers them, and what is asked about them.

The vision tower and the compressor look at a video once. After that its frames are a few numbers each, and at every
look any of them can be dropped, as frame selection does, and have any time. Stills are in between, lest the language
model forgets them.
"""

import random
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mambamia_hf import MambaMiaForConditionalGeneration, MambaMiaProcessor, VideoMemory
from mambamia_hf.frame_selection import select_frames

from .conversations import Asked, ask_about_still, ask_about_video
from .evaluate import load
from .plan import TASKS, Needle, NeedleVideo, plan_video
from .training_data import spaced_video
from .video import needle_frames, write_needle_video


FIRST_SEED = 100_000  # of videos and stills that no other stage learns from
LENGTHS = (16, 32, 64, 128, 256, 384, 384, 384)  # frames of a video, each with the same probability
LONG = 256
TASK_WEIGHTS = {"retrieval": 3, "when": 3, "ordering": 2, "counting": 2, "nothing": 1}
QUESTIONS_PER_STILL = 4
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


class Looks:
    """Random looks at videos and stills; at long videos and tasks that are hard to learn more often.

    Args:
        videos, stills: to look at.
        rng: what is drawn from.
    """

    def __init__(self, videos: Sequence[RememberedVideo], stills: Sequence[RememberedStill], rng: random.Random):
        self.videos, self.stills, self.rng = videos, stills, rng
        self.weights = [TASK_WEIGHTS[video.plan.task] * (2 if len(video.deltas) >= LONG else 1) for video in videos]

    def draw(self, most_frames: int) -> Look:
        """A look at a still, or at no more than `most_frames` frames of a video beside those where needles appear."""
        rng = self.rng
        if self.stills and rng.random() < SHARE_OF_STILLS:
            still = rng.choice(self.stills)
            return Look(still.tokens, None, [ask_about_still(still.needle, rng) for _ in range(QUESTIONS_PER_STILL)])
        (video,) = rng.choices(self.videos, self.weights)
        times = random_times(len(video.deltas), rng)
        kept = random_frames(video, most_frames, rng)
        plan = replace(
            video.plan,
            needles=[
                replace(needle, start=times[frame])
                for needle, frame in zip(video.plan.needles, video.first_frames, strict=True)
            ],
        )
        return Look(video.tokens[kept], [times[frame] for frame in kept], ask_about_video(plan, rng))


def random_times(num_frames: int, rng: random.Random) -> list[float]:
    """Times of evenly spaced frames, from half a second apart to over a whole hour, which is the most frequent."""
    span = HOUR if rng.random() < 0.4 else HOUR * (0.5 * num_frames / HOUR) ** rng.random()
    start = rng.uniform(0, HOUR - span) if rng.random() < 0.3 else 0.0
    return [start + span * frame / num_frames for frame in range(num_frames)]


def random_frames(video: RememberedVideo, most: int, rng: random.Random) -> list[int]:
    """The numbers of kept frames: all of them, some by Δ or some at random; always those where needles appear.

    There are at most `most` others.
    """
    num_frames, needles = len(video.deltas), video.first_frames
    keep = torch.ones(num_frames, dtype=torch.bool)
    if num_frames > most or rng.random() < 0.5:
        count = max(1, round(rng.uniform(0.2, 1.0) * min(num_frames, most)))
        if rng.random() < 0.5:
            keep = select_frames(video.deltas[None], keep_frames=count)[0]
        else:
            keep = torch.zeros(num_frames, dtype=torch.bool)
            keep[rng.sample(range(num_frames), count)] = True
    keep[needles] = True
    return keep.nonzero()[:, 0].tolist()
