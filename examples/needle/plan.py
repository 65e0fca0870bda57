"""What a seed decides about a video: which needles appear, when, where and in which colours.

The plan is the ground truth, and everything that is needed to render the video again. Needles and background draw from
separate random streams: a plan without its needles (`dataclasses.replace(video, needles=[])`) renders the same
background.
"""

import math
import os
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

import numpy as np

from .glyphs import COLOURS, DIGITS, OUTLINE, SHAPES


TASKS = ("retrieval", "ordering", "counting", "when", "nothing")
SPLITS = ("train", "test")
NUM_ORDERED = 3
MAX_COUNT = 4

SAMPLES_PER_SECOND = 2.0  # a model is assumed to sample at most this many frames per second
MAX_PICTURES = 1800  # different pictures of a long video, unless more frames than that are sampled

NEEDLE_SIZES = (0.30, 0.45)  # as fractions of the frame's shorter side
# Needles are centred on a lattice with this many steps per side. Split "train" takes the black points, as on a
# checkerboard, and "test" the white ones.
LATTICE = 48


class Stream(IntEnum):
    """The independent random streams of a seed."""

    NEEDLES, SCENES, CLIP, CHOICE, FRAMES = range(5)


def seed_sequence(seed: int, split: str, stream: Stream, index: int = 0) -> np.random.SeedSequence:
    return np.random.SeedSequence(seed, spawn_key=(SPLITS.index(split), int(stream), index))


def random_generator(seed: int, split: str, stream: Stream, index: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed_sequence(seed, split, stream, index))


@dataclass(frozen=True)
class Needle:
    """One glyph shown at one place for one stretch of time.

    Args:
        kind: "shape" or "digit".
        value: one of `SHAPES` or `DIGITS`.
        colour: a key of `COLOURS`.
        start: seconds from the beginning of the video; the glyph is on screen for `start <= t < start + duration`.
        duration: seconds.
        x: its centre, as a fraction of the frame's width.
        y: its centre, as a fraction of the frame's height.
        size: its height, as a fraction of the frame's shorter side.
        halo: whether the background fades around it.
    """

    kind: str
    value: str
    colour: str
    start: float
    duration: float
    x: float
    y: float
    size: float
    halo: bool


@dataclass(frozen=True)
class NeedleVideo:
    """The plan of a video.

    Args:
        seed: what the background is made from.
        total_num_frames: length of the file in frames.
        fps: its frame rate.
        size: (height, width) in pixels.
        needles: in the order in which they appear.
        path: the file, once it is written.
        task: one of `TASKS`.
        split: one of `SPLITS`.
        frames_per_picture: how many frames show the same picture.
        background: a video file, or None for a background made from the seed.
    """

    seed: int
    total_num_frames: int
    fps: float
    size: tuple[int, int]
    needles: list[Needle]
    path: Path | None = None
    task: str = "retrieval"
    split: str = "train"
    frames_per_picture: int = 1
    background: Path | None = None

    @property
    def duration(self) -> float:
        """Length in seconds."""
        return self.total_num_frames / self.fps


def plan_video(
    seed: int,
    *,
    task: str = "retrieval",
    split: str = "train",
    duration: float = 32.0,
    fps: float = 2.0,
    size: tuple[int, int] = (128, 128),
    num_frames: int = 384,
    needle_seconds: float | None = None,
    background: str | os.PathLike[str] | None = None,
) -> NeedleVideo:
    """Plans the video of a seed. The arguments are those of [`video.write_needle_video`].

    Raises:
        ValueError: for settings that no video can have.
    """
    _check_choices(seed, task, split)
    _check_format(duration, fps, size)
    grid = _PictureGrid.of(duration, fps, num_frames, needle_seconds)
    rng = random_generator(seed, split, Stream.NEEDLES, TASKS.index(task))
    values = _random_values(rng, task)
    starts, lengths = _random_times(rng, grid, task, len(values), needle_seconds)
    needles = [
        random_needle(rng, value, split, size, start * grid.period, length * grid.period)
        for value, start, length in zip(values, starts, lengths, strict=True)
    ]
    return NeedleVideo(
        seed=seed,
        total_num_frames=grid.total_num_frames,
        fps=float(fps),
        size=tuple(size),
        needles=needles,
        task=task,
        split=split,
        frames_per_picture=grid.frames_per_picture,
        background=None if background is None else Path(background),
    )


def random_value(rng: np.random.Generator) -> str:
    """A shape or a digit, either kind with the same probability."""
    return str(rng.choice((SHAPES, DIGITS)[rng.integers(2)]))


def random_needle(
    rng: np.random.Generator, value: str, split: str, size: tuple[int, int], start: float, duration: float
) -> Needle:
    """A needle of `value` with random colour, size and place of the split; all of it lies inside a frame of `size`."""
    extent = rng.uniform(*NEEDLE_SIZES)
    margin_y, margin_x = (math.ceil(0.5 * extent * (1 + 2 * OUTLINE) * min(size) / side * LATTICE) for side in size)
    column = int(rng.integers(margin_x, LATTICE - margin_x + 1))
    rows = np.arange(margin_y, LATTICE - margin_y + 1)
    row = int(rng.choice(rows[(rows + column) % 2 == SPLITS.index(split)]))
    return Needle(
        kind="shape" if value in SHAPES else "digit",
        value=value,
        colour=str(rng.choice(list(COLOURS))),
        start=start,
        duration=duration,
        x=column / LATTICE,
        y=row / LATTICE,
        size=float(extent),
        halo=bool(rng.random() < 0.5),
    )


