"""From a video file to the sampled frames, in bounded memory.

A file is read in two passes. The first reads the packets without decoding any of them, and learns when every frame is
shown and where decoding can start: this is exact for variable frame rates and for containers that state no duration
and no number of frames, and takes some 3 µs a frame. The second decodes the wanted frames only: it seeks to the key
frame before a wanted frame, goes on from there to the last frame that is wanted before the next key frame, and so on.
Several threads, each with a decoder of its own, share these pieces of the file. Each converts and resizes a wanted
frame as soon as it is decoded, so that only resized frames are ever held.
"""

import os
import re
import shutil
import tempfile
import warnings
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import closing, contextmanager
from dataclasses import InitVar, dataclass
from itertools import chain, islice, pairwise
from typing import BinaryIO

import av
import numpy as np
import torch
from av.stream import Disposition
from av.video.reformatter import VideoReformatter
from huggingface_hub.utils import httpx
from tqdm.auto import tqdm
from transformers.video_utils import VideoMetadata


VideoSource = str | os.PathLike | bytes | BinaryIO

# More decoders would hold more pictures than is worth the time that they save.
_MAX_THREADS = 8

# Before PyAV 19, metadata that is not UTF-8 is an error unless it is replaced.
_OPEN_OPTIONS = {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}

# In their packets it says up front whether another frame refers to a frame.
_CODECS_WITH_MARKED_FRAMES = ("h264", "hevc")


@dataclass
class TimedVideoMetadata(VideoMetadata):
    """
    `VideoMetadata` that knows when each frame is shown, also at a variable frame rate.

    Args:
        frame_timestamps (`np.ndarray` of shape `(total_num_frames,)`):
            The time in seconds, from the start of the video, at which each frame of the file appears. `fps` is the
            average, `total_num_frames / duration`.
    """

    frame_timestamps: InitVar[np.ndarray | None] = None

    def __post_init__(self, frame_timestamps: np.ndarray | None):
        self.frame_timestamps = frame_timestamps

    @property
    def timestamps(self) -> list[float]:
        "Times in seconds from the start of the video at which the sampled frames appear."
        return [float(self.frame_timestamps[index]) for index in self.frames_indices]


@dataclass
class _Packets:
    """
    The packets of a video stream in decoding order, as far as the file can be read.

    Args:
        pts (`np.ndarray` of shape `(num_packets,)`):
            When the frame of each packet is shown, in units of the stream's time base. Where the container has no
            timestamps to go by, the frames are numbered instead.
        keys (`np.ndarray` of shape `(num_keys,)`): The packets at which decoding can start.
        shown (`np.ndarray` of shape `(num_frames,)`): The packets whose frames are shown, in the order of showing.
        shown_pts (`np.ndarray` of shape `(num_frames,)`): When these are shown.
        timed (`bool`): Whether the container has timestamps to go by.
        marked (`bool`): Whether decoders know a frame that no other refers to before decoding it.
    """

    pts: np.ndarray
    keys: np.ndarray
    shown: np.ndarray
    shown_pts: np.ndarray
    timed: bool
    marked: bool

    def starts(self, packet: int) -> np.ndarray:
        "The packets from which the frame of `packet` can be decoded, the nearest last."
        keys = self.keys[: np.searchsorted(self.keys, packet, side="right")]
        # A frame that is shown before the key frame it follows in the file needs the key frame before that one.
        usable = keys[self.pts[keys] <= self.pts[packet]]
        return usable if len(usable) else np.zeros(1, dtype=int)


@dataclass
class _Image:
    """
    A decoded frame as it is wanted.

    Args:
        index (`int`): The number of the frame that was wanted.
        number (`int`): The number of the frame that this is; another one where that packet shows nothing of its own.
        size (`tuple[int, int]`): Height and width of the upright frame in the file.
        pixels (`np.ndarray` of shape `(3, height, width)`): The frame, transformed.
    """

    index: int
    number: int
    size: tuple[int, int]
    pixels: np.ndarray


class _SeekError(Exception):
    "The container cannot be entered at a given packet, or its timestamps are not those of showing."


