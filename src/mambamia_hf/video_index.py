"""What a video file says about its frames, read from its packets without decoding any of them.

The index tells when each frame is shown and where decoding can start. It is exact for variable frame rates and for
containers that state no duration and no number of frames, and takes some 3 µs per frame.
"""

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import av
import numpy as np
from av.container import InputContainer
from av.stream import Disposition
from av.video.stream import VideoStream
from transformers.video_utils import VideoMetadata


_PYAV_VERSION = int(av.__version__.split(".")[0])

# Until PyAV 18, metadata that is not UTF-8 raises an error unless it is replaced; PyAV 19 always replaces it.
_OPEN_OPTIONS: dict[str, Any] = {"metadata_errors": "replace"} if _PYAV_VERSION < 19 else {}

# Packets of these codecs say whether another frame refers to their frame.
_CODECS_WITH_MARKED_FRAMES = ("h264", "hevc")

# Containers may round times to milliseconds.
_TIME_TOLERANCE = 1e-3


class TimedVideoMetadata(VideoMetadata):
    """`VideoMetadata` that knows when each frame is shown, also at a variable frame rate.

    Args:
        frame_timestamps (`np.ndarray` of shape `(total_num_frames,)`):
            The time in seconds, from the start of the video, at which each frame of the file appears.
        duration (`float`): The length of the video in seconds. `fps` is the average, `total_num_frames / duration`.
        kwargs: The other fields of `VideoMetadata`.
    """

    duration: float
    frame_timestamps: np.ndarray  # not a field, so that the metadata remain small as a dictionary

    def __init__(self, *, frame_timestamps: np.ndarray, duration: float, **kwargs: Any) -> None:
        super().__init__(duration=duration, **kwargs)
        self.frame_timestamps = frame_timestamps

    @property
    def timestamps(self) -> list[float]:
        """Times in seconds from the start of the video at which the sampled frames appear.

        Raises:
            ValueError: if no frames were sampled yet.
        """
        if self.frames_indices is None:
            raise ValueError("No frames were sampled of this video yet, so that there are no times: decode it first.")
        return [float(self.frame_timestamps[index]) for index in self.frames_indices]

    def frames_shown_at(self, seconds: float | Sequence[float] | np.ndarray) -> np.ndarray:
        """The numbers of the frames on display at these times, of the shape of `seconds`; -1 before the first."""
        return np.searchsorted(self.frame_timestamps, np.asarray(seconds) + _TIME_TOLERANCE, side="right") - 1


@dataclass
class VideoIndex:
    """The packets of a video stream in decoding order, as far as the file can be read.

    Args:
        pts (`np.ndarray` of shape `(num_packets,)`):
            When the frame of each packet is shown, in units of the stream's time base. Where the container has no
            timestamps to go by, the frames are numbered instead.
        keys (`np.ndarray` of shape `(num_keys,)`): The packets at which decoding can start.
        shown (`np.ndarray` of shape `(num_frames,)`): The packets whose frames are shown, in the order of showing.
        shown_pts (`np.ndarray` of shape `(num_frames,)`): When these are shown.
        ticks_per_second (`int`): The inverse of the time base.
        timed (`bool`): Whether the container has timestamps to go by.
        marked (`bool`): Whether decoders know before decoding a frame that no other refers to it.
        metadata (`TimedVideoMetadata`): What users learn about the video.
    """

    pts: np.ndarray
    keys: np.ndarray
    shown: np.ndarray
    shown_pts: np.ndarray
    ticks_per_second: int
    timed: bool
    marked: bool
    metadata: TimedVideoMetadata

    def starts(self, packet: int) -> np.ndarray:
        """The packets from which the frame of `packet` can be decoded, the nearest last."""
        keys = self.keys[: np.searchsorted(self.keys, packet, side="right")]
        # A frame that is shown before the key frame it follows in the file needs the key frame before that one.
        usable = keys[self.pts[keys] <= self.pts[packet]]
        return usable if len(usable) else np.zeros(1, dtype=int)

    def key_frames(self) -> np.ndarray:
        """The numbers of the frames that are key frames."""
        return np.flatnonzero(np.isin(self.shown, self.keys))


