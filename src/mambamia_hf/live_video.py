"""Frames of a video that is still coming: a growing file, a pipe, a camera or an address.

A thread of its own reads, decodes and samples, so that a live source is listened to while a model computes. Sources
are asked for by name and have rules of their own: addresses are opened with the protocols below and nothing else, and
every wait has an end.
"""

import math
import os
import queue
import re
import select
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import av
import torch
from av.container import InputContainer

from .inputs import STANDARD_INPUT
from .messages import printable, without_secrets
from .video_decoder import FILE_FORMATS, NOT_UPRIGHT, OPEN_OPTIONS, UNREADABLE, PictureMaker, may_jump, shown_stream
from .video_sources import VideoLimits, check_standard_input


# What an address of each kind may use. A playlist is opened where the address itself names one, and then holds
# addresses of the web only.
_WEB = "http,https,tcp,tls,httpproxy"
_PROTOCOLS = {
    "http": _WEB,
    "https": _WEB,
    "rtsp": "rtsp,rtp,udp,tcp,tls",
    "rtsps": "rtsp,rtp,udp,tcp,tls",
}
_CAMERA = re.compile(r"/dev/video\d+", re.ASCII)
_CAMERA_FORMAT = "video4linux2"

# How long a file, a pipe or a queue is waited for at a time, in seconds.
_PATIENCE = 0.1

# Sampled frames that wait for the model.
_QUEUE_FRAMES = 64

# The longest time between two frames that is no jump of the clock; shorter where clocks are known to jump.
_LONGEST_GAP, _LONGEST_GAP_OF_BROADCASTS = 600.0, 10.0

# Containers may round times to milliseconds, which must not cost a frame.
_ROUNDING = 1e-3

_MP4_BOXES = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide")

SampledFrame = tuple[float, torch.Tensor]
_Transform = Callable[[torch.Tensor], torch.Tensor]


