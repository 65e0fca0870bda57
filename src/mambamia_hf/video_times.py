"""When frames are shown, where the timestamps of a file repeat, stray, jump or start again.

Frames are in the order in which the decoder gives them; that order is never changed. Times that disagree with it are
replaced, and what was wrong and what was assumed is said.
"""

from bisect import bisect_right

import numpy as np


# Strays are few; where more of the times are out of line, recordings were put together.
_MAX_SHARE_OF_STRAYS = 0.1

# H.264 and HEVC show a frame at most so many places before others that come earlier in the file.
MAX_REORDERED = 16

# By what share, and how many seconds, two durations of a video may differ: they may count another last frame.
_SHARE, _SECONDS = 0.05, 0.5

# The shortest and the longest step of regular times, in median steps; one frame may be missing.
_SHORTEST_STEP, _LONGEST_STEP = 0.6, 2.5


def repaired_times(times: np.ndarray, frame_duration: float, may_jump: bool) -> tuple[np.ndarray, list[str]]:
    """Makes times ascend.

    Args:
        times (`np.ndarray` of shape `(num_frames,)`): The times in seconds, NaN for none.
        frame_duration (`float`): How long a frame is shown where nothing else is known.
        may_jump (`bool`): Whether clocks are known to jump in this kind of container, as in broadcasts.

    Returns:
        `tuple[np.ndarray, list[str]]`: Ascending times of which the first is 0, and a sentence for each kind of
        problem.
    """
    if np.isnan(times).all():
        return np.arange(len(times)) * frame_duration, []
    problems: list[str] = []
    times = _sorted_if_in_file_order(_filled(times, frame_duration))
    step = typical_step(times, frame_duration)
    times = _without_strays(times, step, problems)
    times = _joined(times, step, longest_believable_gap(times, may_jump), problems)
    times = _spread(times, frame_duration, problems)
    return times - times[0], problems


def durations_differ(seconds: float, others: float) -> bool:
    """Whether two durations in seconds are farther apart than by the way in which the last frame is counted."""
    return abs(seconds - others) > _SHARE * min(seconds, others) + _SECONDS


def typical_step(times: np.ndarray, default: float) -> float:
    """The median of the ascending steps in time."""
    steps = np.diff(times)
    return float(np.median(steps[steps > 0])) if (steps > 0).any() else default


def longest_believable_gap(times: np.ndarray, may_jump: bool) -> float:
    """The longest time between two frames that is no jump of the clock, for ascending times.

    Args:
        times (`np.ndarray` of shape `(num_frames,)`): The times in seconds.
        may_jump (`bool`):
            Whether clocks are known to jump in this kind of container, as in broadcasts. Then FFmpeg takes 10 seconds
            for a jump. In others it must be 10 minutes and ten times as long as all the rest.
    """
    if may_jump:
        return 10.0
    steps = np.diff(times)
    return max(600.0, 10 * float(steps.sum() - steps.max())) if len(steps) else 600.0


def _filled(times: np.ndarray, frame_duration: float) -> np.ndarray:
    """Times for frames without one, by those of their neighbours."""
    known = np.flatnonzero(~np.isnan(times))
    numbers = np.arange(len(times))
    filled = np.interp(numbers, known, times[known])
    filled += np.minimum(numbers - known[0], 0) * frame_duration + np.maximum(numbers - known[-1], 0) * frame_duration
    return filled


def _sorted_if_in_file_order(times: np.ndarray) -> np.ndarray:
    """AVI and MXF time the packets as they follow each other, so that frames swap their times but lose none."""
    order = np.argsort(times, kind="stable")
    steps = np.diff(times[order])
    regular = np.median(steps) if len(steps) else 0.0
    is_regular = regular > 0 and _SHORTEST_STEP * regular < steps.min() and steps.max() < _LONGEST_STEP * regular
    is_near = np.abs(order - np.arange(len(order))).max() <= MAX_REORDERED
    return times[order] if is_regular and is_near else times


def _without_strays(times: np.ndarray, step: float, problems: list[str]) -> np.ndarray:
    in_line = _longest_ascent(times)
    strays = np.setdiff1d(np.arange(len(times)), in_line)
    if len(strays) == 0 or len(strays) > _MAX_SHARE_OF_STRAYS * len(times):
        return times
    problems.append(
        f"{len(strays)} of its {len(times)} frames, frame {strays[0]} first ({times[strays[0]]:.1f} s), have times "
        "that do not fit those around them; times in between are assumed"
    )
    cleaned = np.full(len(times), np.nan)
    cleaned[in_line] = times[in_line]
    return _filled(cleaned, step)


def _joined(times: np.ndarray, step: float, longest_gap: float, problems: list[str]) -> np.ndarray:
    steps = np.diff(times, prepend=times[0])
    jumps = np.flatnonzero((steps < 0) | (steps > longest_gap))
    if len(jumps):
        what = "start again" if steps[jumps[0]] < 0 else f"jump by {steps[jumps[0]]:.1f} s"
        places = "once" if len(jumps) == 1 else f"{len(jumps)} times"
        problems.append(
            f"they {what} at frame {jumps[0]}, {places} in all; such a frame is assumed to follow the one before"
        )
        steps[jumps] = step
    return times[0] + np.cumsum(steps)


def _spread(times: np.ndarray, frame_duration: float, problems: list[str]) -> np.ndarray:
    """Spreads frames with the same time evenly up to the next time."""
    starts = np.flatnonzero(np.diff(times, prepend=-np.inf) > 0)
    if len(starts) == len(times):
        return times
    repeated = np.setdiff1d(np.arange(len(times)), starts)
    problems.append(
        f"{len(repeated)} of its {len(times)} frames, frame {repeated[0]} first ({times[repeated[0]]:.1f} s), have "
        "the time of the frame before; they are assumed to be spread evenly"
    )
    sizes = np.diff(starts, append=len(times))
    ends = np.append(times[starts[1:]], np.nan)
    if len(starts) == 1:
        ends[-1] = times[0] + len(times) * frame_duration
    else:
        ends[-1] = times[-1] + np.median(np.diff(times[starts]) / sizes[:-1]) * sizes[-1]
    spacing = (ends - times[starts]) / sizes
    return np.repeat(times[starts], sizes) + (np.arange(len(times)) - np.repeat(starts, sizes)) * np.repeat(
        spacing, sizes
    )


def _longest_ascent(times: np.ndarray) -> np.ndarray:
    """The numbers of the most frames whose times do not descend."""
    tails: list[float] = []  # the smallest last time of an ascent of each length
    last: list[int] = []
    before = np.full(len(times), -1)
    for number, time in enumerate(times.tolist()):
        length = bisect_right(tails, time)
        before[number] = last[length - 1] if length else -1
        tails[length : length + 1] = [time]
        last[length : length + 1] = [number]
    ascent = [last[-1]]
    while before[ascent[-1]] >= 0:
        ascent.append(int(before[ascent[-1]]))
    return np.array(ascent[::-1])
