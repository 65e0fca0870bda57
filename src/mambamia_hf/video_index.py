"""What a video file says about its frames, and where decoding can start.

Frames are numbered in the order in which the decoder gives them when it starts at the beginning of the file. Packets
usually tell that order without being decoded, which takes some 3 µs per frame: their timestamps are different, ascend
from one group of pictures to the next, and all belong to whole packets. Where any of this does not hold, the whole
file is decoded once to know the frames, and decoded from its start whenever it is asked for some.
"""

import re
import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import dropwhile, islice
from typing import Any, NamedTuple

import av
import numpy as np
from av.container import InputContainer
from av.video.stream import VideoStream
from transformers.video_utils import VideoMetadata

from .video_damage import damaged_places, flv_tags
from .video_decoder import UNREADABLE, Decoder, is_image, may_jump, open_video, run_in_threads
from .video_mp4 import contradicting_durations
from .video_sources import VideoLimits
from .video_times import MAX_REORDERED, durations_differ, longest_believable_gap, repaired_times, typical_step


# Packets of these codecs say whether another frame refers to their frame.
_CODECS_WITH_MARKED_FRAMES = ("h264", "hevc")

# Codecs whose frames come in the order of their packets.
_CODECS_IN_ORDER = ("vp8", "vp9", "av1", "mjpeg", "prores", "dnxhd")

# Decoders of these get what all frames need with the first packet only.
_CODECS_FROM_THE_START = ("gif", "apng")

# So many frames tell whether the timestamps are those of showing.
_TRIAL_FRAMES = 100

# How many times as long as the shortest the longest step between two frames may be, where times are rounded.
_MAX_UNEVENNESS = 1.5

# How far apart in seconds frames usually are, from those of a fast camera to those of slides.
_SHORTEST_STEP, _LONGEST_STEP = 0.001, 60.0

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
    """The frames of a video and the packets that hold them.

    Args:
        metadata (`TimedVideoMetadata`): What users learn about the video.
        keys (`np.ndarray` of shape `(num_keys,)`): The numbers of the key frames.
        is_retimed (`bool`): Whether the times are not those that the file states.
        num_skipped (`int`): The frames that the decoder gives before the first one that is counted.
        packets (`PacketIndex`, *optional*):
            Which packet holds which frame, if packets tell the frames; otherwise all has to be decoded in order.
    """

    metadata: TimedVideoMetadata
    keys: np.ndarray
    is_retimed: bool = False
    num_skipped: int = 0
    packets: "PacketIndex | None" = None


@dataclass
class PacketIndex:
    """The packets of a video stream in decoding order, where they can be relied on to tell the frames.

    Args:
        pts (`np.ndarray` of shape `(num_packets,)`):
            When the frame of each packet is shown, in units of the stream's time base.
        keys (`np.ndarray` of shape `(num_keys,)`): The packets at which decoding can start.
        shown (`np.ndarray` of shape `(num_frames,)`): The packets whose frames are shown, in the order of showing.
        shown_pts (`np.ndarray` of shape `(num_frames,)`): When these are shown, ascending.
        ticks_per_second (`int`): The inverse of the time base.
        marked (`bool`): Whether decoders know before decoding a frame that no other refers to it.
        may_be_reordered (`bool`): Whether the decoder may show frames in another order than that of the file.
    """

    pts: np.ndarray
    keys: np.ndarray
    shown: np.ndarray
    shown_pts: np.ndarray
    ticks_per_second: int
    marked: bool
    may_be_reordered: bool

    def starts(self, packet: int) -> np.ndarray:
        """The packets from which the frame of `packet` can be decoded, the nearest last."""
        keys = self.keys[: np.searchsorted(self.keys, packet, side="right")]
        # A frame that is shown before the key frame it follows in the file needs the key frame before that one.
        return keys[self.pts[keys] <= self.pts[packet]]

    def end_of_group(self, start: int) -> int:
        """The packet after the last one of the group of pictures that begins with the key frame `start`."""
        following = self.keys[np.searchsorted(self.keys, start, side="right") :]
        return int(following[0]) if len(following) else len(self.pts)

    def is_irregular_from(self, start: int) -> bool:
        """Whether frames of that group are shown in another order than that of the file, and not evenly in time.

        Then one of the times may be wrong without being out of the group.
        """
        steps = np.diff(np.sort(self.pts[start : self.end_of_group(start)]))
        return self.may_be_reordered and len(steps) > 0 and bool(steps.max() > _MAX_UNEVENNESS * steps.min())


