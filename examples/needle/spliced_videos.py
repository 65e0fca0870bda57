"""New videos out of remembered ones: windows around their needles, with quiet stretches between.

A language model that sees a few hundred videos again and again learns them by heart. There are as many spliced videos
as one likes, with other needles in another order before another background. All that is taken comes from before the
second needle of its video, since the frames after a needle still hold something of it.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random

import torch

from .plan import MAX_COUNT, NUM_ORDERED, NeedleVideo
from .remembered_videos import LENGTHS, TASK_WEIGHTS, RememberedVideo


# Frames of a window before and after its needle, at most.
BEFORE, AFTER = 4, 8
# Frames of a quiet stretch, at least.
QUIET = 8


@dataclass(frozen=True)
class Stretch:
    """Some frames of a video."""

    video: RememberedVideo
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


class Splicer:
    """Draws videos with needles as those of a task have them.

    Args:
        videos: that are taken apart.

    Raises:
        ValueError: if no video begins with QUIET frames without a needle.
    """

    def __init__(self, videos: Sequence[RememberedVideo]):
        self.quiet: list[Stretch] = []
        self.with_needle: dict[str, list[RememberedVideo]] = defaultdict(list)
        for video in videos:
            num_quiet = video.first_frames[0] if video.first_frames else len(video.deltas)
            if num_quiet >= QUIET:
                self.quiet.append(Stretch(video, 0, num_quiet))
            if video.plan.needles:
                self.with_needle[video.plan.needles[0].value].append(video)
        if not self.quiet:
            raise ValueError(f"None of {len(videos)} videos begins with {QUIET} frames without a needle; give more.")
        needed = {"nothing": 0, "ordering": NUM_ORDERED}  # symbols
        self.tasks = {
            task: weight for task, weight in TASK_WEIGHTS.items() if needed.get(task, 1) <= len(self.with_needle)
        }

    def draw(self, rng: Random) -> RememberedVideo:
        """A video of a random length, and of a random task for which there are enough symbols."""
        (task,) = rng.choices(list(self.tasks), list(self.tasks.values()))
        sources = [rng.choice(self.with_needle[value]) for value in self._random_values(task, rng)]
        windows = [self._window(video, rng) for video in sources]
        num_quiet = max(rng.choice(LENGTHS) - sum(map(len, windows)), len(windows) + 1)
        cuts = sorted(rng.sample(range(1, num_quiet), len(windows)))  # something quiet is around every window
        gaps = [stop - start for start, stop in zip([0, *cuts], [*cuts, num_quiet], strict=True)]

        stretches, needles, place = self._fill(gaps[0], rng), [], gaps[0]
        for window, gap in zip(windows, gaps[1:], strict=True):
            start = place + window.video.first_frames[0] - window.start
            needles.append(replace(window.video.plan.needles[0], start=float(start)))
            stretches += [window, *self._fill(gap, rng)]
            place += len(window) + gap
        plan = NeedleVideo(seed=0, total_num_frames=place, fps=1.0, size=(128, 128), needles=needles, task=task)
        tokens, deltas = (
            torch.cat([getattr(part.video, name)[part.start : part.stop] for part in stretches])
            for name in ("tokens", "deltas")
        )
        return RememberedVideo(plan, tokens, deltas)

    def _random_values(self, task: str, rng: Random) -> list[str]:
        if task == "nothing":
            return []
        values = list(self.with_needle)
        if task == "ordering":
            return rng.sample(values, NUM_ORDERED)
        return [rng.choice(values)] * (rng.randint(1, MAX_COUNT) if task == "counting" else 1)

    def _window(self, video: RememberedVideo, rng: Random) -> Stretch:
        """The first needle of a video with some frames around it, up to its second needle."""
        first, *others = video.first_frames
        needle = video.plan.needles[0]
        stop = round((needle.start + needle.duration) * video.plan.fps) + rng.randint(0, AFTER)
        return Stretch(video, max(0, first - rng.randint(0, BEFORE)), min(stop, *others[:1], len(video.deltas)))

    def _fill(self, num_frames: int, rng: Random) -> list[Stretch]:
        """Quiet stretches of so many frames together."""
        stretches = []
        while num_frames:
            quiet = rng.choice(self.quiet)
            length = min(num_frames, len(quiet))
            start = rng.randint(quiet.start, quiet.stop - length)
            stretches.append(Stretch(quiet.video, start, start + length))
            num_frames -= length
        return stretches
