"""An open video file with its decoder: what may be opened, and pictures as a person would see them."""

import math
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from fractions import Fraction
from itertools import chain
from typing import Any, cast

import av
import numpy as np
from av.container import InputContainer
from av.stream import Disposition
from av.video.frame import PictureType
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream
from PIL import Image, UnidentifiedImageError

from .video_gaps import FrameNumbers
from .video_mp4 import unreadable_track
from .video_sources import VideoLimits
from .video_times import MAX_REORDERED


_PYAV_VERSION = int(av.__version__.split(".")[0])

# Until PyAV 18, metadata that is not UTF-8 raises an error unless it is replaced; PyAV 19 always replaces it.
OPEN_OPTIONS: dict[str, Any] = {"metadata_errors": "replace"} if _PYAV_VERSION < 19 else {}

# Formats that hold the video themselves. Playlists and scripts, which name other files, are not among them.
FILE_FORMATS = (
    "3g2,3gp,amv,apng,asf,av1,avi,avs2,avs3,cavsvideo,dirac,dnxhd,dv,evc,flv,gif,gxf,h261,h263,h264,hevc,ivf,kux,"
    "live_flv,m4a,m4v,matroska,mj2,mjpeg,mov,mp4,mpeg,mpegts,mpegtsraw,mpegvideo,mxf,nsv,nut,nuv,obu,ogg,pva,rm,swf,"
    "vc1,vc1test,vvc,webm,wtv,yuv4mpegpipe"
)

# Formats of which one frame is an image.
_IMAGE_FORMATS = ("apng", "gif")

# What demuxers raise where a file ends or is damaged; PyAV an `IndexError` where a stream turns up late.
UNREADABLE = (av.FFmpegError, IndexError, MemoryError)

# Stream kinds that accompany a video.
_NOT_SHOWN = Disposition.attached_pic | Disposition.timed_thumbnails | Disposition.still_image

# How far a display matrix may be from a quarter turn: a part that should be 0, and one scale to the other.
_MOST_SLANT, _MOST_STRETCH = 1 / 32, 4

# What to say of one that is farther.
NOT_UPRIGHT = "is no quarter turn or mirror image: pictures are shown as they are stored, and may not be upright."

# A flag of FFmpeg's formats that PyAV has no name for: timestamps may jump (AVFMT_TS_DISCONT).
_TIMES_MAY_JUMP = 0x0200


def open_video(path: str, name: str, limits: VideoLimits) -> tuple[InputContainer, VideoStream]:
    """Opens a file and finds the video stream that a player shows. The caller closes the container.

    Args:
        path: The path of the file. It is always taken for a path, also if it looks like an address.
        name: What to call it in messages.
        limits: What is refused.

    Raises:
        ValueError: if this is no video file, has no video stream, its codec is unknown, or it is beyond the limits.
    """
    if (track := unreadable_track(path)) is not None:
        raise ValueError(f"{name} numbers a track {track}, more than players count: the file is damaged.")
    # Not `options`: these would be for the streams, too, and PyAV 14 crashes where a header does not list the streams.
    options = {"format_whitelist": FILE_FORMATS, "protocol_whitelist": "file"}
    try:
        container = av.open(f"file:{path}", container_options=options, **OPEN_OPTIONS)
    except (*UNREADABLE, ValueError) as error:
        _refuse_image(path, name)
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise ValueError(
            f"{name} cannot be read as a video ({reason}): it is not a video file, or a part of it is "
            "missing; check that a video player plays it."
        ) from error
    try:
        stream = shown_stream(container, name, limits)
        size = os.path.getsize(path)
        if stream.frames > size:
            raise ValueError(f"{name} announces {stream.frames} frames in {size} bytes: the file is damaged.")
        return container, stream
    except BaseException:
        container.close()
        raise


def may_jump(container: InputContainer) -> bool:
    """Whether clocks are known to jump in this kind of container, as in broadcasts."""
    return bool(int(container.format.flags) & _TIMES_MAY_JUMP)


def is_b_frame(frame: av.VideoFrame) -> bool:
    """Whether a frame may refer to one that is shown after it."""
    return frame.pict_type == PictureType.B