def decode_video(
    source: VideoSource,
    sample_indices_fn: Callable[..., np.ndarray] | None = None,
    transform: Callable[[torch.Tensor], torch.Tensor] | None = None,
    progress: bool = False,
    seek: str = "exact",
) -> tuple[torch.Tensor, TimedVideoMetadata]:
    """
    Decodes the sampled frames of a video, in as many threads as PyTorch uses (`torch.get_num_threads()`), at most 8.

    Frames are turned upright where the file says that they are recorded on their side. Resizing belongs into
    `transform`: the result then equals that of decoding at full size and resizing afterwards, while only resized
    frames are held.

    Args:
        source (`str`, `os.PathLike`, `bytes` or binary file object):
            Path, http(s) URL or content of a video file. What is not a local path is copied to a temporary file.
        sample_indices_fn (`Callable`, *optional*):
            Called with `metadata=` ([`TimedVideoMetadata`]), returns the numbers of the wanted frames. All frames are
            decoded without it.
        transform (`Callable`, *optional*):
            Applied to each wanted frame, a uint8 tensor of shape `(3, height, width)`; not in order, and in several
            threads at once.
        progress (`bool`, *optional*, defaults to `False`):
            Whether to show a progress bar.
        seek (`str`, *optional*, defaults to `"exact"`):
            `"exact"` decodes the wanted frames. `"keyframe"` takes the key frame nearest in time to each wanted frame
            instead, which is many times faster, as nothing else is decoded; `frames_indices` and `timestamps` of the
            metadata are those of the key frames. There are as many frames as wanted in any case: where key frames are
            rarer than wanted frames they are repeated, with a warning.

    Returns:
        `tuple[torch.Tensor, TimedVideoMetadata]`: The frames, of shape `(num_frames, 3, height, width)` and uint8 (or
        what `transform` makes of them), and their metadata, `frames_indices` and `timestamps` included.

    Raises:
        `FileNotFoundError`: if there is no file at the path.
        `ValueError`: if the file holds no readable video, the wanted frames are not frames of the video, there is no
            such `seek`, or key frames are wanted of a video without any.

    Warns:
        `UserWarning`: if the file is cut off or damaged and only some of the frames can be read, or if key frames are
            repeated.
    """
    if seek not in ("exact", "keyframe"):
        raise ValueError(f"`seek={seek!r}` is no way to find frames: use 'exact' or 'keyframe'.")
    with _as_local_file(source) as (path, name):
        with _open_video(path, name) as (container, stream):
            packets, metadata = _read_packets(container, stream, name)

        if sample_indices_fn is None:
            indices = np.arange(metadata.total_num_frames)
        else:
            indices = np.asarray(sample_indices_fn(metadata=metadata), dtype=int)
        if len(indices) == 0:
            raise ValueError(f"No frame of {name} was asked for: ask for at least one.")
        if indices.min() < 0 or indices.max() >= metadata.total_num_frames:
            raise ValueError(
                f"Frames {indices.min()} to {indices.max()} were asked of {name}: ask for frames from 0 to "
                f"{metadata.total_num_frames - 1}."
            )
        if seek == "keyframe":
            indices = _nearest_key_frames(packets, metadata, indices, name)
        frames, found, size = _decode_frames(path, name, packets, indices, transform, progress)

    metadata.height, metadata.width = size
    readable = found >= 0
    if not readable.all():
        warnings.warn(
            f"{name} is damaged: only {readable.sum()} of the {len(indices)} sampled frames can be decoded and are "
            "used.",
            stacklevel=2,
        )
        frames, found = frames[readable], found[readable]
    metadata.frames_indices = found.tolist()
    return torch.from_numpy(frames), metadata


@contextmanager
def _as_local_file(source: VideoSource) -> Iterator[tuple[str, str]]:
    "Gives the path of a local file with the video, and what to call the video in messages."
    if isinstance(source, str) and source.startswith(("http://", "https://")):
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "video")
            try:
                with httpx.stream("GET", source, follow_redirects=True) as response, open(path, "wb") as file:
                    response.raise_for_status()
                    for chunk in response.iter_bytes():
                        file.write(chunk)
            except httpx.HTTPError as error:
                raise ValueError(
                    f"The video '{source}' could not be downloaded ({error}): check the address."
                ) from error
            yield path, f"'{source}'"
    elif isinstance(source, str | os.PathLike):
        path = os.fspath(source)
        if not os.path.exists(path):
            raise FileNotFoundError(f"There is no video file at '{path}': check the path.")
        if not os.path.isfile(path):
            raise ValueError(f"'{path}' is a folder, not a video file: give the path of a file.")
        if os.path.getsize(path) == 0:
            raise ValueError(f"The video file '{path}' is empty (0 bytes): copy or download it again.")
        yield path, f"'{path}'"
    elif not isinstance(source, bytes) and not hasattr(source, "read"):
        raise ValueError(f"{source!r} is not a video: pass a path, a URL, the bytes of a file or an open file.")
    else:
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "video")
            with open(path, "wb") as file:
                if isinstance(source, bytes):
                    file.write(source)
                else:
                    shutil.copyfileobj(source, file)
            if os.path.getsize(path) == 0:
                raise ValueError("The given video is empty (0 bytes): give the whole content of a video file.")
            yield path, "The given video"


