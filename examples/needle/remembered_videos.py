"""Videos and stills as a model remembers them.

The vision tower and the compressor look at a video once. After that its frames are a few numbers each.
"""

import random
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mambamia_hf import MambaMiaForConditionalGeneration, MambaMiaProcessor, VideoMemory

from .evaluate import load
from .plan import TASKS, Needle, NeedleVideo, plan_video
from .training_data import spaced_video
from .video import needle_frames, write_needle_video


FIRST_SEED = 100_000  # of videos and stills that no other stage learns from
LENGTHS = (16, 32, 64, 128, 256, 384, 384, 384)  # frames of a video, each with the same probability
TASK_WEIGHTS = {"retrieval": 3, "when": 3, "ordering": 2, "counting": 2, "nothing": 1}
STILLS_PER_SEED = 4


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