def _check_choices(seed: int, task: str, split: str) -> None:
    if seed < 0:
        raise ValueError(f"seed must not be negative, got {seed}; give 0 or more.")
    if task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got '{task}'; give one of these.")
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got '{split}'; give one of these.")


def _check_format(duration: float, fps: float, size: tuple[int, int]) -> None:
    if not 0 < fps <= 240:
        raise ValueError(f"fps must be above 0 and at most 240, got {fps}; give the file's frames per second.")
    if not (math.isfinite(duration) and round(duration * fps) >= 1):
        raise ValueError(f"duration {duration} s holds no frame at {fps} fps; give a longer one.")
    if len(size) != 2 or any(side < 32 or side % 2 for side in size):
        raise ValueError(
            f"size must be (height, width), both even and at least 32, got {tuple(size)}; give e.g. (128, 128)."
        )


@dataclass(frozen=True)
class _PictureGrid:
    """A video as a row of pictures, each shown for several frames, and where a model samples them.

    Args:
        total_num_frames: frames of the file.
        samples: frames that a model samples, evenly.
        frames_per_picture: frames that show the same picture.
        period: seconds that a picture is shown.
        num_pictures: whole pictures of the video.
        gap: pictures from one sampled frame to the next, rounded up.
    """

    total_num_frames: int
    samples: int
    frames_per_picture: int
    period: float
    num_pictures: int
    gap: int

    @classmethod
    def of(cls, duration: float, fps: float, num_frames: int, needle_seconds: float | None) -> "_PictureGrid":
        if num_frames < 1:
            raise ValueError(f"num_frames must be at least 1, got {num_frames}; give how many frames a model samples.")
        if needle_seconds is not None and not 0 < needle_seconds <= duration:
            raise ValueError(
                f"needle_seconds must be above 0 and at most the duration ({duration} s), got {needle_seconds}; "
                "leave it out for needles that sampling meets."
            )
        total = round(duration * fps)
        samples = min(total, num_frames, max(1, int(total / fps * SAMPLES_PER_SECOND + 1e-3)))
        if needle_seconds is not None and needle_seconds < total / fps / samples - 1e-6:
            raise ValueError(
                f"needle_seconds is {needle_seconds}, but {samples} frames sampled from {duration} s lie "
                f"{total / fps / samples:.3g} s apart; give at least that, or a larger num_frames."
            )
        frames_per_picture = min(math.ceil(total / MAX_PICTURES), total // samples)
        return cls(
            total_num_frames=total,
            samples=samples,
            frames_per_picture=frames_per_picture,
            period=frames_per_picture / fps,
            num_pictures=total // frames_per_picture,
            gap=math.ceil(total / samples / frames_per_picture - 1e-6),
        )


def _random_values(rng: np.random.Generator, task: str) -> list[str]:
    if task == "nothing":
        return []
    if task == "ordering":
        return [str(value) for value in rng.choice(SHAPES + DIGITS, NUM_ORDERED, replace=False)]
    value = random_value(rng)
    return [value] * int(rng.integers(1, MAX_COUNT + 1)) if task == "counting" else [value]


def _random_times(
    rng: np.random.Generator, grid: _PictureGrid, task: str, num_needles: int, needle_seconds: float | None
) -> tuple[list[int], list[int]]:
    """Starts and lengths of needles in pictures. Sampling meets every needle, and at least one frame between two.

    Raises:
        ValueError: if the video has no room for the needles of the task.
    """
    if num_needles == 0:
        return [], []
    gap, num_pictures = grid.gap, grid.num_pictures
    most = MAX_COUNT if task == "counting" else num_needles  # room for four, so that every count is as likely
    shortest = gap if needle_seconds is None else min(math.ceil(round(needle_seconds / grid.period, 6)), num_pictures)
    between = 2 * gap if most * shortest + (most - 1) * 2 * gap <= num_pictures else gap
    room = num_pictures - (most - 1) * between
    if most * shortest > room:
        raise ValueError(
            f"{grid.samples} sampled frames have no room for {most} needles of {shortest * grid.period:.3g} s, "
            f"as {task} needs; give a longer duration, a larger num_frames or a shorter needle_seconds."
        )
    if needle_seconds is None:
        longest = min(2 if task == "counting" else 3, room // most // gap)
        lengths = gap * rng.integers(1, longest + 1, num_needles)
    else:
        lengths = np.full(num_needles, shortest)
    free = num_pictures - int(lengths.sum()) - (num_needles - 1) * between
    starts = np.sort(rng.integers(0, free + 1, num_needles))
    starts[1:] += np.cumsum(lengths[:-1] + between)
    return starts.tolist(), lengths.tolist()
