"""From a video file to the sampled frames, in bounded memory.

A file is read in two passes. The first indexes it, in general without decoding ([`video_index`]). The second decodes
the wanted frames only: it seeks to the key frame before a wanted frame, goes on from there to the last frame that is
wanted before the next key frame, and so on. Several threads, each with a decoder of its own, share these parts of the
file. Each converts and resizes a wanted frame as soon as it is decoded, so that only resized frames are ever held.
"""

import threading
import warnings
from collections import defaultdict, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from copy import copy
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from typing import Any

import av
import numpy as np
import torch
from tqdm.auto import tqdm

from .video_decoder import NOT_UPRIGHT, Decoder, is_b_frame, run_in_threads
from .video_index import PacketIndex, TimedVideoMetadata, index_by_decoding, read_index
from .video_sources import VideoLimits, VideoSource, as_local_file
from .video_times import MAX_REORDERED


Transform = Callable[[torch.Tensor], torch.Tensor]

# So many damaged frames are named in a warning.
_MAX_NAMED = 8

_DEFAULT_LIMITS = VideoLimits()

# So many frames of another decoder are held at full size.
_DECODED_AT_ONCE = 16

# So many frames, and two batches, are decoded before the one that is waited for.
_FRAMES_AHEAD = 64

# More decoders would hold more pictures than is worth the time that they save.
_MAX_THREADS = 8


@dataclass
class FrameBatch:
    """Decoded frames in the order in which they were asked for.

    Args:
        data (`torch.Tensor` of shape `(num_frames, 3, height, width)`, uint8):
            The upright frames, or what `transform` made of them.
        indices (`list[int]`): The numbers of the frames.
        timestamps (`list[float]`): When the frames appear, in seconds from the start of the video.
    """

    data: torch.Tensor
    indices: list[int]
    timestamps: list[float]

    def __len__(self) -> int:
        return len(self.indices)


