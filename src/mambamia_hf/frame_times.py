"""The time of a frame as text of a fixed width, and the tokens of that text. Pure functions.

Which frames stay is known only after the compressor, so their times cannot be written into the prompt. How many
characters they have can: every frame has that many placeholders before those of its vision tokens, and the model
puts the right digits there once it knows which frames stay.
"""

import math
from collections.abc import Iterable, Sequence

from transformers import PreTrainedTokenizerBase


# The formats from the shortest to the longest time, each with its steps per second and the time at which it ends.
_FORMATS = {
    "mm:ss.d": (10, 6000),
    "mm:ss": (1, 6000),
    "h:mm:ss": (1, 36000),
}

# Containers may round times to milliseconds, which must not cost a whole step.
_TOLERANCE = 1e-3


def time_width(time_format: str | None) -> int:
    """The number of characters of a time, each a token; 0 without a format.

    Raises:
        ValueError: if there is no such format.
    """
    if time_format is None:
        return 0
    if not isinstance(time_format, str) or time_format not in _FORMATS:
        raise ValueError(
            f"frame_time_format={time_format!r} is no format of times; choose from {', '.join(map(repr, _FORMATS))}, "
            f"or None for no times."
        )
    return len(time_format)


def times_end(time_format: str | None) -> float:
    """The seconds at which a format has no more times; infinite without a format.

    Raises:
        ValueError: if there is no such format.
    """
    return float(_FORMATS[str(time_format)][1]) if time_width(time_format) else math.inf


def format_time(seconds: float, time_format: str) -> str:
    """A time as a clock shows it: cut off, not rounded, so that it never names a moment at which the frame is not
    there yet. Only the last millisecond before a step counts as the step, because containers round to milliseconds.

    ```python
    >>> format_time(59.96, "mm:ss.d"), format_time(59.96, "mm:ss"), format_time(3600, "h:mm:ss")
    ('00:59.9', '00:59', '1:00:00')
    ```

    Args:
        seconds: from the start of the video.
        time_format: `"mm:ss"`, `"h:mm:ss"` or `"mm:ss.d"`.

    Returns:
        Text as long as the format.

    Raises:
        ValueError: for a time that is negative or no number, or does not fit into the format.
    """
    time_width(time_format)
    steps_per_second, end = _FORMATS[time_format]
    if not math.isfinite(seconds) or seconds < 0:
        raise ValueError(f"A frame has the time {seconds}; times are seconds from the start of the video, 0 or more.")
    steps = math.floor((seconds + _TOLERANCE) * steps_per_second)
    if steps >= end * steps_per_second:
        longer = [f"{name!r} (below {limit} s)" for name, (_, limit) in _FORMATS.items() if limit > end]
        advice = f"use a model with frame_time_format={longer[0]}" if longer else "none is longer, cut the video"
        raise ValueError(
            f"A frame at {seconds:g} s does not fit into frame_time_format={time_format!r}, which ends at {end} s; "
            f"{advice}."
        )
    whole, tenths = divmod(steps, steps_per_second)
    minutes, whole = divmod(whole, 60)
    if time_format == "h:mm:ss":
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02}:{whole:02}"
    return f"{minutes:02}:{whole:02}" + (f".{tenths}" if time_format == "mm:ss.d" else "")


def time_ids(times: Iterable[float], time_format: str, token_ids: dict[str, int]) -> list[list[int]]:
    """The tokens of times.

    Args:
        times: `(num_frames,)` in seconds.
        time_format: see [`format_time`].
        token_ids: the token of each character, as of [`time_token_ids`].

    Returns:
        `(num_frames, width)`.

    Raises:
        ValueError: as [`format_time`].
    """
    return [[token_ids[character] for character in format_time(seconds, time_format)] for seconds in times]


def time_token_ids(tokenizer: PreTrainedTokenizerBase, time_format: str) -> dict[str, int]:
    """The token of each character that a time can have.

    Args:
        tokenizer: that of the language model.
        time_format: see [`format_time`].

    Raises:
        ValueError: if one of the characters is no token of its own.
    """
    vocabulary = tokenizer.get_vocab()
    token_ids = {}
    for character in time_characters(time_format):
        token_id = vocabulary.get(character)
        # Some tokenizers put a token for a blank in front of any text.
        if token_id is None or tokenizer(character, add_special_tokens=False)["input_ids"][-1:] != [token_id]:
            raise ValueError(
                f"frame_time_format={time_format!r} writes times as single characters, and the tokenizer has no token "
                f"of its own for {character!r}; use None, or a language model that has one, as Qwen2."
            )
        token_ids[character] = token_id
    return token_ids


def time_characters(time_format: str | None) -> str:
    """The characters that a time can have; none without a format."""
    if not time_width(time_format):
        return ""
    return "0123456789:" + ("." if time_format == "mm:ss.d" else "")


def check_times(times: Sequence[float], num_frames: int) -> None:
    """Checks the times of the frames of a video.

    Args:
        times: in seconds.
        num_frames: of the video.

    Raises:
        ValueError: unless there is one per frame, from 0 on, and none goes backwards.
    """
    if len(times) != num_frames:
        raise ValueError(
            f"A video of {num_frames} frames has {len(times)} times; pass one time per frame, in seconds."
        )
    before = 0.0
    for number, seconds in enumerate(times):
        if not math.isfinite(seconds) or seconds < before:
            raise ValueError(
                f"Frame {number} of a video has the time {seconds} s after {before} s; times are seconds from the "
                f"start of the video and do not go backwards."
            )
        before = seconds


__all__ = ["check_times", "format_time", "time_characters", "time_ids", "time_token_ids", "time_width", "times_end"]