def is_image(container: InputContainer, num_frames: int) -> bool:
    """Whether a container holds a still image."""
    is_avif = container.metadata.get("major_brand") == "avif"
    return num_frames == 1 and (container.format.name in _IMAGE_FORMATS or is_avif)


def _refuse_image(path: str, name: str) -> None:
    try:
        with Image.open(path):
            pass
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return
    raise ValueError(f"{name} is an image where a video is meant: pass it as an image.")


def shown_stream(container: InputContainer, name: str, limits: VideoLimits) -> VideoStream:
    """The stream that a player shows: the one that is marked as the default, then the largest, then the first.

    Raises:
        ValueError: if there is no video stream, its codec is unknown, or its frames are beyond the limits.
    """
    # The cover picture of a song is a video stream too.
    streams = [stream for stream in container.streams.video if not stream.disposition & _NOT_SHOWN]
    if not streams:
        found = ", ".join(sorted({stream.type for stream in container.streams} - {"video"})) or "nothing"
        raise ValueError(
            f"{name} has no video stream but {found}: it has no moving pictures, or a part of it is missing."
        )
    decodable = [stream for stream in streams if stream.codec_context is not None]
    if not decodable:
        raise ValueError(f"{name} uses a video codec that this FFmpeg cannot decode: convert it to H.264.")

    def rank(stream: VideoStream) -> tuple[bool, bool, int]:
        size = stream.codec_context.width * stream.codec_context.height
        return stream.frames != 1, bool(stream.disposition & Disposition.default), size

    shown = max(decodable, key=rank)
    width, height = shown.codec_context.width, shown.codec_context.height
    if width * height > limits.pixels:
        raise ValueError(
            f"{name} has frames of {width} x {height} pixels, more than {limits.pixels}: make them smaller, or raise "
            "`pixels` of `limits`."
        )
    shown.codec_context.options = {"max_pixels": str(limits.pixels)}  # a frame may be larger than announced
    return shown


