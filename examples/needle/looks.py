"""Looks at remembered videos, spliced ones and stills, and what is asked about them.

At every look any frame can be dropped, as frame selection does, and have any time. Most videos are spliced anew, lest
the language model learns those that it remembers by heart, and stills are in between, lest it forgets them.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mambamia_hf.frame_selection import select_frames

from .conversations import Asked, ask_about_still, ask_about_video
from .remembered_videos import TASK_WEIGHTS, RememberedStill, RememberedVideo
from .spliced_videos import Splicer


LONG = 256
QUESTIONS_PER_STILL = 4
SHARE_OF_STILLS = 0.25  # of looks
SHARE_OF_SPLICES = 0.75  # of the other looks
HOUR = 3600.0


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
    """Random looks at videos, spliced ones and stills; at long videos and tasks that are hard to learn more often.

    Args:
        videos, stills: to look at.
        rng: what is drawn from.
    """

    def __init__(self, videos: Sequence[RememberedVideo], stills: Sequence[RememberedStill], rng: random.Random):
        self.videos, self.stills, self.rng = videos, stills, rng
        self.splicer = Splicer(videos)
        self.weights = [TASK_WEIGHTS[video.plan.task] * (2 if len(video.deltas) >= LONG else 1) for video in videos]

    def draw(self, most_frames: int) -> Look:
        """A look at a still, or at no more than `most_frames` frames of a video beside those where needles appear."""
        rng = self.rng
        if self.stills and rng.random() < SHARE_OF_STILLS:
            still = rng.choice(self.stills)
            return Look(still.tokens, None, [ask_about_still(still.needle, rng) for _ in range(QUESTIONS_PER_STILL)])
        if rng.random() < SHARE_OF_SPLICES:
            video = self.splicer.draw(rng)
        else:
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