class VideoReader:
    """A video file that is indexed once and then asked for frames.

    Use it as a context manager, or call `close()`: the temporary file of a source that is no local path is gone then.
    Between two calls nothing is open and no thread runs.

    Args:
        source (`str`, `os.PathLike`, `bytes` or binary file object):
            Path, http(s) URL or content of a video file. What is not a local path is copied to a temporary file.
        seek_mode (`str`, *optional*, defaults to `"exact"`):
            `"exact"` decodes the frames that are asked for. `"keyframe"` takes the key frame nearest in time to each
            of them instead, which is many times faster, as nothing else is decoded. There are as many frames as asked
            for in any case: where key frames are rarer they are repeated, with a warning.
        limits ([`VideoLimits`], *optional*):
            What a video may cost before it is refused.

    Attributes:
        metadata ([`TimedVideoMetadata`]):
            Number, times and size of the frames. Height and width are those of the upright frames as soon as one was
            decoded, and those that the file states before.

    Raises:
        FileNotFoundError: if there is no file at the path.
        ValueError: if the file holds no readable video, or there is no such `seek_mode`.

    Warns:
        UserWarning: if the file is cut off, or its times cannot be trusted.
    """

    def __init__(self, source: VideoSource, seek_mode: str = "exact", limits: VideoLimits = _DEFAULT_LIMITS) -> None:
        if seek_mode not in ("exact", "keyframe"):
            raise ValueError(f"`seek_mode={seek_mode!r}` is no way to find frames: use 'exact' or 'keyframe'.")
        self.seek_mode = seek_mode
        with ExitStack() as resources:
            self._path, self._name = resources.enter_context(as_local_file(source, limits))
            self._limits = limits
            self._index = read_index(self._path, self._name, limits, _num_threads())
            self._resources = resources.pop_all()

    @property
    def metadata(self) -> TimedVideoMetadata:
        return self._index.metadata

    def __enter__(self) -> "VideoReader":
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()

    def __len__(self) -> int:
        return self.metadata.total_num_frames

    def close(self) -> None:
        """Removes the temporary file, if there is one."""
        self._resources.close()

    def frames_at(
        self, indices: Sequence[int] | np.ndarray, transform: Transform | None = None, progress: bool = False
    ) -> FrameBatch:
        """
        Decodes frames by number, in as many threads as PyTorch uses (`torch.get_num_threads()`), at most 8.

        Args:
            indices (`Sequence[int]`): The numbers of the wanted frames, in any order, repeated or not.
            transform (`Callable`, *optional*):
                Applied to each wanted frame, a uint8 tensor of shape `(3, height, width)`; not in order, and in
                several threads at once.
            progress (`bool`, *optional*, defaults to `False`):
                Whether to show a progress bar.

        Returns:
            [`FrameBatch`]: The frames, without those that the file is too damaged to give.

        Raises:
            ValueError: if no frame is asked for, or one that does not exist, or none can be decoded, or key frames are
                wanted of a video without any.

        Warns:
            UserWarning: if some of the frames cannot be decoded or are damaged, may not be upright, or key frames are
                repeated.
        """
        indices = self._wanted(indices)
        bar = tqdm(total=len(indices), desc=f"Decoding {self._name}", unit="frame") if progress else None
        with bar or nullcontext():
            images = self._decode(indices, partial(_Images, transform=transform, bar=bar))
        self._conclude(images)
        assert images.data is not None  # otherwise there is an error
        readable = images.found >= 0
        found = images.found[readable]
        data = images.data if readable.all() else images.data[readable]
        return FrameBatch(torch.from_numpy(data), found.tolist(), self.metadata.frame_timestamps[found].tolist())

    def batches_at(
        self, indices: Sequence[int] | np.ndarray, batch_size: int, transform: Transform | None = None
    ) -> Generator[tuple[np.ndarray, FrameBatch], None, None]:
        """
        Decodes frames by number, as `frames_at`, batch by batch: the next batches are decoded in threads while one is
        in use, at most a few ahead. Close the generator where it is not used up, and its threads end.

        Args:
            indices (`Sequence[int]`): The numbers of the wanted frames, ascending.
            batch_size (`int`): How many of them to give at a time.
            transform (`Callable`, *optional*): See `frames_at`.

        Yields:
            The places of frames among `indices`, and the frames. Places that come again replace what was given for
            them, as it was wrong; those that never come cannot be decoded.

        Raises:
            ValueError: where `frames_at` raises one.

        Warns:
            UserWarning: where `frames_at` warns.
        """
        indices = self._wanted(indices)
        handover = _Handover(batch_size)
        decode = partial(self._decode, indices, partial(_ImagesAhead, transform=transform, handover=handover))
        thread = threading.Thread(target=handover.run, args=(decode,), name="decoding ahead")
        try:
            thread.start()
            for places, data, found in handover.batches():
                timestamps = self.metadata.frame_timestamps[found].tolist()
                yield places, FrameBatch(torch.from_numpy(data), found.tolist(), timestamps)
            self._conclude(handover.result())
        finally:
            handover.close()
            if thread.is_alive():
                thread.join()

    def _wanted(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """The frames to decode for those that are asked for."""
        indices = self._checked(np.asarray(indices, dtype=int))
        return self._nearest_key_frames(indices) if self.seek_mode == "keyframe" else indices

    def _conclude(self, images: "_Images") -> None:
        """Takes note of the size of frames, and tells of those that are missing or wrong."""
        num_wanted, num_readable = len(images.found), int((images.found >= 0).sum())
        if not num_readable:
            raise ValueError(
                f"None of the {num_wanted} sampled frames of {self._name} can be decoded: the file is damaged."
            )
        self.metadata.height, self.metadata.width = images.size
        self._warn_of_damage(images.damaged)
        if images.is_turn_unknown:
            warnings.warn(f"The display matrix of {self._name} {NOT_UPRIGHT}", stacklevel=3)
        if num_readable < num_wanted:
            warnings.warn(
                f"{self._name} is damaged: only {num_readable} of the {num_wanted} sampled frames can be decoded and "
                "are used.",
                stacklevel=3,
            )

    def frames_shown_at(
        self, seconds: float | Sequence[float], transform: Transform | None = None, progress: bool = False
    ) -> FrameBatch:
        """
        Decodes the frames on display at these times, in seconds from the start of the video; see `frames_at`.

        Raises:
            ValueError: if a time is not within the video, and where `frames_at` raises one.
        """
        times = np.atleast_1d(np.asarray(seconds, dtype=float))
        outside = times[~((times >= 0) & (times < self.metadata.duration))]
        if len(outside):
            raise ValueError(
                f"{self._name} shows nothing at {outside[0]:g} seconds: ask for times from 0 to below "
                f"{self.metadata.duration:g}."
            )
        return self.frames_at(self.metadata.frames_shown_at(times), transform, progress)

    def _warn_of_damage(self, numbers: set[int]) -> None:
        if numbers:
            places = [f"{number} ({self.metadata.frame_timestamps[number]:.1f} s)" for number in sorted(numbers)]
            more = f" and {len(places) - _MAX_NAMED} more" if len(places) > _MAX_NAMED else ""
            warnings.warn(
                f"{self._name} is damaged: of the sampled frames, {', '.join(places[:_MAX_NAMED])}{more} may show "
                "wrong pictures.",
                stacklevel=4,
            )

    def _checked(self, indices: np.ndarray) -> np.ndarray:
        if len(indices) == 0:
            raise ValueError(f"No frame of {self._name} was asked for: ask for at least one.")
        if indices.min() < 0 or indices.max() >= len(self):
            raise ValueError(
                f"Frames {indices.min()} to {indices.max()} were asked of {self._name}: ask for frames from 0 to "
                f"{len(self) - 1}."
            )
        return indices

    def _nearest_key_frames(self, indices: np.ndarray) -> np.ndarray:
        """The numbers of the key frames nearest in time to the frames; warns where they have to repeat."""
        keys = self._index.keys
        if len(keys) == 0:
            raise ValueError(f"{self._name} marks none of its frames as a key frame: pass `seek_mode='exact'`.")
        times = self.metadata.frame_timestamps
        nearest = keys[np.searchsorted((times[keys][:-1] + times[keys][1:]) / 2, times[indices])]
        num_keys, num_wanted = len(np.unique(nearest)), len(np.unique(indices))
        if num_keys < num_wanted:
            warnings.warn(
                f"{self._name} has too few key frames: {num_keys} of them stand for the {num_wanted} sampled frames, "
                "some repeatedly; pass `seek_mode='exact'` for the frames themselves.",
                stacklevel=4,
            )
        return nearest

    def _decode(self, indices: np.ndarray, make_images: "Callable[[np.ndarray], _Images]") -> "_Images":
        if self._index.packets is not None:
            images = make_images(indices)
            try:
                self._decode_by_seeking(images, self._index.packets)
                return images
            except _SeekError:
                images.discard()
                indices = self._count_again(indices)
        images = make_images(indices)
        self._decode_in_order(images)
        return images

    def _count_again(self, indices: np.ndarray) -> np.ndarray:
        """Indexes the file by its frames, as its packets turned out not to tell them; the wanted ones that exist."""
        before = len(self)
        self._index = index_by_decoding(self._path, self._name, self._limits, _num_threads())
        if len(self) != before:
            warnings.warn(
                f"{self._name} has {len(self)} frames and not {before}, as its packets say: the nearest are used.",
                stacklevel=4,
            )
        return np.minimum(indices, len(self) - 1)

    def _decode_by_seeking(self, images: "_Images", packets: PacketIndex) -> None:
        groups = defaultdict(list)  # by the key frame from which to decode
        for index in images.wanted:
            groups[int(packets.starts(packets.shown[index])[-1])].append(index)
        num_decoders = min(_num_threads(), len(groups))
        todo = deque([*groups.items(), *[None] * num_decoders])

        def decode_groups(stop: threading.Event) -> None:
            with images.one_more_thread(), self._open(_num_threads() // num_decoders, stop) as decoder:
                for start, wanted in iter(todo.popleft, None):
                    if stop.is_set():
                        return
                    _decode_group(decoder, packets, start, wanted, images)
                images.note_damage(decoder.damaged)

        run_in_threads(decode_groups, num_decoders, images.stop)

    def _decode_in_order(self, images: "_Images") -> None:
        """Decodes the file from its start, which gives the frames of any container."""

        def decode_all(stop: threading.Event) -> None:
            with images.one_more_thread(), self._open(_num_threads(), stop) as decoder:
                frames = decoder.numbered(islice(decoder.all_frames(), self._index.num_skipped, None))
                for picked in _pick(frames, images.wanted):
                    images.put(*picked, decoder)
                _finish_run_of_b_frames(frames)
                images.note_damage(decoder.damaged)

        run_in_threads(decode_all, 1, images.stop)

    def _open(self, threads: int, stop: threading.Event) -> Decoder:
        return Decoder(self._path, self._name, self._limits, threads, stop)


def decode_video(
    source: VideoSource,
    sample_indices_fn: Callable[..., np.ndarray] | None = None,
    transform: Transform | None = None,
    progress: bool = False,
    seek_mode: str = "exact",
    limits: VideoLimits = _DEFAULT_LIMITS,
) -> tuple[torch.Tensor, TimedVideoMetadata]:
    """
    Decodes the sampled frames of a video: a [`VideoReader`] that is asked once.

    Frames are as a person would see them: turned and mirrored as the file says, with square pixels, and white where
    they are transparent (FFmpeg's decoders of VP8 and VP9 leave transparency out). Resizing belongs into `transform`:
    the result then equals that of decoding at full size and resizing afterwards, while only resized frames are held.

    Args:
        source (`str`, `os.PathLike`, `bytes` or binary file object):
            Path, http(s) URL or content of a video file; see [`VideoReader`].
        sample_indices_fn (`Callable`, *optional*):
            Called with `metadata=` ([`TimedVideoMetadata`]), returns the numbers of the wanted frames. All frames are
            decoded without it.
        transform (`Callable`, *optional*):
            Applied to each wanted frame; see [`VideoReader.frames_at`].
        progress (`bool`, *optional*, defaults to `False`):
            Whether to show a progress bar.
        seek_mode (`str`, *optional*, defaults to `"exact"`):
            `"exact"` or `"keyframe"`, see [`VideoReader`]. `frames_indices` and `timestamps` of the metadata are those
            of the frames that are returned.
        limits ([`VideoLimits`], *optional*):
            What a video may cost before it is refused.

    Returns:
        `tuple[torch.Tensor, TimedVideoMetadata]`: The frames, of shape `(num_frames, 3, height, width)` and uint8 (or
        what `transform` makes of them), and their metadata, `frames_indices` and `timestamps` included.

    Raises:
        FileNotFoundError: if there is no file at the path.
        ValueError: if the file holds no readable video, the wanted frames are not frames of the video, there is no
            such `seek_mode`, or key frames are wanted of a video without any.

    Warns:
        UserWarning: if the file is cut off or damaged and some of the frames are missing or wrong, if its times cannot
            be trusted, or if key frames are repeated.
    """
    with VideoReader(source, seek_mode, limits) as reader:
        if sample_indices_fn is None:
            indices = np.arange(len(reader))
        else:
            indices = sample_indices_fn(metadata=reader.metadata)
        batch = reader.frames_at(indices, transform, progress)
    metadata = copy(reader.metadata)
    metadata.frames_indices = batch.indices
    return batch.data, metadata


def is_decoder(source: Any) -> bool:
    """Whether this is a `VideoDecoder` of torchcodec, as `datasets` makes of a video, or one like it."""
    return hasattr(source, "get_frames_at") and hasattr(source, "metadata")


def frames_of_decoder(
    decoder: Any, sample_indices_fn: Callable[..., np.ndarray] | None = None, transform: Transform | None = None
) -> tuple[torch.Tensor, TimedVideoMetadata]:
    """As [`decode_video`], with a `VideoDecoder` of torchcodec.

    It tells the times of frames only as it decodes them, so frames are chosen as if they were equally far apart. The
    metadata have the true times of those that were decoded.

    Raises:
        ValueError: if the decoder does not know how many frames there are, or their rate.
    """
    known = decoder.metadata
    if not known.num_frames or not known.average_fps:
        raise ValueError(
            f"The decoder tells of {known.num_frames} frames at a rate of {known.average_fps}: pass the path of the "
            "file in its place."
        )
    metadata = TimedVideoMetadata(
        total_num_frames=known.num_frames,
        fps=known.average_fps,
        duration=known.num_frames / known.average_fps,
        width=known.width,
        height=known.height,
        frame_timestamps=np.arange(known.num_frames) / known.average_fps,
    )
    indices = np.arange(known.num_frames) if sample_indices_fn is None else sample_indices_fn(metadata=metadata)
    frames: list[torch.Tensor] = []
    for part in np.array_split(indices, max(len(indices) // _DECODED_AT_ONCE, 1)):
        batch = decoder.get_frames_at(indices=part.tolist())
        start = known.begin_stream_seconds or 0.0
        metadata.frame_timestamps[part] = batch.pts_seconds.numpy() - start
        pictures = batch.data if batch.data.shape[1] == 3 else batch.data.permute(0, 3, 1, 2)
        frames.extend(pictures.cpu() if transform is None else map(transform, pictures.cpu()))
    metadata.frames_indices = indices.tolist()
    return torch.stack(frames), metadata


class _SeekError(Exception):
    """The container cannot be entered at a given packet, or its timestamps are not those of showing."""


class _NoKeyFrameError(Exception):
    """The frame of a packet that is called a key frame is none."""


class _Images:
    """The decoded frames, which threads put where they are wanted.

    Attributes:
        wanted (`list[int]`): The numbers of the wanted frames, ascending.
        data (`np.ndarray` of shape `(num_frames, 3, height, width)`): The frames, `None` before the first.
        found (`np.ndarray` of shape `(num_frames,)`): The number of the frame that was found, -1 for none. It is the
            number before where a packet shows nothing of its own.
        damaged (`set[int]`): The numbers of frames that the decoder knows to be wrong.
        size (`tuple[int, int]`): Height and width of the upright frames in the file.
        is_turn_unknown (`bool`): Whether the file does not say which way up the frames are.
    """

    def __init__(self, indices: np.ndarray, transform: Transform | None = None, bar: tqdm | None = None) -> None:
        self.wanted: list[int] = np.unique(indices).tolist()
        self.data: np.ndarray | None = None
        self.found = np.full(len(indices), -1)
        self.damaged: set[int] = set()
        self.size = (0, 0)
        self.is_turn_unknown = False
        self.stop = threading.Event()
        self._indices, self._order = indices, np.argsort(indices)
        self._transform, self._bar = transform, bar
        self._lock: AbstractContextManager[Any] = threading.Lock()

    def put(self, index: int, number: int, frame: av.VideoFrame, decoder: Decoder) -> None:
        """Converts `frame`, which has this `number`, and puts it wherever the frame numbered `index` is wanted."""
        upright = decoder.convert(frame)
        picture = torch.from_numpy(upright).permute(2, 0, 1)
        pixels = (picture if self._transform is None else self._transform(picture)).numpy()
        places = self._order[slice(*np.searchsorted(self._indices, [index, index + 1], sorter=self._order))]
        with self._lock:
            self.size = self.size if any(self.size) else (picture.shape[1], picture.shape[2])
            self.is_turn_unknown |= decoder.is_turn_unknown
            self._store(places, pixels)
            self.found[places] = number
            if self._bar is not None:
                self._bar.update(len(places))

    def _store(self, places: np.ndarray, pixels: np.ndarray) -> None:
        if self.data is None:
            self.data = np.empty((len(self._indices), *pixels.shape), dtype=pixels.dtype)
        self.data[places] = pixels

    def note_damage(self, numbers: set[int]) -> None:
        """Takes note of those of the frames that are wrong."""
        with self._lock:
            self.damaged |= numbers.intersection(self.found.tolist())

    def discard(self) -> None:
        """The frames turned out to be wrong."""
        if self._bar is not None:
            self._bar.reset()

    def one_more_thread(self) -> AbstractContextManager[None]:
        """For as long as a thread may put frames here."""
        return nullcontext()


class _ClosedError(Exception):
    """Nobody takes the frames any more."""


class _ImagesAhead(_Images):
    """Frames that are handed over batch by batch, in the order in which they were asked for.

    A thread with a frame far ahead of what is taken waits, unless it is frames of waiting threads that are missing.
    """

    def __init__(self, indices: np.ndarray, transform: Transform | None, handover: "_Handover") -> None:
        super().__init__(indices, transform)
        self._handover, self._lock = handover, handover.changed
        self._frames: dict[int, np.ndarray] = {}
        self._num_taken = self._num_threads = self._num_waiting = 0
        handover.begin(self)

    def __len__(self) -> int:
        return len(self._indices)

    def _store(self, places: np.ndarray, pixels: np.ndarray) -> None:
        handover, first = self._handover, int(places.min())
        self._num_waiting += 1
        handover.changed.notify_all()
        handover.changed.wait_for(lambda: not self._is_far_ahead(first) or handover.is_closed)
        self._num_waiting -= 1
        if handover.is_closed:
            raise _ClosedError
        self._frames.update((int(place), pixels) for place in places)
        handover.changed.notify_all()

    def _is_far_ahead(self, place: int) -> bool:
        asked = self._handover.asked
        is_stuck = asked is not None and not self.has_batch(asked) and self._num_waiting == self._num_threads
        return place >= self._num_taken + self._handover.window and not is_stuck

    @contextmanager
    def one_more_thread(self) -> Iterator[None]:
        with self._lock:
            self._num_threads += 1
        try:
            yield
        finally:
            with self._lock:
                self._num_threads -= 1
                self._handover.changed.notify_all()

    def has_batch(self, start: int) -> bool:
        places = range(start, min(start + self._handover.batch_size, len(self)))
        return len(places) > 0 and all(place in self._frames for place in places)

    def take_batch(self, start: int) -> tuple[np.ndarray, list[np.ndarray]]:
        """Removes the frames of a batch, as far as they are there, and gives their places and pixels."""
        self._num_taken = start + self._handover.batch_size
        places = [place for place in range(start, self._num_taken) if place in self._frames]
        return np.array(places, dtype=int), [self._frames.pop(place) for place in places]


class _Handover:
    """Where threads that decode give frames to the one that uses them.

    Attributes:
        changed (`threading.Condition`): The lock of everything here and of the frames.
        asked (`int`, *optional*): The first place of the batch that is waited for.
        is_closed (`bool`): Whether nobody takes frames any more.
    """

    def __init__(self, batch_size: int) -> None:
        self.batch_size, self.window = batch_size, 2 * batch_size + _FRAMES_AHEAD
        self.changed = threading.Condition()
        self.asked: int | None = None
        self.is_closed = self._is_done = False
        self._images: _ImagesAhead | None = None
        self._error: BaseException | None = None

    def run(self, decode: Callable[[], _Images]) -> None:
        """Decodes until all frames are handed over, or nobody takes them; in a thread of its own."""
        try:
            decode()
        except _ClosedError:
            pass
        except BaseException as error:
            self._error = error
        finally:
            with self.changed:
                self._is_done = True
                self.changed.notify_all()

    def begin(self, images: _ImagesAhead) -> None:
        """These are the frames from now on."""
        with self.changed:
            if self.is_closed:
                raise _ClosedError
            self._images = images

    def batches(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """The places, pixels and numbers of frames."""
        images, start = None, 0
        while images is None or start < len(images) or not self._is_done:
            with self.changed:
                self.asked = start
                self.changed.notify_all()
                self.changed.wait_for(partial(self._is_ready, images, start))
                self.asked = None
                if self._error is not None or self._images is None:
                    return
                if images is not self._images:
                    images, start = self._images, 0
                    continue
                places, frames = images.take_batch(start)
                start += self.batch_size
                self.changed.notify_all()
            if frames:
                yield places, np.stack(frames), images.found[places]

    def _is_ready(self, images: _ImagesAhead | None, start: int) -> bool:
        return self._is_done or self._images is not images or (images is not None and images.has_batch(start))

    def result(self) -> _Images:
        """All frames, of which only the pixels are gone; or the error that ended them."""
        if self._error is not None:
            error, self._error = self._error, None
            try:
                raise error
            finally:
                del error  # whose traceback refers to this frame
        assert self._images is not None
        return self._images

    def close(self) -> None:
        """Nobody takes frames any more."""
        with self.changed:
            self.is_closed = True
            if self._images is not None:
                self._images.stop.set()
            self.changed.notify_all()


def _decode_group(decoder: Decoder, packets: PacketIndex, start: int, wanted: list[int], images: _Images) -> None:
    """Decodes the wanted frames from the key frame `start` on, or from one before it where that does not give them."""
    for key in _entries(packets.starts(start)):
        found = set()
        try:
            frames = _numbered_frames(decoder, packets, key, wanted)
            for index, number, frame in _pick(frames, wanted):
                if index == number or not decoder.num_errors:  # a frame that is lost has no substitute
                    images.put(index, number, frame, decoder)
                    found.add(index)
            _finish_run_of_b_frames(frames)
        except _NoKeyFrameError:
            continue
        wanted = [number for number in wanted if number not in found]
        if not wanted:
            return


def _entries(starts: np.ndarray) -> list[int]:
    """Packets from which to try to decode: the nearest key frame, then ever farther ones, in the end the first.

    A packet may be called a key frame and be none. In a stream that is refreshed bit by bit, pictures are whole only a
    key frame or two after the one at which decoding started.
    """
    places = [len(starts) - step for step in (2**power for power in range(32)) if step < len(starts)]
    return starts[list(dict.fromkeys([*places, 0]))].tolist()


def _numbered_frames(
    decoder: Decoder, packets: PacketIndex, start: int, wanted: list[int]
) -> Iterator[tuple[int, av.VideoFrame]]:
    """Decodes from the packet `start` to the last of the wanted frames; yields frames with their numbers.

    Where times are irregular the whole group is decoded: only the frames themselves tell which of the times strays.
    """
    is_doubtful = packets.is_irregular_from(start)
    num_packets = int(packets.end_of_group(start) if is_doubtful else packets.shown[wanted].max() + 1) - start
    # The frame before a wanted one stands in for it where its packet shows nothing.
    needed_pts = set(packets.shown_pts[wanted]) | set(packets.shown_pts[np.maximum(np.array(wanted) - 1, 0)])
    decoder.forget_damage()

    def needed_packets() -> Iterator[av.Packet | None]:
        for packet in islice(_packets_from(decoder, packets, start), num_packets):
            if packet is None:
                break
            if packets.marked and not is_doubtful:
                context = decoder.stream.codec_context
                context.skip_frame = "DEFAULT" if packet.pts in needed_pts else "NONREF"
            yield packet
        yield None

    previous = -1
    # Nothing is better than the start, and a hidden key frame does not come out.
    is_sure = start == packets.keys[0] or packets.pts[start] not in packets.shown_pts
    for frame in decoder.frames(needed_packets()):
        if previous < 0 and not frame.key_frame and not is_sure:
            raise _NoKeyFrameError
        if frame.pts is None or frame.pts < packets.pts[start]:
            continue  # shown before the key frame, of which it follows in the file
        number = int(np.searchsorted(packets.shown_pts, frame.pts))
        if number <= previous or packets.shown_pts[min(number, len(packets.shown_pts) - 1)] != frame.pts:
            raise _SeekError  # the times in the file are not those of showing
        previous = number
        decoder.note_damage(number, frame)
        yield number, frame


def _packets_from(decoder: Decoder, packets: PacketIndex, start: int) -> Iterator[av.Packet | None]:
    """Moves to the packet `start`, a key frame, and gives the packets from there on."""
    for time in _times_to_seek(packets, start):
        try:
            decoder.container.seek(time, stream=decoder.stream)
        except av.FFmpegError:
            break
        incoming = decoder.packets()
        for packet in incoming:
            if packet is None or not packet.is_keyframe or packet.pts is None:
                continue
            if packet.pts == packets.pts[start]:
                return chain([packet], incoming)
            if packet.pts > packets.pts[start]:
                break
    raise _SeekError


def _pick(
    decoded: Iterable[tuple[int, av.VideoFrame]], wanted: Sequence[int]
) -> Iterator[tuple[int, int, av.VideoFrame]]:
    """Picks the wanted frames (ascending) from the decoded ones, which come with their numbers.

    Yields the number that was wanted, the number of the frame that stands for it, and the frame.
    """
    pending = deque(wanted)
    latest: tuple[int, av.VideoFrame] | None = None
    for decoded_frame in chain(decoded, [None]):
        while pending and (decoded_frame is None or pending[0] < decoded_frame[0]):
            index = pending.popleft()
            if latest is not None and _stands_for(latest[0], index):
                yield index, *latest
        if not pending:
            return
        latest = decoded_frame


def _finish_run_of_b_frames(frames: Iterator[tuple[int, av.VideoFrame]]) -> None:
    """Goes on to the frame that B-frames refer to, which may turn out to be damaged."""
    for _, frame in islice(frames, MAX_REORDERED):
        if not is_b_frame(frame):
            return


def _stands_for(number: int, index: int) -> bool:
    """Whether a frame is the wanted one. Second-field packets yield no frame: repeat the frame before."""
    return number >= index - 1


def _times_to_seek(packets: PacketIndex, start: int) -> list[int]:
    """Some containers land a little after the time asked for: then an earlier one helps, in the end the start."""
    times = packets.pts[packets.starts(start)[:-4:-1]].tolist()
    return [*times, int(packets.pts[0]) - packets.ticks_per_second]


def _num_threads() -> int:
    return min(torch.get_num_threads(), _MAX_THREADS)