@dataclass
class _Packets:
    """What the packets say, in decoding order, and whether the file ends too early."""

    pts: list[int | None]
    is_key: list[bool]
    is_shown: list[bool]
    durations: list[int]
    is_cut: bool

    @property
    def shown(self) -> np.ndarray:
        return np.flatnonzero(self.is_shown)


def open_video(path: str, name: str) -> tuple[InputContainer, VideoStream]:
    """Opens a file and finds its video stream. The caller closes the container.

    Args:
        path: The path of the file.
        name: What to call it in messages.

    Raises:
        ValueError: if this is no video file, has no video stream, or its codec is unknown.
    """
    try:
        container = av.open(path, **_OPEN_OPTIONS)
    except av.FFmpegError as error:
        raise ValueError(
            f"{name} cannot be read as a video ({error.strerror}): it is not a video file, or a part of it is "
            "missing; check that a video player plays it."
        ) from error
    try:
        return container, _video_stream(container, name)
    except BaseException:
        container.close()
        raise


def _video_stream(container: InputContainer, name: str) -> VideoStream:
    # The cover picture of a song is a video stream too.
    streams = [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]
    if not streams:
        found = ", ".join(sorted({stream.type for stream in container.streams} - {"video"})) or "nothing"
        raise ValueError(
            f"{name} has no video stream but {found}: it has no moving pictures, or a part of it is missing."
        )
    if streams[0].codec_context is None:
        raise ValueError(f"{name} uses a video codec that this FFmpeg cannot decode: convert it to H.264.")
    return streams[0]


def read_index(path: str, name: str) -> VideoIndex:
    """Reads all packets of a file without decoding them; warns where the file is cut off.

    Args:
        path: The path of the file.
        name: What to call it in messages.

    Raises:
        ValueError: if the file holds no readable video, an image, or no frame.

    Warns:
        UserWarning: if the file is cut off.
    """
    container, stream = open_video(path, name)
    with container:
        packets = _read_packets(container, stream)
        _refuse_without_frames(packets, container, name)
        index, announced = (_index_by_times if _has_usable_times(packets) else _index_by_order)(
            packets, container, stream
        )
    _warn_if_cut(packets.is_cut, index.metadata, announced, name)
    return index


def _read_packets(container: InputContainer, stream: VideoStream) -> _Packets:
    pts, is_key, is_shown, durations = [], [], [], []
    is_cut = False
    try:
        for packet in container.demux(stream):
            if packet.pts is None and packet.size == 0:
                continue  # marks the end of the stream
            is_cut = packet.is_corrupt
            pts.append(packet.pts)
            is_key.append(packet.is_keyframe)
            is_shown.append(packet.size > 0 and not packet.is_discard and not packet.is_corrupt)
            durations.append(packet.duration or 0)
    except av.FFmpegError:
        is_cut = True
    return _Packets(pts, is_key, is_shown, durations, is_cut)


def _refuse_without_frames(packets: _Packets, container: InputContainer, name: str) -> None:
    if len(packets.shown) == 0:
        raise ValueError(f"{name} has a video stream without any frame: it was cut off or never finished.")
    is_image = container.format.name == "image2" or container.format.name.endswith("_pipe")
    if len(packets.shown) == 1 and is_image:
        raise ValueError(f"{name} is an image where a video is meant: pass it as an image.")


def _has_usable_times(packets: _Packets) -> bool:
    """Whether all frames have timestamps, and these never start again, as in recordings that were put together."""
    if any(packets.pts[packet] is None for packet in packets.shown):
        return False
    key_times = [packets.pts[packet] for packet in packets.shown if packets.is_key[packet]]
    return all(before < after for before, after in pairwise(key_times))