class LiveVideo:
    """Samples a video while it comes. Use it as a context manager.

    Args:
        source: the path of a file, which may still grow; "-" for the standard input; a pipe; a camera device
            (`/dev/video0`); or an address (http, https, rtsp, rtsps).
        fps: frames to sample per second: those on display in the middle of each part of a second.
        transform: applied to each sampled frame, uint8 of shape `(3, height, width)`.
        timeout: the seconds to wait for something to come.
        limits: what is refused.

    Attributes:
        name: the source as it may be shown, without user name, password and query.
        ending: how the video ended, in words, once there are no more frames.
        num_missed: frames that a live source has sent while the queue was full.
        notes: what there is to say about frames, once each.

    Raises:
        FileNotFoundError: if there is no file or device.
        ValueError: for a source of another kind.
    """

    def __init__(
        self,
        source: str,
        fps: float,
        transform: _Transform | None = None,
        timeout: float = 10.0,
        limits: VideoLimits | None = None,
    ):
        self._source, self._fps, self._transform = source, fps, transform
        self._timeout, self._limits = timeout, limits or VideoLimits()
        self._scheme = _scheme(source)
        self.name = _checked_name(source, self._scheme)
        self.is_live = self._scheme is not None or _CAMERA.fullmatch(source) is not None
        self.ending = ""
        self.num_missed = 0
        self._has_begun = False
        self.notes: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._queue: queue.Queue[SampledFrame | BaseException | None] = queue.Queue(_QUEUE_FRAMES)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="mambamia live video", daemon=True)

    def __enter__(self) -> "LiveVideo":
        self._thread.start()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._stop.set()
        # FFmpeg cannot be called back from an address before its timeout.
        self._thread.join(None if not self.is_live else 10 * _PATIENCE)

    def batches(self, most: int = 32) -> Iterator[list[SampledFrame]]:
        """Gives the frames that have come, as soon as there is one: times in seconds from the first, and pictures.

        Args:
            most: frames to give at a time.

        Raises:
            ValueError: if the source cannot be read as a video, or nothing has come for `timeout` seconds.
        """
        is_open = True
        while is_open:
            items = [self._queue.get()]
            while len(items) < most and not self._queue.empty():
                items.append(self._queue.get())
            frames = [item for item in items if isinstance(item, tuple)]
            if frames:
                yield frames
            last = items[-1]
            if isinstance(last, BaseException):
                raise last
            is_open = last is not None

    def _run(self) -> None:
        """What the thread does: every frame, then None or an error, goes into the queue."""
        end: BaseException | None = None
        try:
            self._read()
        except Exception as error:  # raised again where the frames are taken
            end = error.with_traceback(None)
        self._put(end, may_drop=False)

    def _put(self, item: SampledFrame | BaseException | None, may_drop: bool) -> None:
        while not self._stop.is_set():
            try:
                return self._queue.put(item, timeout=_PATIENCE)
            except queue.Full:
                if may_drop:
                    self.num_missed += 1
                    return

    def _read(self) -> None:
        reader = None
        if not self.is_live:
            reader = _Reader(self._source, self.name, self._timeout, self._stop)
        self.ending = f"{self.name} has ended"
        try:
            with self._open(reader) as container:
                stream = shown_stream(container, self.name, self._limits)
                stream.thread_type = "SLICE"  # threads by frames would hold some of them back
                self._sample(container, stream)
        except UNREADABLE as error:
            if reader is None or reader.error is None:
                self._end_or_raise(error)
        finally:
            if reader is not None:
                reader.close()
        if reader is not None:
            if reader.error is not None:
                raise reader.error
            self.ending = reader.ending or self.ending

    def _end_or_raise(self, error: Exception) -> None:
        """An address that has sent frames may end in any way but by a stall."""
        reason = printable(getattr(error, "strerror", None) or type(error).__name__)
        if isinstance(error, av.error.ExitError):
            raise _stall(self.name, self._timeout) from None  # its message would hold the address
        if not (self.is_live and self._has_begun):
            raise ValueError(
                f"{self.name} cannot be read as a video ({reason}); check that a video player plays it."
            ) from None
        self.ending = f"{self.name} has ended ({reason})"

    def _open(self, reader: "_Reader | None") -> InputContainer:
        options = {"format_whitelist": FILE_FORMATS}
        if reader is not None:
            options["protocol_whitelist"] = "none"
            return av.open(reader, container_options=options, **OPEN_OPTIONS)
        limits = (self._timeout, self._timeout)
        if self._scheme is None:
            return av.open(self._source, format=_CAMERA_FORMAT, timeout=limits)
        options["protocol_whitelist"] = _PROTOCOLS[self._scheme]
        if self._scheme.startswith("rtsp"):
            options.update(format_whitelist=f"rtsp,sdp,rtp,{FILE_FORMATS}", rtsp_transport="tcp")
        elif re.search(r"\.m3u8?($|[?#])", self._source):
            options.update(format_whitelist=f"hls,{FILE_FORMATS}", protocol_whitelist=f"{_WEB},crypto")
        return av.open(self._source, container_options=options, timeout=limits, **OPEN_OPTIONS)

    def _sample(self, container: InputContainer, stream: Any) -> None:
        """Puts the frames on display in the middle of each part of a second into the queue."""
        pictures = PictureMaker(stream, self._limits)
        rate = float(stream.average_rate or 0) or 25.0
        longest_gap = _LONGEST_GAP_OF_BROADCASTS if may_jump(container) else _LONGEST_GAP
        clock = _Clock(float(stream.time_base), 1 / rate, longest_gap, self.notes.put)
        latest: tuple[float, av.VideoFrame] | None = None
        target = 0.5 / self._fps
        try:
            for frame in _decoded(container, stream, self.notes.put):
                if self._stop.is_set():
                    return
                time = clock.time_of(frame)
                if time is None:
                    continue
                if latest is not None and time - _ROUNDING > target:
                    self._emit(pictures, *latest)
                    target = (math.ceil((time - _ROUNDING) * self._fps - 0.5) + 0.5) / self._fps
                latest = time, frame
        finally:
            if latest is not None and latest[0] + 1 / rate > target:
                self._emit(pictures, *latest)

    def _emit(self, pictures: PictureMaker, time: float, frame: av.VideoFrame) -> None:
        self._has_begun = True
        was_known = not pictures.is_turn_unknown
        picture = torch.from_numpy(pictures.convert(frame)).permute(2, 0, 1)
        if was_known and pictures.is_turn_unknown:
            self.notes.put(f"the display matrix {NOT_UPRIGHT}")
        self._put((time, picture if self._transform is None else self._transform(picture)), may_drop=self.is_live)


class _Clock:
    """Times that ascend from 0, whatever the timestamps of the frames do."""

    def __init__(self, unit: float, step: float, longest_gap: float, note: Callable[[str], None]):
        self._unit, self._step, self._longest_gap, self._note = unit, step, longest_gap, note
        self._before: float | None = None  # the timestamp of the frame before
        self._time = 0.0

    def time_of(self, frame: av.VideoFrame) -> float | None:
        """The time of the next frame; None for one that is shown at the time of the frame before."""
        # Not `frame.time`, which PyAV 14 does not know of the last frames.
        stamp, before = None if frame.pts is None else frame.pts * self._unit, self._before
        if before is None:
            self._before = stamp
            return 0.0
        step = self._step if stamp is None else stamp - before
        if step == 0:
            return None
        if step < 0 or step > self._longest_gap:
            self._note(
                f"the times jump from {before:.1f} to {stamp:.1f} s; the frame is assumed to follow the one before."
            )
            step = self._step
        self._before = before + step if stamp is None else stamp
        self._time += step
        return self._time