class _Packets(NamedTuple):
    """What the packets say, in decoding order, and whether the file ends too early."""

    pts: list[int | None]
    is_key: np.ndarray
    is_shown: np.ndarray
    is_corrupt: np.ndarray
    durations: list[int]
    positions: list[int]
    is_cut: bool


def read_index(path: str, name: str, limits: VideoLimits, threads: int) -> VideoIndex:
    """Finds out which frames a file has, if possible without decoding them.

    Args:
        path: The path of the file.
        name: What to call it in messages.
        limits: What is refused.
        threads: How many threads may decode where that is needed.

    Raises:
        ValueError: if the file holds no readable video, an image, or no frame.

    Warns:
        UserWarning: if the file is cut off or damaged, or its times cannot be trusted.
    """
    container, stream = open_video(path, name, limits)
    with container:
        packets = _read_packets(container, stream)
        if not packets.is_shown.any():
            raise ValueError(f"{name} has a video stream without any frame: it was cut off or never finished.")
        if is_image(container, int(packets.is_shown.sum())):
            raise ValueError(f"{name} is an image where a video is meant: pass it as an image.")
        announced = _announced_duration(container, stream, packets)
        in_words = _duration_in_words(stream)
        index = _index_by_packets(packets, container, stream)
        _warn_of_damage(packets, container, stream, path, name)
        needs_decoding = _needs_the_start(container, stream, path)
    if (
        index is None
        or index.packets is None
        or needs_decoding
        or not _passes_trial(index.packets, path, name, limits)
    ):
        index = index_by_decoding(path, name, limits, threads)
    if not index.is_retimed and _is_short(index.metadata.duration, announced):
        packets = packets._replace(
            is_cut=packets.is_cut or not _goes_on_without_pictures(path, name, limits, announced)
        )
    if packets.is_cut:
        _warn_of_cut(index.metadata, announced, name)
    if not index.is_retimed:
        _warn_of_clocks(path, container, index, in_words, name)
    return index


def _read_packets(container: InputContainer, stream: VideoStream) -> _Packets:
    pts, is_key, is_shown, is_corrupt, durations, positions = [], [], [], [], [], []
    is_cut = False
    is_vp8 = stream.codec_context.name == "vp8"
    try:
        for packet in container.demux(stream):
            if packet.pts is None and packet.size == 0:
                continue  # marks the end of the stream
            pts.append(packet.pts)
            is_key.append(packet.is_keyframe)
            is_shown.append(packet.size > 0 and not packet.is_discard and not (is_vp8 and _is_hidden_in_vp8(packet)))
            is_corrupt.append(packet.is_corrupt)
            durations.append(packet.duration or 0)
            positions.append(packet.pos or 0)
    except UNREADABLE:
        is_cut = True
    if is_corrupt and is_corrupt[-1]:
        is_cut, is_corrupt[-1], is_shown[-1] = True, False, False
    return _Packets(
        pts, np.array(is_key), np.array(is_shown, dtype=bool), np.array(is_corrupt), durations, positions, is_cut
    )


def _is_hidden_in_vp8(packet: av.Packet) -> bool:
    """VP8 keeps frames that only others refer to in packets of their own."""
    return not memoryview(packet)[0] & 0x10