def _index_by_times(
    packets: _Packets, container: InputContainer, stream: VideoStream
) -> tuple[VideoIndex, float | None]:
    """The index by the container's timestamps, and the duration that the container announces."""
    pts = np.array([0 if value is None else value for value in packets.pts])
    shown = packets.shown
    shown = shown[np.argsort(pts[shown], kind="stable")]
    time_base = float(stream.time_base)
    timestamps = (pts[shown] - pts[shown[0]]) * time_base
    last_duration = _last_duration(packets.durations[shown[-1]] * time_base, timestamps, stream)
    duration = float(timestamps[-1] + last_duration)
    announced = _announced_duration(container, stream, start=float(pts[shown[0]] * stream.time_base))
    return _make_index(packets, stream, pts, shown, timestamps, duration, timed=True), announced


def _index_by_order(packets: _Packets, container: InputContainer, stream: VideoStream) -> tuple[VideoIndex, None]:
    """The index by the order of the packets and the frame rate, where there are no timestamps to go by."""
    shown = packets.shown
    rate = _frame_rate(stream)
    pts = np.cumsum(packets.is_shown) - 1
    timestamps = np.arange(len(shown)) / rate
    return _make_index(packets, stream, pts, shown, timestamps, len(shown) / rate, timed=False), None


def _make_index(
    packets: _Packets,
    stream: VideoStream,
    pts: np.ndarray,
    shown: np.ndarray,
    timestamps: np.ndarray,
    duration: float,
    timed: bool,
) -> VideoIndex:
    metadata = TimedVideoMetadata(
        total_num_frames=len(shown),
        fps=len(shown) / duration,
        width=stream.codec_context.width,
        height=stream.codec_context.height,
        duration=duration,
        video_backend="pyav",
        frame_timestamps=timestamps,
    )
    return VideoIndex(
        pts=pts,
        keys=np.flatnonzero(packets.is_key),
        shown=shown,
        shown_pts=pts[shown],
        ticks_per_second=round(1 / stream.time_base),
        timed=timed,
        marked=stream.codec_context.name in _CODECS_WITH_MARKED_FRAMES,
        metadata=metadata,
    )


def _frame_rate(stream: VideoStream) -> float:
    # The average rate is unknown to streams without timestamps.
    return float(stream.guessed_rate or stream.average_rate or 25)


def _last_duration(stated: float, timestamps: np.ndarray, stream: VideoStream) -> float:
    """How long the last frame is shown, in seconds. AVI understates it: then the shortest gap between frames."""
    gaps = np.diff(timestamps, prepend=timestamps[0])
    shortest_gap = min(gaps[gaps > 0], default=0)
    return max(stated, shortest_gap) or 1 / _frame_rate(stream)


def _announced_duration(container: InputContainer, stream: VideoStream, start: float) -> float | None:
    """The seconds that the header states for the video stream, which starts at `start`, or else for the whole file."""
    if stream.duration:
        return float(stream.duration * stream.time_base)
    # Matroska and WebM state it as 00:00:25.025000000.
    if match := re.fullmatch(r"(\d+):(\d+):(\d+(?:\.\d+)?)", stream.metadata.get("DURATION", "")):
        hours, minutes, seconds = map(float, match.groups())
        return 3600 * hours + 60 * minutes + seconds - start
    return container.duration / av.time_base - start if container.duration else None


def _warn_if_cut(is_cut: bool, metadata: TimedVideoMetadata, announced: float | None, name: str) -> None:
    # Clocks of containers may be coarse, and sound may go on a little longer.
    if is_cut or (announced is not None and announced > 1.02 * metadata.duration + 0.25):
        whole = f" of {announced:.1f}" if announced is not None else ""
        warnings.warn(
            f"{name} is cut off: the {metadata.total_num_frames} frames that can be read, the first "
            f"{metadata.duration:.1f}{whole} seconds, are used.",
            stacklevel=4,
        )