@contextmanager
def _open_video(
    path: str, name: str, threads: int = 1
) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    try:
        container = av.open(path, **_OPEN_OPTIONS)
    except av.FFmpegError as error:
        raise ValueError(
            f"{name} cannot be read as a video ({error.strerror}): it is not a video file, or a part of it is "
            "missing; check that a video player plays it."
        ) from error
    with container:
        # The cover picture of a song is a video stream too.
        streams = [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]
        if not streams:
            found = ", ".join(sorted({stream.type for stream in container.streams} - {"video"})) or "nothing"
            raise ValueError(
                f"{name} has no video stream but {found}: it has no moving pictures, or a part of it is missing."
            )
        stream = streams[0]
        if stream.codec_context is None:
            raise ValueError(f"{name} uses a video codec that this FFmpeg cannot decode: convert it to H.264.")
        stream.thread_type = "AUTO"
        stream.thread_count = threads
        yield container, stream


def _read_packets(
    container: av.container.InputContainer, stream: av.VideoStream, name: str
) -> tuple[_Packets, TimedVideoMetadata]:
    "Reads all packets without decoding them; warns where the file is cut off."
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

    shown = np.flatnonzero(is_shown)
    if len(shown) == 0:
        raise ValueError(f"{name} has a video stream without any frame: it was cut off or never finished.")
    if len(shown) == 1 and (container.format.name == "image2" or container.format.name.endswith("_pipe")):
        raise ValueError(f"{name} is an image where a video is meant: pass it as an image.")

    # The average rate is unknown to streams without timestamps.
    rate = float(stream.guessed_rate or stream.average_rate or 25)
    timed = all(pts[packet] is not None for packet in shown)
    # Where they start again, as in recordings that were put together, the order of the file is the one to trust.
    timed = timed and all(a < b for a, b in pairwise(pts[packet] for packet in shown if is_key[packet]))
    marked = stream.codec_context.name in _CODECS_WITH_MARKED_FRAMES
    if timed:
        pts = np.array([0 if value is None else value for value in pts])
        shown = shown[np.argsort(pts[shown], kind="stable")]
        timestamps = (pts[shown] - pts[shown[0]]) * float(stream.time_base)
        announced = _announced_duration(container, stream, start=float(pts[shown[0]] * stream.time_base))
        # AVI understates how long a frame lasts.
        gaps = np.diff(timestamps, prepend=timestamps[0])
        shortest_gap = min(gaps[gaps > 0], default=0)
        last_duration = max(durations[shown[-1]] * float(stream.time_base), shortest_gap) or 1 / rate
        duration = float(timestamps[-1] + last_duration)
    else:
        pts = np.cumsum(is_shown) - 1
        timestamps = np.arange(len(shown)) / rate
        announced = None
        duration = len(shown) / rate

    # Clocks of containers may be coarse, and sound may go on a little longer.
    if is_cut or (announced is not None and announced > 1.02 * duration + 0.25):
        whole = f" of {announced:.1f}" if announced is not None else ""
        warnings.warn(
            f"{name} is cut off: the {len(shown)} frames that can be read, the first {duration:.1f}{whole} seconds, "
            "are used.",
            stacklevel=2,
        )

    metadata = TimedVideoMetadata(
        total_num_frames=len(shown),
        fps=len(shown) / duration,
        width=stream.codec_context.width,
        height=stream.codec_context.height,
        duration=duration,
        video_backend="pyav",
        frame_timestamps=timestamps,
    )
    keys = np.flatnonzero(is_key)
    return _Packets(pts=pts, keys=keys, shown=shown, shown_pts=pts[shown], timed=timed, marked=marked), metadata


def _announced_duration(container: av.container.InputContainer, stream: av.VideoStream, start: float) -> float | None:
    "The seconds that the header states for the video stream, which starts at `start`, or else for the whole file."
    if stream.duration:
        return float(stream.duration * stream.time_base)
    # Matroska and WebM state it as 00:00:25.025000000.
    if match := re.fullmatch(r"(\d+):(\d+):(\d+(?:\.\d+)?)", stream.metadata.get("DURATION", "")):
        hours, minutes, seconds = map(float, match.groups())
        return 3600 * hours + 60 * minutes + seconds - start
    return container.duration / av.time_base - start if container.duration else None


