"""New videos out of frames of others: windows around needles, with quiet stretches between.

A model that sees a few hundred videos again and again learns them by heart. There are as many spliced videos as one
likes, with other needles in another order before other backgrounds.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random

import torch

from .plan import MAX_COUNT, NUM_ORDERED, Needle, NeedleVideo
from .seen_videos import SeenVideo


# How often a video is of each task. Ordering and counting take longest to learn.
TASK_WEIGHTS = {"retrieval": 1, "when": 2, "ordering": 4, "counting": 5, "nothing": 1}
# Frames of a window before and after its needle, at most.
BEFORE, AFTER = 4, 8
# Frames of a quiet stretch that others are cut from, at least, and of what is cut, at most.
QUIET, LONGEST_CUT = 8, 96


@dataclass(frozen=True)
class Stretch:
    """Some frames of a video."""

    video: SeenVideo
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def features(self) -> torch.Tensor:
        return self.video.features[self.start : self.stop]


@dataclass(frozen=True)
class Sight:
    """A needle in a video.

    Args:
        needle: the needle.
        shown: the frames that show it.
        around: these and all frames before and after them up to other needles.
    """

    needle: Needle
    shown: range
    around: Stretch


class Splicer:
    """Draws videos with needles as those of a task have them.

    Args:
        videos: that are taken apart.

    Raises:
        ValueError: if no video has QUIET frames in a row without a needle.
    """

    def __init__(self, videos: Sequence[SeenVideo]):
        self.quiet: list[Stretch] = []
        self.sights: dict[str, list[Sight]] = defaultdict(list)
        for video in videos:
            shown = video.shown
            starts = [0, *(frames.stop for frames in shown)]
            stops = [*(frames.start for frames in shown), len(video.features)]
            between = [Stretch(video, start, stop) for start, stop in zip(starts, stops, strict=True)]
            self.quiet += [stretch for stretch in between if len(stretch) >= QUIET]
            for needle, frames, before, after in zip(video.plan.needles, shown, between, between[1:], strict=False):
                self.sights[needle.value].append(Sight(needle, frames, Stretch(video, before.start, after.stop)))
        if not self.quiet:
            raise ValueError(f"None of {len(videos)} videos has {QUIET} frames in a row without a needle; give more.")
        needed = {"nothing": 0, "ordering": NUM_ORDERED}  # symbols
        self.tasks = {task: weight for task, weight in TASK_WEIGHTS.items() if needed.get(task, 1) <= len(self.sights)}

    def draw(self, rng: Random, num_frames: int) -> SeenVideo:
        """A video of `num_frames`, or more where windows need more, of a random task for which there are symbols."""
        (task,) = rng.choices(list(self.tasks), list(self.tasks.values()))
        sights = [rng.choice(self.sights[value]) for value in self._random_values(task, rng)]
        windows = [self._window(sight, rng) for sight in sights]
        num_quiet = max(num_frames - sum(map(len, windows)), len(windows) + 1)
        cuts = sorted(rng.sample(range(1, num_quiet), len(windows)))  # something quiet is around every window
        gaps = [stop - start for start, stop in zip([0, *cuts], [*cuts, num_quiet], strict=True)]

        stretches, needles, place = self._fill(gaps[0], rng), [], gaps[0]
        for sight, window, gap in zip(sights, windows, gaps[1:], strict=True):
            start = place + sight.shown.start - window.start
            needles.append(replace(sight.needle, start=float(start), duration=float(len(sight.shown))))
            stretches += [window, *self._fill(gap, rng)]
            place += len(window) + gap
        plan = NeedleVideo(seed=0, total_num_frames=place, fps=1.0, size=(128, 128), needles=needles, task=task)
        return SeenVideo(plan, torch.cat([stretch.features for stretch in stretches]))

    def _random_values(self, task: str, rng: Random) -> list[str]:
        if task == "nothing":
            return []
        values = list(self.sights)
        if task == "ordering":
            return rng.sample(values, NUM_ORDERED)
        return [rng.choice(values)] * (rng.randint(1, MAX_COUNT) if task == "counting" else 1)

    def _window(self, sight: Sight, rng: Random) -> Stretch:
        """A needle with some frames around it."""
        start, stop = sight.shown.start - rng.randint(0, BEFORE), sight.shown.stop + rng.randint(0, AFTER)
        return Stretch(sight.around.video, max(start, sight.around.start), min(stop, sight.around.stop))

    def _fill(self, num_frames: int, rng: Random) -> list[Stretch]:
        """Quiet stretches of so many frames together."""
        stretches = []
        while num_frames:
            quiet = rng.choice(self.quiet)
            length = min(num_frames, len(quiet), rng.randint(QUIET // 2, LONGEST_CUT))
            start = rng.randint(quiet.start, quiet.stop - length)
            stretches.append(Stretch(quiet.video, start, start + length))
            num_frames -= length
        return stretches