def _index_by_packets(packets: _Packets, container: InputContainer, stream: VideoStream) -> VideoIndex | None:
    """The index if the packets tell which frames there are, in which order, and when; otherwise `None`."""
    keys = np.flatnonzero(packets.is_key)
    shown = np.flatnonzero(packets.is_shown)
    if len(keys) == 0 or packets.is_corrupt.any() or any(packets.pts[packet] is None for packet in shown):
        return None
    pts = np.array([0 if value is None else value for value in packets.pts])
    # A stream may begin within a group of pictures; what comes before the first key frame cannot be whole.
    shown = shown[(shown >= keys[0]) & (pts[shown] >= pts[keys[0]])]
    order = np.argsort(pts[shown], kind="stable")
    if len(shown) == 0 or not _is_order_of_showing(pts[shown], order, packets.is_key[shown], stream):
        return None
    shown = shown[order]
    time_base = float(stream.time_base or 1)
    timestamps = (pts[shown] - pts[shown[0]]) * time_base
    if np.diff(timestamps, prepend=0).max() > longest_believable_gap(timestamps, may_jump(container)):
        return None
    last_duration = _last_duration(packets.durations[shown[-1]] * time_base, timestamps, stream)
    packet_index = PacketIndex(
        pts=pts,
        keys=keys,
        shown=shown,
        shown_pts=pts[shown],
        ticks_per_second=round(1 / time_base),
        marked=stream.codec_context.name in _CODECS_WITH_MARKED_FRAMES,
        may_be_reordered=stream.codec_context.has_b_frames,
    )
    metadata = _make_metadata(timestamps, last_duration, stream)
    return VideoIndex(metadata, np.flatnonzero(np.isin(shown, keys)), packets=packet_index)


def _is_order_of_showing(pts: np.ndarray, order: np.ndarray, is_key: np.ndarray, stream: VideoStream) -> bool:
    """Whether sorting by time gives an order in which a decoder can show the frames."""
    if (np.diff(pts[order]) == 0).any():
        return False
    if stream.codec_context.name in _CODECS_IN_ORDER or not stream.codec_context.has_b_frames:
        return bool((np.diff(order) > 0).all())
    # A key frame parts what is decoded before it from what is decoded after it.
    groups = np.cumsum(is_key)[order]
    displaced = np.abs(order - np.arange(len(order))).max()
    return bool((np.diff(groups) >= 0).all()) and displaced <= MAX_REORDERED


def _needs_the_start(container: InputContainer, stream: VideoStream, path: str) -> bool:
    """Whether decoders miss something after a jump into the middle of this file."""
    context = stream.codec_context
    if context.name in _CODECS_FROM_THE_START or context.pix_fmt == "pal8":
        return True
    return "flv" in container.format.name and _flv_changes_its_header(path)


def _flv_changes_its_header(path: str) -> bool:
    """Whether an FLV file has several sequence headers, as after a reconnect; only reading in order meets them all."""
    headers = set()
    with open(path, "rb") as file:
        for position, head, size in flv_tags(file):
            kind, tag = head[0] & 0x1F, head[11:]
            is_extended = len(tag) == 5 and bool(tag[0] & 0x80)
            is_header = kind == 9 and len(tag) == 5 and (tag[0] & 0x0F if is_extended else tag[1]) == 0
            if is_header and (is_extended or tag[0] & 0x0F in (7, 12)):
                file.seek(position + 16)
                headers.add(file.read(max(size - 5, 0)))
    return len(headers) > 1


def _passes_trial(packets: PacketIndex, path: str, name: str, limits: VideoLimits) -> bool:
    """Whether the first frames come out of the decoder as their packets say, where there is reason to doubt it.

    Some containers number the packets as they follow each other, although frames are shown in another order. Where a
    file begins within a group of pictures, its first key frame may be none.
    """
    begins_within = packets.keys[0] > 0
    is_ascending = bool((np.diff(packets.shown) > 0).all())
    times: list[int | None] = []

    def decode_some(stop: threading.Event) -> None:
        with Decoder(path, name, limits, 1, stop) as decoder:
            frames = decoder.all_frames()
            if begins_within:
                frames = dropwhile(lambda frame: not frame.key_frame, frames)
            times.extend(frame.pts for frame in islice(frames, _TRIAL_FRAMES))

    if not begins_within and not (is_ascending and packets.may_be_reordered):
        return True
    run_in_threads(decode_some, 1)
    return times == packets.shown_pts[: len(times)].tolist() and len(times) > 0