def _nearest_key_frames(packets: _Packets, metadata: TimedVideoMetadata, indices: np.ndarray, name: str) -> np.ndarray:
    "The numbers of the key frames nearest in time to the frames numbered `indices`; warns where they have to repeat."
    keys = np.flatnonzero(np.isin(packets.shown, packets.keys))
    if len(keys) == 0:
        raise ValueError(f"{name} marks none of its frames as a key frame: pass `seek='exact'`.")
    times = metadata.frame_timestamps[keys]
    nearest = keys[np.searchsorted((times[:-1] + times[1:]) / 2, metadata.frame_timestamps[indices])]
    num_keys, num_wanted = len(np.unique(nearest)), len(np.unique(indices))
    if num_keys < num_wanted:
        warnings.warn(
            f"{name} has too few key frames: {num_keys} of them stand for the {num_wanted} sampled frames, some "
            "repeatedly; pass `seek='exact'` for the frames themselves.",
            stacklevel=3,
        )
    return nearest


def _decode_frames(
    path: str,
    name: str,
    packets: _Packets,
    indices: np.ndarray,
    transform: Callable[[torch.Tensor], torch.Tensor] | None,
    progress: bool,
) -> tuple[np.ndarray, np.ndarray, tuple[int, int]]:
    """
    Decodes the frames numbered `indices`.

    Returns the frames, of shape `(len(indices), 3, height, width)`; the number of the frame that was found for each
    index, -1 where none could be decoded; and the height and width of the frames in the file.
    """
    if packets.timed:
        try:
            with closing(_decode_in_threads(path, name, packets, np.unique(indices), transform)) as images:
                return _collect(images, name, indices, progress)
        except _SeekError:
            pass  # a rare container, of which decoding everything in order makes the best
    with closing(_decode_in_order(path, name, np.unique(indices), transform)) as images:
        return _collect(images, name, indices, progress)


def _collect(
    images: Iterator[_Image], name: str, indices: np.ndarray, progress: bool
) -> tuple[np.ndarray, np.ndarray, tuple[int, int]]:
    "Puts the images where they are wanted; see above."
    frames, found = None, np.full(len(indices), -1)
    order = np.argsort(indices)
    with tqdm(total=len(indices), desc=f"Decoding {name}", unit="frame", disable=not progress) as bar:
        for image in images:
            if frames is None:
                frames, size = np.empty((len(indices), *image.pixels.shape), dtype=image.pixels.dtype), image.size
            places = order[slice(*np.searchsorted(indices, [image.index, image.index + 1], sorter=order))]
            frames[places], found[places] = image.pixels, image.number
            bar.update(len(places))
    if frames is None:
        raise ValueError(f"None of the {len(indices)} sampled frames of {name} can be decoded: the file is damaged.")
    return frames, found, size


