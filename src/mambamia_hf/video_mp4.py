"""What the header of an MP4 or MOV file says of its tracks, read before it is believed.

Such a file consists of boxes, which may hold others (ISO/IEC 14496-12). The samples of a track are timed by a clock of
its own, and the track is shown by the clock of the whole.
"""

from collections.abc import Iterable, Iterator
from typing import BinaryIO

import numpy as np

from .video_times import durations_differ


# Players count tracks in 31 bits; FFmpeg takes ten seconds to open a file of fragments with a larger number.
_MAX_TRACK = (1 << 31) - 1

# So many boxes beside each other are looked at; files of fragments begin with their header.
_MAX_BOXES = 10_000

# The most seconds that a cut at any place hides, those from the key frame before it, and how exactly a half is one.
_HIDDEN, _ROUNDED = 30.0, 0.5

Box = tuple[bytes, int, int]  # what it is, and where its content begins and ends


def unreadable_track(path: str) -> int | None:
    """The number of a track that is too large, in a file of fragments; None where there is none."""
    with open(path, "rb") as file:
        for box in _inside(file, _header(file), b"mvex", b"trex"):
            number = _number(file, box, 4)
            if number > _MAX_TRACK:
                return number
    return None


def contradicting_durations(path: str) -> tuple[float, float] | None:
    """Two durations in seconds of the first track of which the header says two that differ.

    A track may be shown in part, as an editor has cut it, unless it is less than half of it and not a few seconds.
    Files of fragments tell a duration in one place only.
    """
    with open(path, "rb") as file:
        header = list(_header(file))
        for movie in _inside(file, header, b"mvhd"):
            movie_clock, _ = _clock(file, movie)
            for track in _inside(file, header, b"trak"):
                durations = _durations(file, track, max(movie_clock, 1))
                if durations is not None:
                    return durations
    return None


def _durations(file: BinaryIO, track: Box, movie_clock: int) -> tuple[float, float] | None:
    """The durations of a track that contradict each other."""
    clock, ticks = next((_clock(file, box) for box in _inside(file, [track], b"mdia", b"mdhd")), (0, 0))
    clock = max(clock, 1)  # as FFmpeg takes it
    counted = sum(_counted(file, box) for box in _inside(file, [track], b"mdia", b"minf", b"stbl", b"stts")) / clock
    stated = ticks / clock
    edits = [_edited(file, box) for box in _inside(file, [track], b"edts", b"elst")]
    shown = sum(edits or (_shown(file, box) for box in _inside(file, [track], b"tkhd"))) / movie_clock
    if not (counted and stated and shown):
        return None
    if durations_differ(stated, counted):
        return stated, counted
    # An edit list may hide parts of a track, but there is nothing more to show.
    if durations_differ(shown, counted) and (shown > counted or not edits):
        return shown, counted
    is_hidden = counted - shown > _HIDDEN and shown < counted / 2 + _ROUNDED
    return (shown, counted) if is_hidden else None


def _header(file: BinaryIO) -> Iterator[Box]:
    return (box for box in _boxes(file, 0, file.seek(0, 2)) if box[0] == b"moov")


def _inside(file: BinaryIO, boxes: Iterable[Box], *path: bytes) -> Iterator[Box]:
    """The boxes that are reached from `boxes` through those of these kinds."""
    for _, start, end in boxes:
        found = (box for box in _boxes(file, start, end) if box[0] == path[0])
        yield from found if len(path) == 1 else _inside(file, found, *path[1:])


def _boxes(file: BinaryIO, start: int, end: int) -> Iterator[Box]:
    for _ in range(_MAX_BOXES):
        if start + 8 > end:
            return
        file.seek(start)
        head = file.read(16)
        size, content = int.from_bytes(head[:4], "big"), start + 8
        if size == 1:
            size, content = int.from_bytes(head[8:], "big"), start + 16
        stop = end if size == 0 else start + size
        if stop < content or content > end:
            return
        yield head[4:8], content, min(stop, end)
        start = stop


def _number(file: BinaryIO, box: Box, place: int, size: int = 4) -> int:
    """The number at a place in a box."""
    file.seek(box[1] + place)
    return int.from_bytes(file.read(size), "big")


def _is_long(file: BinaryIO, box: Box) -> bool:
    """Whether times in a box have 8 bytes, and not 4."""
    return _number(file, box, 0, 1) == 1


def _clock(file: BinaryIO, box: Box) -> tuple[int, int]:
    """Ticks per second, and how many ticks the whole lasts."""
    clock, duration, size = (20, 24, 8) if _is_long(file, box) else (12, 16, 4)
    return _number(file, box, clock), _number(file, box, duration, size)


def _shown(file: BinaryIO, box: Box) -> int:
    """How long a track is shown, in ticks of the whole."""
    return _number(file, box, 28, 8) if _is_long(file, box) else _number(file, box, 20)


def _edited(file: BinaryIO, box: Box) -> int:
    """How long the parts of a track that an edit list names are, in ticks of the whole; a pause is none."""
    size = 8 if _is_long(file, box) else 4
    entry, pause = 2 * size + 4, (1 << 8 * size) - 1
    length = min(_number(file, box, 4) * entry, box[2] - box[1] - 8)
    places = [place for place in range(8, 8 + length, entry) if _number(file, box, place + size, size) != pause]
    return sum(_number(file, box, place, size) for place in places)


def _counted(file: BinaryIO, box: Box) -> float:
    """How long the samples of a track last together, in ticks of its own."""
    file.seek(box[1] + 4)
    size = min(8 * int.from_bytes(file.read(4), "big"), box[2] - box[1] - 8) // 8 * 8
    runs = np.frombuffer(file.read(max(size, 0)), dtype=">u4").reshape(-1, 2).astype(float)
    return float(runs.prod(axis=1).sum())


__all__ = ["contradicting_durations", "unreadable_track"]
