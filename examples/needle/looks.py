"""Looks at videos, spliced ones and stills, and what is asked about them.

At every look any frame can be dropped, as frame selection does, and have any time. Most videos are spliced anew, lest
the model learns those of the folder by heart, and stills are in between, lest it forgets them.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random

import torch
from torch import Tensor

from mambamia_hf.frame_selection import select_frames

from .conversations import Asked, ask_about_still, ask_others, ask_task
from .seen_videos import SeenStill, SeenVideo
from .spliced_videos import TASK_WEIGHTS, Splicer


QUESTIONS_PER_STILL = 4
OTHER_QUESTIONS = 3  # about a video, at most: more would outweigh that of its task
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
        needles: frames in which a needle begins, in order. They are kept in any case.
    """

    features: Tensor
    times: list[float] | None
    asked: list[Asked]
    keep_frames: int | None = None
    importance: Tensor | None = None
    needles: Sequence[int] = ()

    @property
    def num_appeared(self) -> Tensor:
        """How many needles have appeared up to each frame, `(num_frames,)`."""
        appears = torch.zeros(len(self.features), dtype=torch.long)
        appears[list(self.needles)] = 1
        return appears.cumsum(0)

    def kept(self, deltas: Tensor) -> list[int]:
        """The kept frames, given the Δ `(num_frames,)` of all."""
        if self.keep_frames is None:
            return list(range(len(self.features)))
        importance = deltas if self.importance is None else self.importance
        (keep,) = select_frames(importance[None], keep_frames=self.keep_frames)
        keep[list(self.needles)] = True
        return keep.nonzero()[:, 0].tolist()


class Looks:
    """Random looks at videos, spliced ones and stills; at tasks that are hard to learn more often.

    Args:
        videos, stills: to look at.
    """

    def __init__(self, videos: Sequence[SeenVideo], stills: Sequence[SeenStill]):
        self.stills = stills
        self.splicer = Splicer(videos)
        self.lengths = [len(video.features) for video in videos]
        self.videos: dict[int, list[SeenVideo]] = defaultdict(list)
        for length, video in zip(self.lengths, videos, strict=True):
            self.videos[length].append(video)

    def draw(self, rng: Random, sizes: Random, most_frames: int) -> Look:
        """A look at a still or a video, of which about `most_frames` frames at most are kept.

        Args:
            rng: what decides all but `sizes`.
            sizes: what decides how many frames are read and kept. Looks of the same sizes take about as long.
            most_frames: how many frames are kept at most, and needles that show in others.
        """
        if self.stills and sizes.random() < SHARE_OF_STILLS:
            still = rng.choice(self.stills)
            asked = [ask_about_still(still.needle, rng) for _ in range(QUESTIONS_PER_STILL)]
            return Look(still.features, None, asked)
        num_frames = sizes.choice(self.lengths)
        if sizes.random() < SHARE_OF_SPLICES:
            num_frames = min(num_frames, most_frames)
            video = self.splicer.draw(rng, num_frames)
        else:
            candidates = self.videos[num_frames]
            (video,) = rng.choices(candidates, [TASK_WEIGHTS[one.plan.task] for one in candidates])
        firsts = [shown.start for shown in video.shown]
        times = random_times(len(video.features), rng)
        needles = [
            replace(needle, start=times[first]) for needle, first in zip(video.plan.needles, firsts, strict=True)
        ]
        keep_frames, importance = None, None
        if num_frames > most_frames or sizes.random() < 0.5:
            keep_frames = max(1, round(sizes.uniform(0.2, 1.0) * min(num_frames, most_frames)))
            if rng.random() < 0.5:
                importance = torch.tensor([rng.random() for _ in times])
        plan = replace(video.plan, needles=needles)
        asked = [ask_task(plan, rng), *ask_others(plan, rng)[:OTHER_QUESTIONS]]
        return Look(video.features, times, asked, keep_frames, importance, firsts)


def random_times(num_frames: int, rng: Random) -> list[float]:
    """Times of evenly spaced frames, from half a second apart to over a whole hour, which is the most frequent."""
    span = HOUR if rng.random() < 0.4 else HOUR * (0.5 * num_frames / HOUR) ** rng.random()
    start = rng.uniform(0, HOUR - span) if rng.random() < 0.3 else 0.0
    return [start + span * frame / num_frames for frame in range(num_frames)]