def index_by_decoding(path: str, name: str, limits: VideoLimits, threads: int) -> VideoIndex:
    """The index that the frames themselves tell.

    Raises:
        ValueError: if no frame can be decoded.

    Warns:
        UserWarning: if the times of the frames cannot be trusted.
    """
    times, is_key = [], []
    metadata: TimedVideoMetadata | None = None
    first = num_errors = 0
    problems: list[str] = []
    damaged: list[int] = []

    def decode_all(stop: threading.Event) -> None:
        nonlocal metadata, first, problems, num_errors, damaged
        with Decoder(path, name, limits, threads, stop) as decoder:
            time_base = float(decoder.stream.time_base or 1)
            frames = decoder.all_frames()
            has_key = decoder.starts_with_key
            for _, frame in decoder.numbered(frames):
                if frame.key_frame and not has_key:
                    has_key, decoder.num_errors = True, 0  # what comes before could not be decoded
                    decoder.damaged.clear()
                times.append(np.nan if frame.pts is None else frame.pts * time_base)
                is_key.append(frame.key_frame)
            if not times:
                return
            num_errors, damaged = decoder.num_errors, sorted(decoder.damaged)
            # In a stream that begins within a group of pictures, frames before the first key frame cannot be whole.
            first = is_key.index(True) if True in is_key and not decoder.starts_with_key else 0
            frame_duration = 1 / _frame_rate(decoder.stream)
            timestamps, problems = repaired_times(np.array(times[first:]), frame_duration, may_jump(decoder.container))
            metadata = _make_metadata(timestamps, typical_step(timestamps, frame_duration), decoder.stream)

    run_in_threads(decode_all, 1)
    if metadata is None:
        raise ValueError(f"No frame of {name} can be decoded: the file is damaged.")
    if num_errors:
        warnings.warn(
            f"{name} is damaged: {num_errors} of its packets cannot be decoded, and their frames are left out.",
            stacklevel=5,
        )
    elif damaged:
        seconds = metadata.frame_timestamps[damaged[0] - first]
        warnings.warn(
            f"{name} is damaged: {len(damaged)} of its frames, from {seconds:.1f} s on, may show wrong pictures or "
            "come at a wrong time.",
            stacklevel=5,
        )
    for problem in problems:
        warnings.warn(f"The times in {name} cannot be trusted: {problem}.", stacklevel=5)
    return VideoIndex(metadata, np.flatnonzero(is_key[first:]), is_retimed=bool(problems), num_skipped=first)


def _make_metadata(timestamps: np.ndarray, last_duration: float, stream: VideoStream) -> TimedVideoMetadata:
    duration = float(timestamps[-1] + last_duration)
    return TimedVideoMetadata(
        total_num_frames=len(timestamps),
        fps=len(timestamps) / duration,
        width=stream.codec_context.width,
        height=stream.codec_context.height,
        duration=duration,
        video_backend="pyav",
        frame_timestamps=timestamps,
    )


def _frame_rate(stream: VideoStream) -> float:
    # The average rate is unknown to streams without timestamps.
    return float(stream.guessed_rate or stream.average_rate or 25)


def _last_duration(stated: float, timestamps: np.ndarray, stream: VideoStream) -> float:
    """How long the last frame is shown, in seconds. AVI understates it: then the shortest gap between frames."""
    return max(stated, float(np.diff(timestamps).min(initial=np.inf)) if len(timestamps) > 1 else 0) or (
        1 / _frame_rate(stream)
    )


def _announced_duration(container: InputContainer, stream: VideoStream, packets: _Packets) -> float | None:
    """The seconds from the first key frame on that the header states for the video, or else for the whole file."""
    first = int(np.argmax(packets.is_key))
    known = [value for value in packets.pts[first:] if value is not None]
    start = float(min(known) * (stream.time_base or 1)) if known else 0.0
    if stream.duration:
        skipped = start - float((stream.start_time or 0) * (stream.time_base or 1)) if first else 0.0
        return float(stream.duration * (stream.time_base or 1)) - skipped
    if (words := _duration_in_words(stream)) is not None:
        return words - start
    return container.duration / av.time_base - start if container.duration else None