def _decode_in_threads(
    path: str,
    name: str,
    packets: _Packets,
    indices: np.ndarray,
    transform: Callable[[torch.Tensor], torch.Tensor] | None,
) -> Iterator[_Image]:
    "Yields the images of the frames numbered `indices`, in no particular order."
    groups = defaultdict(list)  # by the key frame from which to decode
    for index in indices:
        groups[int(packets.starts(packets.shown[index])[-1])].append(index)
    num_decoders = min(_num_threads(), len(groups))
    todo = deque([*groups.items(), *[None] * num_decoders])
    decoders = [
        _decode_groups(path, name, packets, iter(todo.popleft, None), transform, _num_threads() // num_decoders)
        for _ in range(num_decoders)
    ]
    # A decoder waits with an image until it is taken, so that there are never more than one each.
    with ThreadPoolExecutor(num_decoders) as pool:
        running = {pool.submit(next, decoder, None): decoder for decoder in decoders}
        while running:
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                decoder = running.pop(future)
                if (image := future.result()) is not None:
                    running[pool.submit(next, decoder, None)] = decoder
                    yield image


def _num_threads() -> int:
    return min(torch.get_num_threads(), _MAX_THREADS)


def _decode_groups(
    path: str,
    name: str,
    packets: _Packets,
    groups: Iterator[tuple[int, list[int]]],
    transform: Callable[[torch.Tensor], torch.Tensor] | None,
    threads: int,
) -> Iterator[_Image]:
    "Decodes groups of frames, each from its key frame on; see above."
    with _open_video(path, name, threads) as (container, stream):
        to_image = _image_converter(stream, transform)
        for start, indices in groups:
            # In a stream that is refreshed bit by bit, pictures are whole only a key frame or two later.
            for key in packets.starts(start)[:-4:-1]:
                found = set()
                for index, number, frame in _pick(_decode_from(container, stream, packets, key, indices), indices):
                    found.add(index)
                    yield to_image(index, number, frame)
                indices = [index for index in indices if index not in found]
                if not indices:
                    break


def _decode_in_order(
    path: str, name: str, indices: np.ndarray, transform: Callable[[torch.Tensor], torch.Tensor] | None
) -> Iterator[_Image]:
    "Decodes the file from its start; see above."
    with _open_video(path, name, _num_threads()) as (container, stream):
        to_image = _image_converter(stream, transform)
        decoded = chain.from_iterable(_decode_packet(stream, packet) for packet in container.demux(stream))
        for picked in _pick(enumerate(decoded), indices):
            yield to_image(*picked)


def _pick(
    decoded: Iterator[tuple[int, av.VideoFrame]], indices: Sequence[int]
) -> Iterator[tuple[int, int, av.VideoFrame]]:
    "Picks the frames numbered `indices` (ascending) from the decoded ones, which come with their numbers."
    pending, latest = deque(indices), (-1, None)
    for number, frame in chain(decoded, [(np.inf, None)]):
        while pending and pending[0] < number:
            index = pending.popleft()
            # Some packets show nothing of their own, such as second fields: then the frame before is on display.
            if latest[0] >= index - 1 and latest[1] is not None:
                yield index, *latest
        if not pending:
            return
        latest = number, frame


def _image_converter(
    stream: av.VideoStream, transform: Callable[[torch.Tensor], torch.Tensor] | None
) -> Callable[[int, int, av.VideoFrame], _Image]:
    "Gives a function that makes an image of what `_pick` picks; before `transform` all have the same size."
    width, height = stream.codec_context.width or None, stream.codec_context.height or None
    reformatter = VideoReformatter()  # one for all frames: setting one up takes far longer than a conversion

    def to_image(index: int, number: int, frame: av.VideoFrame) -> _Image:
        upright = reformatter.reformat(frame, width=width, height=height, format="rgb24").to_ndarray()
        upright = np.ascontiguousarray(np.rot90(upright, round(frame.rotation / 90)))
        pixels = torch.from_numpy(upright).permute(2, 0, 1)
        return _Image(index, number, upright.shape[:2], (pixels if transform is None else transform(pixels)).numpy())

    return to_image


def _decode_from(
    container: av.container.InputContainer, stream: av.VideoStream, packets: _Packets, key: int, indices: list[int]
) -> Iterator[tuple[int, av.VideoFrame]]:
    "Decodes from the packet `key` to the last of the frames numbered `indices`; yields frames with their numbers."
    num_packets = int(packets.shown[indices].max()) - key + 1
    # The frame before a wanted one stands in for it where its packet shows nothing.
    needed_pts = set(packets.shown_pts[indices]) | set(packets.shown_pts[np.maximum(np.array(indices) - 1, 0)])
    previous = -1
    # What the decoder still holds at the end comes out with None.
    for packet in chain(islice(_seek(container, stream, packets, key), num_packets), [None]):
        if packets.marked and packet is not None:
            stream.codec_context.skip_frame = "DEFAULT" if packet.pts in needed_pts else "NONREF"
        for frame in _decode_packet(stream, packet):
            if frame.pts is None:
                continue
            number = int(np.searchsorted(packets.shown_pts, frame.pts, side="right")) - 1
            if number < previous:
                raise _SeekError  # the times in the file are not those of showing
            previous = number
            yield number, frame


def _seek(
    container: av.container.InputContainer, stream: av.VideoStream, packets: _Packets, start: int
) -> Iterator[av.Packet]:
    "Moves to the packet `start`, a key frame, and gives the packets from there on."
    # Some containers land a little after the time asked for: then asking for an earlier one helps.
    times = packets.pts[packets.starts(start)[:-4:-1]]
    for time in (*times, packets.pts[0] - round(1 / stream.time_base)):
        try:
            container.seek(int(time), stream=stream)
        except av.FFmpegError:
            break
        incoming = container.demux(stream)
        for packet in incoming:
            if packet.is_keyframe and packet.pts == packets.pts[start]:
                return chain([packet], incoming)
            if packet.is_keyframe and packet.pts is not None and packet.pts > packets.pts[start]:
                break
    raise _SeekError


def _decode_packet(stream: av.VideoStream, packet: av.Packet | None) -> list[av.VideoFrame]:
    if packet is not None and packet.size == 0 and packet.pts is not None:
        return []  # stands for a repeated frame; the decoder would take it for the end of the stream
    try:
        return stream.codec_context.decode(packet)
    except av.FFmpegError:
        return []  # a damaged packet: the frames that depend on it are missed and reported by the caller