class _Reader:
    """A file that may still grow, or a pipe, as FFmpeg reads it: it waits for more, for a time.

    Attributes:
        ending: why the file is taken to have ended.
        error: a stall, which FFmpeg would take for the end.
    """

    def __init__(self, source: str, name: str, timeout: float, stop: threading.Event):
        self._name, self._timeout, self._stop = name, timeout, stop
        self.ending = ""
        self.error: ValueError | None = None
        self._file = _open_unbuffered(source)
        self._is_file = stat.S_ISREG(os.fstat(self._file.fileno()).st_mode)
        self._has_late_index = self._is_file and _has_late_index(self._file)

    def read(self, size: int) -> bytes:
        deadline = time.monotonic() + self._timeout
        while not (self._stop.is_set() or self.ending or self.error):
            if not self._is_file and not select.select([self._file], [], [], _PATIENCE)[0]:
                if time.monotonic() > deadline:
                    self.error = _stall(self._name, self._timeout)
                    return b""
                continue
            data = self._file.read(size)
            if data or not self._is_file or self._has_late_index:
                return data or b""
            idle = time.time() - os.fstat(self._file.fileno()).st_mtime
            if idle > self._timeout or time.monotonic() > deadline:
                self.ending = f"{self._name} has not grown for {self._timeout:g} seconds, so it has ended"
                return b""
            self._stop.wait(_PATIENCE)
        return b""

    def seekable(self) -> bool:
        return self._has_late_index

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        self._file.close()


def _open_unbuffered(source: str) -> BinaryIO:
    if source == STANDARD_INPUT:
        return open(os.dup(sys.stdin.fileno()), "rb", buffering=0)
    # A pipe without a writer would block.
    return open(source, "rb", buffering=0, opener=lambda path, flags: os.open(path, flags | os.O_NONBLOCK))


def _has_late_index(file: BinaryIO) -> bool:
    """Whether this is an MP4 whose index follows its pictures: a whole file, in which FFmpeg has to seek. All other
    files can be read as they come."""
    is_late, position = False, file.tell()
    while len(header := file.read(8)) == 8 and header[4:] in _MP4_BOXES and not is_late:
        if header[4:] == b"moov":
            break
        is_late = header[4:] == b"mdat"
        file.seek(max(int.from_bytes(header[:4], "big"), 8) - 8, os.SEEK_CUR)
    file.seek(position)
    return is_late


def _decoded(container: InputContainer, stream: Any, note: Callable[[str], None]) -> Iterator[av.VideoFrame]:
    """The frames of a stream, from the first whole one on."""
    has_begun = has_noted = False
    for packet in _packets(container, stream):
        if packet is not None and not packet.size and packet.pts is not None:
            continue  # AVI repeats a frame so; the decoder would take it for the end
        try:
            frames, is_damaged = stream.codec_context.decode(packet), False
        except av.FFmpegError:
            frames, is_damaged = [], has_begun
        for frame in frames:
            has_begun = has_begun or not frame.is_corrupt
            is_damaged = is_damaged or (has_begun and frame.is_corrupt)
            if has_begun:
                yield frame
        if is_damaged and not has_noted:
            has_noted = True
            note("some of it is lost or damaged; frames may be missing or wrong.")


def _packets(container: InputContainer, stream: Any) -> Iterator[av.Packet | None]:
    """The packets of a stream, and at the end one that brings out the frames that the decoder still holds."""
    try:
        yield from container.demux(stream)
    except UNREADABLE:
        yield None
        raise


def _stall(name: str, timeout: float) -> ValueError:
    return ValueError(f"nothing has come from {name} for {timeout:g} seconds; check the source, or wait longer.")


def _scheme(source: str) -> str | None:
    """The protocol of an address; None for what is no address, or a file with such a name."""
    scheme, separator, _ = source.partition("://")
    return None if not separator or os.path.exists(source) else scheme.lower()


def _checked_name(source: str, scheme: str | None) -> str:
    """What to call a source, once it is known to be one."""
    if scheme is not None:
        name = f"'{without_secrets(source)}'"
        if scheme not in _PROTOCOLS:
            raise ValueError(f"{name} is an address of another kind than {', '.join(_PROTOCOLS)}; give one of these.")
        if not source.isprintable() or " " in source:
            raise ValueError(f"the address {name} holds blanks or control characters; write them as %20 and the like.")
        return name
    if source == STANDARD_INPUT:
        check_standard_input()
        return "the standard input"
    name = f"'{printable(source)}'"
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"there is no file or device {name}; check the path.")
    if path.is_dir():
        raise ValueError(f"{name} is a folder; give a video file, a pipe, a camera or an address.")
    return name
