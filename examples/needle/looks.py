"""Looks at videos, spliced ones and stills, and what is asked about them.

At every look any frame can be dropped, as frame selection does, and have any time. Most videos are spliced anew, lest
the model learns those of the folder by heart, and stills are in between, lest it forgets them.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mambamia_hf.frame_selection import select_frames

from .conversations import Asked, ask_about_still, ask_about_video
from .seen_videos import SeenStill, SeenVideo
from .spliced_videos import TASK_WEIGHTS, Splicer


LONG = 256
QUESTIONS_PER_STILL = 4
SHARE_OF_STILLS = 0.15  # of looks
SHARE_OF_SPLICES = 0.8  # of the other looks
HOUR = 3600.0


@dataclass(frozen=True)
class Look:
    """One look at a video or a still, and what is asked about it.

    Args:
        features: of all frames, `(num_frames, num_patches, vision_size)`.
        times: of all frames, in seconds; None for a still.
        asked: the questions.
        keep_frames: how many frames are kept; None for all of them.
        importance: `(num_frames,)`, which frames are kept first; None for their Δ.
        needles: frames that are kept in any case.
    """

    features: Tensor
    times: list[float] | None
    asked: list[Asked]
    keep_frames: int | None = None
    importance: Tensor | None = None
    needles: Sequence[int] = ()

    def kept(self, deltas: Tensor) -> list[int]:
        """The kept frames, given the Δ `(num_frames,)` of all."""
        if self.keep_frames is None:
            return list(range(len(self.features)))
        importance = deltas if self.importance is None else self.importance
        (keep,) = select_frames(importance[None], keep_frames=self.keep_frames)
        keep[list(self.needles)] = True
        return keep.nonzero()[:, 0].tolist()


class Looks:
    """Random looks at videos, spliced ones and stills; at long videos and tasks that are hard to learn more often.

    Args:
        videos, stills: to look at.
        rng: what is drawn from.
    """

    def __init__(self, videos: Sequence[SeenVideo], stills: Sequence[SeenStill], rng: random.Random):
        self.videos, self.stills, self.rng = videos, stills, rng
        self.splicer = Splicer(videos)
        self.weights = [TASK_WEIGHTS[video.plan.task] * (2 if len(video.features) >= LONG else 1) for video in videos]

    def draw(self, most_frames: int) -> Look:
        """A look at a still, or at about `most_frames` frames of a video at most."""
        rng = self.rng
        if self.stills and rng.random() < SHARE_OF_STILLS:
            still = rng.choice(self.stills)
            asked = [ask_about_still(still.needle, rng) for _ in range(QUESTIONS_PER_STILL)]
            return Look(still.features, None, asked)
        if rng.random() < SHARE_OF_SPLICES:
            video = self.splicer.draw(rng, most_frames)
        else:
            (video,) = rng.choices(self.videos, self.weights)
        num_frames, firsts = len(video.features), [shown.start for shown in video.shown]
        times = random_times(num_frames, rng)
        needles = [
            replace(needle, start=times[first]) for needle, first in zip(video.plan.needles, firsts, strict=True)
        ]
        keep_frames, importance = None, None
        if num_frames > 1.5 * most_frames or rng.random() < 0.5:
            keep_frames = max(1, round(rng.uniform(0.2, 1.0) * min(num_frames, most_frames)))
            if rng.random() < 0.5:
                importance = torch.tensor([rng.random() for _ in range(num_frames)])
        asked = ask_about_video(replace(video.plan, needles=needles), rng)
        return Look(video.features, times, asked, keep_frames, importance, firsts)


def random_times(num_frames: int, rng: random.Random) -> list[float]:
    """Times of evenly spaced frames, from half a second apart to over a whole hour, which is the most frequent."""
    span = HOUR if rng.random() < 0.4 else HOUR * (0.5 * num_frames / HOUR) ** rng.random()
    start = rng.uniform(0, HOUR - span) if rng.random() < 0.3 else 0.0
    return [start + span * frame / num_frames for frame in range(num_frames)]