def _duration_in_words(stream: VideoStream) -> float | None:
    """The end of a stream in seconds, which Matroska and WebM state as 00:00:25.025000000."""
    match = re.fullmatch(r"(\d+):(\d+):(\d+(?:\.\d+)?)", stream.metadata.get("DURATION", ""))
    if match is None:
        return None
    hours, minutes, seconds = map(float, match.groups())
    return 3600 * hours + 60 * minutes + seconds


def _warn_of_clocks(path: str, container: InputContainer, index: VideoIndex, stated: float | None, name: str) -> None:
    """Tells where a file states two durations, or frames follow each other as no camera takes and nobody shows them.

    Args:
        stated: how many seconds the file lasts by what Matroska says in words, which does not depend on its clock.
    """
    metadata = index.metadata
    durations = contradicting_durations(path) if "mp4" in container.format.name else None
    if stated is not None and metadata.duration > stated and durations_differ(metadata.duration, stated):
        durations = stated, metadata.duration
    step = typical_step(metadata.frame_timestamps, metadata.duration)
    if durations is not None:
        first, second = durations
        problem = f"by its header, it lasts {first:.1f} s and {second:.1f} s; frames may be left out"
    elif len(metadata.frame_timestamps) > 1 and not _SHORTEST_STEP <= step <= _LONGEST_STEP:
        problem = f"its frames follow each other every {step:.3g} s; its clock may be damaged"
    else:
        return
    warnings.warn(f"The times in {name} cannot be trusted: {problem}.", stacklevel=5)


def _is_short(duration: float, announced: float | None) -> bool:
    # Clocks of containers may be coarse.
    return announced is not None and announced > 1.02 * duration + 0.25


def _warn_of_damage(packets: _Packets, container: InputContainer, stream: VideoStream, path: str, name: str) -> None:
    """Tells what the container knows, beside what decoding will show."""
    places = damaged_places(path, container.format.name, stream.id)
    if container.format.name != "mpegts":  # of which FFmpeg marks a whole packet where recordings were joined
        places = sorted({*places, *(packets.positions[packet] for packet in np.flatnonzero(packets.is_corrupt))})
    if places and not packets.is_cut:
        known = [(at, pts) for at, pts in zip(packets.positions, packets.pts, strict=True) if pts is not None]
        before = [pts for at, pts in known if at <= places[0]]
        seconds = float((before[-1] - known[0][1]) * (stream.time_base or 1)) if before else 0.0
        warnings.warn(
            f"{name} is damaged: data is lost or changed, at about {seconds:.1f} s first; frames from there on may be "
            "missing, wrong or at another time.",
            stacklevel=5,
        )
    # AVI times frames by counting them, those that repeat the one before included.
    num_counted = max((pts for pts in packets.pts if pts is not None), default=0) + 1
    if container.format.name == "avi" and stream.frames > num_counted and not packets.is_cut:
        warnings.warn(
            f"{name} is damaged: it announces {stream.frames} frames and has {num_counted}; those after a missing one "
            "come too early.",
            stacklevel=5,
        )


def _warn_of_cut(metadata: TimedVideoMetadata, announced: float | None, name: str) -> None:
    whole = f" of {announced:.1f}" if announced is not None else ""
    warnings.warn(
        f"{name} is cut off: the {metadata.total_num_frames} frames that can be read, the first "
        f"{metadata.duration:.1f}{whole} seconds, are used.",
        stacklevel=5,
    )


def _goes_on_without_pictures(path: str, name: str, limits: VideoLimits, announced: float | None) -> bool:
    """Whether sound or subtitles fill the announced time after the last picture."""
    container, stream = open_video(path, name, limits)
    with container:
        starts, ends = [], []
        try:
            for packet in container.demux():
                if packet.pts is not None and packet.time_base:
                    starts.append(float(packet.pts * packet.time_base))
                    if packet.stream_index != stream.index:
                        ends.append(float((packet.pts + (packet.duration or 0)) * packet.time_base))
        except UNREADABLE:
            return False
    return bool(ends) and not _is_short(max(ends) - min(starts), announced)