class Decoder:
    """An open file with a decoder and a scaler, for one thread. Their own threads end when it is closed.

    It gives no more frames once `stop` is set.

    Attributes:
        starts_with_key (`bool`): Whether the file starts with a key frame, once `all_frames` was called.
        num_errors (`int`): How many packets could not be decoded since decoding started.
        damaged (`set[int]`): The numbers of frames that are wrong, or refer to one that is.
    """

    def __init__(self, path: str, name: str, limits: VideoLimits, threads: int, stop: threading.Event) -> None:
        self.stop = stop
        self.damaged: set[int] = set()
        self.num_errors = 0
        self._num_threads = threads
        self._is_damaged = False  # the last frame that came out was, and so are those that refer to it
        self._num_sent = 0
        self._place_of_pts: dict[int | None, int] = {}  # of packets whose frames did not come out yet
        self._lost: tuple[int, int] | None = None  # between which packets one is missing, or could not be decoded
        self._between: deque[int] = deque(maxlen=MAX_REORDERED)  # frames since the last that is no B-frame
        self.starts_with_key = True
        self.container, self.stream = open_video(path, name, limits)
        self.stream.thread_type = "AUTO"
        self.stream.thread_count = threads
        context = self.stream.codec_context
        is_h264 = context.name == "h264"
        self._numbers = FrameNumbers(context.extradata, self.container.format.name) if is_h264 else None
        self._pictures = PictureMaker(self.stream, limits)

    def __enter__(self) -> "Decoder":
        return self

    def __exit__(self, *exception: Any) -> None:
        # Freeing a decoder holds the interpreter's lock while it waits for its threads, which may wait for the lock
        # to write a log. Flushing lets go of the lock and leaves them idle.
        self.stream.codec_context.flush_buffers()
        # Threads end as nothing refers to decoder and scaler any more; the traceback of an error may refer to `self`.
        self.container.close()
        del self.container, self.stream, self._pictures

    def frames(self, packets: Iterator[av.Packet | None]) -> Iterator[av.VideoFrame]:
        """Decodes packets, after which `None` brings out what the decoder still holds."""
        for packet in packets:
            if self.stop.is_set():
                return
            yield from self._decode_packet(packet)

    def all_frames(self) -> Iterator[av.VideoFrame]:
        """Decodes the file from its start."""
        packets = self.packets()
        first = next(packets)
        self.starts_with_key = first is not None and first.is_keyframe
        return self.frames(chain([first], packets))

    def packets(self) -> Iterator[av.Packet | None]:
        """The packets from the present position on, as far as they can be read, and `None` at the end."""
        try:
            for packet in self.container.demux(self.stream):
                if packet.size or packet.pts is not None:
                    yield packet
        except UNREADABLE:
            pass  # the index has told that the file is cut off
        yield None

    def _decode_packet(self, packet: av.Packet | None) -> list[av.VideoFrame]:
        if packet is not None and _repeats_a_frame(packet):
            return []
        self._num_sent += 1
        if packet is not None:
            self._place_of_pts[packet.pts] = self._num_sent
            if self._numbers is not None and self._numbers.shows_a_gap(packet):
                self._lose(self._num_sent)
        try:
            return self.stream.codec_context.decode(packet)
        except av.FFmpegError:
            self.num_errors += 1
            # An error is told when threads are done with the packet, before the frames of packets before it come out.
            self._lose(self._num_sent - self._num_threads)
            return []

    def _lose(self, first: int) -> None:
        """A packet from `first` to the last that was sent is missing, or could not be decoded."""
        self._lost = first if self._lost is None else self._lost[0], self._num_sent

    def numbered(self, frames: Iterator[av.VideoFrame]) -> Iterator[tuple[int, av.VideoFrame]]:
        """Numbers frames in the order of the decoder, and notes which are damaged."""
        for number, frame in enumerate(frames):
            self.note_damage(number, frame)
            yield number, frame

    def note_damage(self, number: int, frame: av.VideoFrame) -> None:
        """Takes note whether `frame`, the next that came out, is damaged itself or through one before it.

        B-frames refer to a frame that is shown after them, too.
        """
        self._is_damaged = (
            frame.is_corrupt or (self._is_damaged and not frame.key_frame) or self._refers_to_a_lost_frame(frame)
        )
        (self.damaged.add if self._is_damaged else self.damaged.discard)(number)
        if frame.is_corrupt:
            self.damaged.update(self._between)
        if is_b_frame(frame):
            self._between.append(number)
        else:
            self._between.clear()

    def _refers_to_a_lost_frame(self, frame: av.VideoFrame) -> bool:
        place = self._place_of_pts.pop(frame.pts, None)
        if self._lost is None:
            return False
        first, last = self._lost
        if frame.key_frame:
            if place is None or place > last:
                self._lost = None
            return False
        return place is None or place >= first

    def forget_damage(self) -> None:
        """Decoding starts anew at another place."""
        self._is_damaged, self._lost, self.num_errors = False, None, 0
        if self._numbers is not None:
            self._numbers.begin_anew()
        self._place_of_pts.clear()
        self._between.clear()

    def convert(self, frame: av.VideoFrame) -> np.ndarray:
        """See [`PictureMaker.convert`]."""
        return self._pictures.convert(frame)

    @property
    def is_turn_unknown(self) -> bool:
        """See [`PictureMaker`]."""
        return self._pictures.is_turn_unknown


