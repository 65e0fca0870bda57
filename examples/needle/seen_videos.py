"""Videos and stills as the vision tower sees them, which looks at a frame without the others.

So frames of any videos, put together, are what the tower would see of the video that they make. The compressor, which
reads one frame after the other, has to read them anew.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mambamia_hf import MambaMiaForConditionalGeneration, MambaMiaProcessor
from mambamia_hf.training.media import VisionFeatures

from .plan import Needle, NeedleVideo
from .training_data import plan_long_video
from .video import needle_frames


STILLS_PER_SEED = 4


@dataclass(frozen=True)
class SeenVideo:
    """A video and the features of its frames.

    Args:
        plan: what is in it; a model samples all of its frames.
        features: `(num_frames, num_patches, vision_size)`.

    Raises:
        ValueError: if the plan has another number of frames.
    """

    plan: NeedleVideo
    features: Tensor

    def __post_init__(self) -> None:
        if len(self.features) != self.plan.total_num_frames:
            raise ValueError(
                f"The video of seed {self.plan.seed} has features of {len(self.features)} frames and is planned with "
                f"{self.plan.total_num_frames}; write videos and features again, to new folders."
            )

    @property
    def shown(self) -> list[range]:
        """The frames that show each needle."""
        fps = self.plan.fps
        return [
            range(round(needle.start * fps), round((needle.start + needle.duration) * fps))
            for needle in self.plan.needles
        ]


def seen_videos(features: VisionFeatures) -> list[SeenVideo]:
    """All videos of a folder of features, which are `long_videos` of `training_data`."""
    seeds = {int(Path(path).stem): path for path in features.shards}
    return [SeenVideo(plan_long_video(seed), features.read("video", seeds[seed]).tensor) for seed in sorted(seeds)]


@dataclass(frozen=True)
class SeenStill:
    """A still and its features.

    Args:
        needle: what is in it, if anything.
        features: `(1, num_patches, vision_size)`.
    """

    needle: Needle | None
    features: Tensor


@torch.no_grad()
def see_stills(model: MambaMiaForConditionalGeneration, processor: MambaMiaProcessor, seed: int) -> list[SeenStill]:
    """The `STILLS_PER_SEED` stills of a seed, half of them at random without a needle."""
    images, needles = zip(*needle_frames(seed, STILLS_PER_SEED), strict=True)
    pixels = processor.image_processor(list(images), return_tensors="pt")["pixel_values"]
    features = model.model.encode_frames(pixels).last_hidden_state
    return [SeenStill(needle, still[None]) for needle, still in zip(needles, features, strict=True)]