class PictureMaker:
    """Makes pictures of the frames of one stream, all of the same size before they are turned.

    Attributes:
        is_turn_unknown (`bool`): Whether the display matrix of a frame was none of the eight of upright pictures.
    """

    def __init__(self, stream: VideoStream, limits: VideoLimits) -> None:
        context = stream.codec_context
        self._size = _display_size(context.width, context.height, cast(Fraction, stream.sample_aspect_ratio), limits)
        self._reformatter = VideoReformatter()  # setting one up takes far longer than a conversion
        self.is_turn_unknown = False

    def convert(self, frame: av.VideoFrame) -> np.ndarray:
        """The picture as a person would see it: upright, square pixels, transparent parts white.

        Returns an array of shape `(height, width, 3)`.
        """
        width, height = self._size
        has_alpha = _has_alpha(frame.format)
        layout = "rgba" if has_alpha else "rgb24"
        picture = self._reformatter.reformat(frame, width=width, height=height, format=layout).to_ndarray()
        if has_alpha:
            opacity = picture[..., 3:].astype(np.uint16)
            picture = ((picture[..., :3] * opacity + 255 * (255 - opacity) + 127) // 255).astype(np.uint8)
        turn = _turn(frame)
        self.is_turn_unknown |= turn is None
        return np.ascontiguousarray(picture if turn is None else _turned(picture, turn))


def _display_size(
    width: int, height: int, pixel_ratio: Fraction | None, limits: VideoLimits
) -> tuple[int | None, int | None]:
    """The size with square pixels, where nothing shrinks; `None` for the frame's own."""
    if not width or not height:
        return None, None
    wider, higher = width, height
    if pixel_ratio is not None and pixel_ratio > 1:
        wider = round(width * pixel_ratio)
    elif pixel_ratio is not None and pixel_ratio > 0:
        higher = round(height / pixel_ratio)
    # A ratio that makes too large a picture is not believed.
    return (wider, higher) if wider * higher <= limits.pixels else (width, height)


def _has_alpha(layout: av.VideoFormat) -> bool:
    # Colours of a palette have an opacity, but it is not a component of its own.
    return layout.name == "pal8" or any(component.is_alpha for component in layout.components)


def _turned(picture: np.ndarray, turn: tuple[bool, bool, bool]) -> np.ndarray:
    """Turns and mirrors a picture, see `_turn`."""
    is_swapped, is_mirrored, is_flipped = turn
    if is_swapped:
        picture = picture.swapaxes(0, 1)
    if is_mirrored:
        picture = picture[:, ::-1]
    if is_flipped:
        picture = picture[::-1]
    return picture


def _turn(frame: av.VideoFrame) -> tuple[bool, bool, bool] | None:
    """Whether rows become columns, and then left becomes right and top becomes bottom, as the display matrix says.

    `None` for a matrix that would do something else: a damaged one.
    """
    a, b, c, d = _display_matrix(frame)
    is_swapped = abs(b) + abs(c) > abs(a) + abs(d)
    (across, down), others = ((c, b), (a, d)) if is_swapped else ((a, d), (b, c))
    least, most = sorted((abs(across), abs(down)))
    if least == 0 or most > _MOST_STRETCH * least or max(map(abs, others)) > _MOST_SLANT * least:
        return None
    return is_swapped, across < 0, down < 0


def _display_matrix(frame: av.VideoFrame) -> tuple[float, float, float, float]:
    """What x and y of a pixel become: x goes to `(first, second)`, y to `(third, fourth)`."""
    try:
        data = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # a kind of side data that PyAV does not know hides all others
        angle = math.radians(frame.rotation)
        return math.cos(angle), -math.sin(angle), math.sin(angle), math.cos(angle)
    if data is None:
        return 1, 0, 0, 1
    a, b, _, c, d = np.frombuffer(bytes(data), dtype=np.int32)[:5].tolist()
    return a, b, c, d


def _repeats_a_frame(packet: av.Packet) -> bool:
    """AVI repeats a frame by an empty packet, which the decoder would take for the end of the stream."""
    return packet.size == 0 and packet.pts is not None


def run_in_threads(
    work: Callable[[threading.Event], None], num_threads: int, stop: threading.Event | None = None
) -> None:
    """Runs `work` in threads, which all end before an error of one of them or Ctrl-C is passed on.

    `work` takes an event that tells it to stop; `stop`, where one is given.
    """
    stop, idle = stop or threading.Event(), threading.Condition()
    num_running = 0

    def run() -> None:
        nonlocal num_running
        with idle:
            if stop.is_set():
                return
            num_running += 1
        try:
            work(stop)
        finally:
            with idle:
                num_running -= 1
                idle.notify()

    done: Future | None = None
    futures: list[Future] = []
    with ThreadPoolExecutor(num_threads) as pool:
        try:
            for _ in range(num_threads):
                futures.append(pool.submit(run))
            for done in as_completed(futures):
                done.result()
        finally:
            # The pool does not know a thread that was just starting when Ctrl-C came, and so would not wait for it.
            with idle:
                stop.set()
                idle.wait_for(lambda: num_running == 0)
            # The traceback of an error refers to this frame, which must not refer to the error's future in turn.
            futures, done = [], None
