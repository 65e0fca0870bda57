"""Video processor of MambaMia: samples, resizes and normalises videos from files, URLs, arrays or lists of images."""

import math
import os
import reprlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from functools import partial
from numbers import Real
from typing import Any, cast

import numpy as np
import torch
from huggingface_hub.dataclasses import validate_typed_dict
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_utils import (
    IMAGENET_STANDARD_MEAN,
    IMAGENET_STANDARD_STD,
    ChannelDimension,
    PILImageResampling,
    SizeDict,
    infer_channel_dimension_format,
    load_image,
)
from transformers.processing_utils import Unpack, VideosKwargs
from transformers.utils import TensorType
from transformers.video_processing_utils import BaseVideoProcessor
from transformers.video_utils import VideoInput, VideoMetadata, is_valid_video_frame, make_batched_metadata

from .configuration_mambamia import config_beside
from .frame_times import check_times
from .video_decoding import decode_video, frames_of_decoder, is_decoder
from .video_index import TimedVideoMetadata
from .video_memory import is_video_memory
from .video_sources import VideoPart, content_of, part_of
from .video_times import typical_step


_READING_OPTIONS = (
    "do_sample_frames",
    "do_resize",
    "size",
    "resample",
    "default_to_square",
    "do_pad",
    "image_mean",
    "progress",
    "seek_mode",
)

# Frames normalised at a time: bounds the memory beside the result.
_CHUNK_FRAMES = 32


class MambaMiaVideoProcessorKwargs(VideosKwargs, total=False):
    """
    max_frames (`int`, *optional*):
        The largest number of frames sampled from each video: all of them where there are fewer, or with `fps` as many
        per second.
    video_start, video_end (`float`, *optional*):
        The seconds between which frames are sampled, by default those of the whole video.
    progress (`bool`, *optional*, defaults to `False`):
        Whether to show a progress bar while a video file is decoded.
    seek_mode (`str`, *optional*, defaults to `"exact"`):
        Whether frames of a video file are taken at the sampled times (`"exact"`), or the key frames nearest to these
        (`"keyframe"`), which is many times faster. See [`VideoReader`].
    sample_at (`str`, *optional*, defaults to `"middle"`):
        Whether the frames in the `"middle"` of equal parts of a video are taken, or those at the `"start"` of each.
    load_audio_from_video (`bool`, *optional*):
        Ignored: sound is not used. Servers pass it with every video.
    """

    max_frames: int | None
    video_start: float | int | None
    video_end: float | int | None
    progress: bool | None
    seek_mode: str | None
    sample_at: str | None
    load_audio_from_video: bool | None


def _stack_frames(frames: Sequence[Any]) -> np.ndarray:
    """One array of shape `(num_frames, ...)` from images of one shape."""
    # Palettes and grey levels have no colour channels of their own; transparency is blended later, as for arrays.
    frames = [
        frame.convert("RGB") if isinstance(frame, Image.Image) and frame.mode not in ("RGB", "RGBA") else frame
        for frame in frames
    ]
    arrays = [np.asarray(frame) for frame in frames]
    shapes = sorted({array.shape for array in arrays})
    if len(shapes) > 1:
        raise ValueError(f"The frames of a video have different shapes, {shapes}: resize them to one shape.")
    return np.stack(arrays)


def _sample_array(
    video: np.ndarray | torch.Tensor,
    metadata: VideoMetadata,
    sample_indices_fn: Callable[..., np.ndarray] | None,
    data_format: ChannelDimension | str | None,
) -> tuple[torch.Tensor, VideoMetadata]:
    """Samples from frames that are at hand and brings them into the shape `(num_frames, channels, height, width)`."""
    if len(video) == 0:
        raise ValueError(f"A video of shape {tuple(video.shape)} has no frames: pass at least one frame.")
    if sample_indices_fn is not None:
        if metadata.total_num_frames != len(video):
            raise ValueError(
                f"`video_metadata` speaks of {metadata.total_num_frames} frames but the video has {len(video)}: "
                "correct it, or pass `do_sample_frames=False` for frames that are sampled already."
            )
        indices = sample_indices_fn(metadata=metadata)
        metadata = copy(metadata)
        metadata.frames_indices = indices.tolist()
        video = video[indices]
    if data_format is None:
        data_format = infer_channel_dimension_format(cast(np.ndarray, video), num_channels=(1, 3, 4))
    frames = torch.as_tensor(video)
    return (frames.permute(0, 3, 1, 2) if data_format == ChannelDimension.LAST else frames), metadata


class TimedBatch(BatchFeature):
    """What the processors return: a `BatchFeature` whose `video_timestamps` stay as they are.

    Cast to the model's type, they would be wrong by seconds, and some accelerators have no float64.
    """

    def to(self, *args: Any, **kwargs: Any) -> "TimedBatch":
        """As that of `BatchFeature`, without the times."""
        times = self.data.pop("video_timestamps", None)
        super().to(*args, **kwargs)
        if times is not None:
            self.data["video_timestamps"] = times
        return self


def _flat_metadata(given: Any) -> list[Any]:
    """The metadata of each video, from those of one or a (nested) list."""
    if isinstance(given, Mapping):
        return [given]
    return [known for item in given for known in _flat_metadata(item)]


def _as_metadata(known: Any, video: Any) -> VideoMetadata:
    """What a user tells of a video of frames, and what the frames tell."""
    num_frames = len(video)
    if known is None:
        return make_batched_metadata(cast(Any, [video]), video_metadata=cast(Any, None))[0]
    if isinstance(known, VideoMetadata):
        return known
    told = {"total_num_frames": num_frames, **known}
    times = told.pop("timestamps", None)
    if times is None:
        return VideoMetadata(**told)
    times = [float(seconds) for seconds in times]
    check_times(times, num_frames)
    duration = told.get("duration") or times[-1] + typical_step(np.array(times), 1.0)
    if duration < times[-1]:
        raise ValueError(
            f"The last frame of a video has the time {times[-1]} s and its `duration` is {duration} s: correct one."
        )
    told.update(
        total_num_frames=num_frames,
        frames_indices=list(range(num_frames)),
        duration=duration,
        fps=num_frames / (duration - times[0]) if duration > times[0] else None,
    )
    return TimedVideoMetadata(frame_timestamps=np.array(times), **told)


def duration_of(metadata: VideoMetadata) -> float | None:
    """How long a video lasts, in seconds; None where it is not known."""
    return metadata.duration or (metadata.total_num_frames / metadata.fps if metadata.fps else None)


def _is_positive(setting: Any) -> bool:
    """Whether a setting is a number above 0, or is not set."""
    return setting is None or (isinstance(setting, Real) and 0 < float(setting) < math.inf)


def _timestamps(metadata: VideoMetadata, num_frames: int) -> list[float] | None:
    """The time in seconds of each sampled frame; None where nothing is known of it."""
    if not metadata.fps and not isinstance(metadata, TimedVideoMetadata):
        return None
    if metadata.frames_indices is None:
        metadata = copy(metadata)
        metadata.frames_indices = list(range(num_frames))
    times = [float(seconds) for seconds in metadata.timestamps]
    check_times(times, num_frames)
    return times


def _cut(metadata: VideoMetadata, start: float, end: float | None) -> tuple[int, VideoMetadata]:
    """The number of the first frame between two times, that on display at the start, and metadata of these frames."""
    if isinstance(metadata, TimedVideoMetadata):
        times, duration = metadata.frame_timestamps, float(metadata.duration or 0)
    elif metadata.fps:
        times, duration = np.arange(metadata.total_num_frames) / metadata.fps, metadata.total_num_frames / metadata.fps
    else:
        raise ValueError(
            f"`video_start={start:g}` is a time, and the frame rate of this video is unknown: pass `video_metadata` "
            "with its `fps`."
        )
    stop = duration if end is None else min(end, duration)
    if start >= stop:
        raise ValueError(f"The video ends after {duration:g} seconds: let it start before that, not at {start:g}.")
    first = max(int(np.searchsorted(times, start + 1e-3, side="right")) - 1, 0)
    times = times[first : np.searchsorted(times, stop, side="left")]
    part = TimedVideoMetadata(
        total_num_frames=len(times),
        fps=len(times) / (stop - start),
        duration=stop - start,
        frame_timestamps=np.maximum(times - start, 0.0),
    )
    return first, part


def _all_frames(metadata: VideoMetadata, video_start: float, video_end: float | None) -> np.ndarray:
    """The numbers of all frames between two times."""
    first, part = _cut(metadata, video_start, video_end)
    return first + np.arange(part.total_num_frames)


def pad_to_square(frames: torch.Tensor, image_mean: float | Sequence[float]) -> torch.Tensor:
    """Frames `(..., channels, height, width)` between two stripes of the mean colour, where they are not square."""
    height, width = frames.shape[-2:]
    size = max(height, width)
    if height == width:
        return frames
    colour = torch.tensor([int(255 * mean) for mean in np.broadcast_to(image_mean, frames.shape[-3])])
    padded = colour.to(frames)[:, None, None].expand(*frames.shape[:-2], size, size).clone()
    top, left = (size - height) // 2, (size - width) // 2
    padded[..., top : top + height, left : left + width] = frames
    return padded


def warn_of_rescaled(pictures: Sequence[Any]) -> None:
    """Warns of pictures that seem to be divided by 255 already: floating-point numbers from 0 to 1, not all 0."""
    for picture in pictures:
        if isinstance(picture, np.ndarray | torch.Tensor) and torch.as_tensor(picture).is_floating_point():
            low, high = torch.as_tensor(picture).aminmax()
            if 0 <= low and 0 < high <= 1:
                warnings.warn(
                    f"The pixels are floating-point numbers from {low:.3g} to {high:.3g}, and are divided by 255 once "
                    "more: pass `do_rescale=False` if they are divided already.",
                    stacklevel=3,
                )
                return


class MambaMiaVideoProcessor(BaseVideoProcessor):
    """
    Turns videos into the `pixel_values_videos` that the vision tower takes.

    Frames are sampled uniformly over the whole duration of a video: the duration is divided into equal parts, and the
    frame on display in the middle of each part is taken. By default there are up to `fps` frames per second and at
    most `num_frames`. In a call, `num_frames=N` asks for exactly N frames, `max_frames=N` for N or, of a shorter
    video, all of them, and `fps=r` for r frames per second, still at most `max_frames` or the `num_frames` of this
    processor.

    Args:
        num_frames (`int`, *optional*, defaults to 384):
            The largest number of frames sampled from a video; `None` for no limit.
        fps (`float`, *optional*, defaults to 2.0):
            The largest number of frames sampled per second; `None` for no limit.
        do_sample_frames (`bool`, *optional*, defaults to `True`):
            Whether to sample; all frames are used otherwise.
        progress (`bool`, *optional*, defaults to `False`):
            Whether to show a progress bar while a video file is decoded.
        seek_mode (`str`, *optional*, defaults to `"exact"`):
            Whether frames of a video file are taken at the sampled times (`"exact"`), or the key frames nearest to
            these (`"keyframe"`), which is many times faster. Where key frames are rarer than samples they are
            repeated, with a warning. The metadata tells the true times of the frames in any case.
        sample_at (`str`, *optional*, defaults to `"middle"`):
            `"start"` takes the frames at the start of the equal parts, as the released code does: of `fps` and the
            duration follow the number of frames, rounded up, and of their times the nearest frames by number.
        do_pad (`bool`, *optional*, defaults to `False`):
            Whether frames are made square first, by stripes of the mean colour, as LLaVA does with
            `image_aspect_ratio="pad"`.
        kwargs:
            The sizes, means and switches of every video processor of Transformers.
    """

    resample = PILImageResampling.BICUBIC
    size = {"height": 384, "width": 384}
    image_mean = IMAGENET_STANDARD_MEAN
    image_std = IMAGENET_STANDARD_STD
    do_resize = True
    do_rescale = True
    rescale_factor = 1 / 255
    do_normalize = True
    do_convert_rgb = True
    do_sample_frames = True
    num_frames = 384
    fps = 2.0
    progress = False
    seek_mode = "exact"
    sample_at = "middle"
    do_pad = False
    valid_kwargs = MambaMiaVideoProcessorKwargs  # type: ignore[assignment]  # declared for images
    model_input_names = ["pixel_values_videos", "frame_mask", "video_timestamps"]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        """As any video processor's; refuses a checkpoint in the layout of the authors' code, whose settings of images
        would be taken."""
        config_beside(pretrained_model_name_or_path, kwargs)
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    def preprocess(self, videos: VideoInput, **kwargs: Unpack[MambaMiaVideoProcessorKwargs]) -> BatchFeature:
        """Samples, resizes and normalises videos.

        Args:
            videos:
                Videos as paths, addresses (`https://`, `file://`, `data:`), the bytes of files, open files,
                dictionaries with `path` or `bytes` as of `datasets`, decoders of torchcodec, lists of frames, arrays
                or tensors, one or a (nested) list of them. [`VideoPart`] stands for a part of one.
            kwargs: Settings that differ from those of this processor for this call.

        Returns:
            [`BatchFeature`] with

            - **pixel_values_videos** of shape `(num_videos, num_frames, 3, height, width)`, padded with zeros at the
              end of shorter videos;
            - **frame_mask** of shape `(num_videos, num_frames)`, bool, `True` for the frames of a video;
            - **video_timestamps** of shape `(num_videos, num_frames)`, float64, the time of each frame in seconds from
              the start of its video, 0 for padding; if the times of all videos are known. Those of files are, and
              those of frames where `video_metadata` has `timestamps`, a time per frame, or `fps`;
            - **video_metadata**, a list of [`VideoMetadata`], if `return_metadata=True`. Those of video files tell the
              true times of the frames as `timestamps`.

        Raises:
            FileNotFoundError: if there is no file at a path.
            ValueError: if `videos` is empty or holds something else, if a file cannot be read, if the frames cannot be
                sampled as asked, or if videos of different sizes are not resized to one.
        """
        options: dict[str, Any] = {**kwargs}
        options.pop("load_audio_from_video", None)
        validate_typed_dict(cast(Any, self.valid_kwargs), options)
        frames, metadata = self._load_videos(videos, **options)
        options.update(video_metadata=metadata, do_sample_frames=False, input_data_format=ChannelDimension.FIRST)
        batch = TimedBatch(super().preprocess(frames, **options))
        times = [_timestamps(known, len(video)) for known, video in zip(metadata, frames, strict=True)]
        known_times = [seconds for seconds in times if seconds is not None]
        if len(known_times) == len(times):
            rows = [torch.tensor(seconds, dtype=torch.float64) for seconds in known_times]
            padded = pad_sequence(rows, batch_first=True)
            batch.update(BatchFeature({"video_timestamps": padded}, tensor_type=options.get("return_tensors")))
        return batch

    def make_video_list(self, videos: VideoInput) -> list[Any]:
        """
        Flattens the ways of passing videos into one list with one entry per video: a path, address, bytes, open file,
        decoder, array or tensor of 4 dimensions, or memory, or a [`VideoPart`] of one of these.

        A list of paths or URLs is a list of videos. Where they are nested as deeply as a chat nests them, conversation
        by conversation and video by video, they are the images that are the frames of one video.

        Raises:
            ValueError: if an image is passed, or the type is none of the above.
        """
        return self._flatten_videos(videos, depth=0)

    def _flatten_videos(self, item: Any, depth: int) -> list[Any]:
        item = content_of(item)
        if isinstance(item, VideoPart):
            return [self._flat_part(item, depth)]
        if isinstance(item, str | os.PathLike):
            return [os.fspath(item)]
        if isinstance(item, bytes | bytearray | memoryview) or hasattr(item, "read"):
            return [item]
        if is_video_memory(item) or is_decoder(item):
            return [item]
        if isinstance(item, np.ndarray | torch.Tensor) and item.ndim == 5:
            return list(item)
        if isinstance(item, np.ndarray | torch.Tensor) and item.ndim == 4:
            return [item]
        if is_valid_video_frame(item):
            raise ValueError(
                f"`videos` holds an image ({type(item).__name__}): pass images with `images=`, and a video as a path, "
                "a list of frames or an array of 4 dimensions."
            )
        if not isinstance(item, list | tuple):
            raise ValueError(
                f"`videos` holds {reprlib.repr(item)} ({type(item).__name__}): pass a video as a path, an "
                "address, the bytes of a file, an open file, a list of frames or an array of 4 dimensions."
            )
        if item and all(is_valid_video_frame(frame) for frame in item):
            return [_stack_frames(item)]
        if depth >= 2 and item and all(isinstance(frame, str) for frame in item):
            return [_stack_frames([load_image(frame) for frame in item])]
        return [video for child in item for video in self._flatten_videos(child, depth + 1)]

    def _flat_part(self, part: VideoPart, depth: int) -> VideoPart:
        whole = self._flatten_videos(part.source, depth)
        if len(whole) != 1:
            raise ValueError(f"A `VideoPart` holds {len(whole)} videos: make one of each.")
        if is_video_memory(whole[0]):
            raise ValueError(
                "`video_start` and `video_end` cut videos, not memories of them: pass `memory.select(start=..., "
                "end=...)`."
            )
        return VideoPart(whole[0], part.start, part.end)

    def sample_frames(
        self,
        metadata: VideoMetadata,
        num_frames: int | None = None,
        fps: float | None = None,
        max_frames: int | None = None,
        video_start: float | None = None,
        video_end: float | None = None,
        sample_at: str | None = None,
        **kwargs: Any,
    ) -> np.ndarray:
        """
        Chooses the frames to use.

        Args:
            metadata ([`VideoMetadata`]):
                What is known about the video. Where it tells the times of all frames ([`TimedVideoMetadata`]), these
                decide; otherwise the frames are taken to be equally far apart.
            num_frames (`int`, *optional*):
                The exact number of frames to sample.
            fps (`float`, *optional*):
                The number of frames to sample from each second, instead of the `fps` of this processor.
            max_frames (`int`, *optional*):
                The largest number of frames to sample, instead of the `num_frames` of this processor. Without `fps`,
                so many are sampled, or all where there are fewer.
            video_start, video_end (`float`, *optional*):
                The seconds between which to sample, by default the whole video. The frame on display at the start is
                the first of this part.
            sample_at (`str`, *optional*):
                `"middle"` or `"start"` of equal parts, instead of that of this processor.

        Returns:
            `np.ndarray`: The numbers of the frames, ascending.

        Raises:
            ValueError: if `num_frames` and another number are given, if the video has fewer than `num_frames` frames,
                if `fps` or a part is asked of a video of unknown frame rate, or if there is no such part.
        """
        if num_frames is not None and (fps is not None or max_frames is not None):
            name, value = ("fps", fps) if fps is not None else ("max_frames", max_frames)
            raise ValueError(
                f"`num_frames={num_frames}` and `{name}={value}` are mutually exclusive arguments: pass only one of "
                "them."
            )
        sample_at = self.sample_at if sample_at is None else sample_at
        if sample_at not in ("middle", "start"):
            raise ValueError(f"`sample_at={sample_at!r}` is no place to sample at: use 'middle' or 'start'.")
        first = 0
        if video_start is not None or video_end is not None:
            first, metadata = _cut(metadata, video_start or 0.0, video_end)
        total = metadata.total_num_frames
        if num_frames is None:
            num_frames = self._default_num_frames(metadata, fps, max_frames, sample_at == "start")
        elif not 1 <= num_frames <= total:
            raise ValueError(
                f"`num_frames={num_frames}` cannot be sampled from a video of {total} frames: ask for 1 to {total}."
            )
        if sample_at == "start":
            return first + np.minimum(np.round(np.arange(num_frames) / num_frames * total), total - 1).astype(int)
        middles = (np.arange(num_frames) + 0.5) / num_frames
        if isinstance(metadata, TimedVideoMetadata):
            # Later than 0 where a user's frames are, earlier where a part begins while a frame is on display.
            start = max(float(metadata.frame_timestamps[0]), 0.0)
            return first + metadata.frames_shown_at(start + middles * (metadata.duration - start))
        return first + (middles * total + 1e-6).astype(int)

    def _default_num_frames(
        self, metadata: VideoMetadata, fps: float | None, max_frames: int | None, round_up: bool
    ) -> int:
        """How many frames to sample where no exact number is asked for."""
        duration = metadata.total_num_frames / metadata.fps if metadata.fps else None
        if fps is not None and duration is None:
            raise ValueError(
                f"`fps={fps}` cannot be sampled from a video of unknown frame rate: pass `video_metadata` with its "
                "`fps`, or use `num_frames`."
            )
        rate = fps if fps is not None or max_frames is not None else self.fps
        most = max_frames if max_frames is not None else self.num_frames
        if not _is_positive(rate):
            raise ValueError(f"`fps={rate}` frames per second cannot be sampled: ask for more than 0.")
        if not _is_positive(most):
            name = "num_frames" if max_frames is None else "max_frames"
            raise ValueError(f"`{name}={most}` leaves no frame: allow at least 1.")
        count = metadata.total_num_frames if most is None else min(metadata.total_num_frames, most)
        if rate and duration:
            # Containers may round times to milliseconds, which must not cost a frame.
            in_all = math.ceil((duration - 1e-3) * rate) if round_up else (duration + 1e-3) * rate
            count = min(count, max(1, int(in_all)))
        return count

    def fetch_videos(
        self,
        video_url_or_urls: str | list[str] | list[list[str]],
        sample_indices_fn: Callable[..., np.ndarray] | None = None,
        **kwargs: Any,
    ) -> tuple[Any, Any]:
        """
        Decodes video files with [`decode_video`], whose other arguments are `kwargs`: one gives `(frames, metadata)`,
        a list gives a list of frames and a list of metadata.
        """
        if isinstance(video_url_or_urls, list):
            fetched = [self.fetch_videos(url, sample_indices_fn, **kwargs) for url in video_url_or_urls]
            return [frames for frames, _ in fetched], [metadata for _, metadata in fetched]
        return decode_video(video_url_or_urls, sample_indices_fn, **kwargs)

    def frame_transform(self, **options: Any) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """What is done with each frame of a file as it is decoded: it becomes square, where asked for, and is resized.

        Args:
            options: settings that differ from those of this processor.

        Returns:
            A function of a frame `(channels, height, width)`; None where frames stay as they are.
        """
        settings = {
            name: getattr(self, name) if options.get(name) is None else options[name] for name in _READING_OPTIONS
        }
        if not settings["do_resize"]:
            return None
        size = self._standardize_kwargs(size=settings["size"], default_to_square=settings["default_to_square"])
        resize = partial(self.resize, size=size["size"], resample=settings["resample"])
        if not settings["do_pad"]:
            return resize
        return lambda frame: resize(pad_to_square(frame, settings["image_mean"]))

    def _load_videos(
        self,
        videos: VideoInput,
        video_metadata: Any = None,
        **kwargs: Any,
    ) -> tuple[list[torch.Tensor], list[VideoMetadata]]:
        """The sampled frames, of shape `(num_frames, channels, height, width)`, and the metadata of every video."""
        options = {
            name: getattr(self, name) if kwargs.get(name) is None else kwargs[name] for name in _READING_OPTIONS
        }
        start_and_end = kwargs.get("video_start"), kwargs.get("video_end")
        parts = [
            video if isinstance(video, VideoPart) else part_of(video, *start_and_end)
            for video in self.make_video_list(videos)
        ]
        flat_videos = [part.source if isinstance(part, VideoPart) else part for part in parts]
        if not flat_videos:
            raise ValueError("`videos` is an empty list: pass at least one video.")
        given_metadata = [None] * len(flat_videos) if video_metadata is None else _flat_metadata(video_metadata)
        if len(given_metadata) != len(flat_videos):
            raise ValueError(
                f"There are {len(flat_videos)} videos but {len(given_metadata)} entries in `video_metadata`: pass one "
                "for each video."
            )

        numbers = {name: kwargs.get(name) for name in ("num_frames", "fps", "max_frames", "sample_at")}
        resize = self.frame_transform(**options)

        loaded = []
        for part, video, known in zip(parts, flat_videos, given_metadata, strict=True):
            sample = self._sampling(part, numbers if options["do_sample_frames"] else None)
            if isinstance(video, np.ndarray | torch.Tensor):
                metadata = _as_metadata(known, video)
                loaded.append(_sample_array(video, metadata, sample, kwargs.get("input_data_format")))
            elif is_decoder(video):
                loaded.append(frames_of_decoder(video, sample, resize))
            else:
                reading: Any = {"progress": options["progress"], "seek_mode": options["seek_mode"]}
                loaded.append(self.fetch_videos(cast(Any, video), sample, transform=resize, **reading))
        return [frames for frames, _ in loaded], [metadata for _, metadata in loaded]

    def _sampling(self, video: Any, numbers: dict[str, Any] | None) -> Callable[..., np.ndarray] | None:
        """Which frames of a video to take, given its metadata; None for all of them.

        Args:
            video: a source or a part of one.
            numbers: how many frames to sample, and where, arguments of `sample_frames`; None to take them all.
        """
        part: dict[str, Any] = {}
        if isinstance(video, VideoPart):
            part = {"video_start": video.start, "video_end": video.end}
        if numbers is not None:
            return partial(self.sample_frames, **numbers, **part)
        return partial(_all_frames, **part) if part else None

    def _preprocess(  # type: ignore[override]  # that of images is meant
        self,
        videos: list[torch.Tensor],
        do_resize: bool,
        size: SizeDict,
        resample: PILImageResampling | int | None,
        do_center_crop: bool,
        crop_size: SizeDict,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: float | list[float],
        image_std: float | list[float],
        do_pad: bool | None = None,
        return_tensors: str | TensorType | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        if do_normalize and 0 in np.atleast_1d(image_std):
            raise ValueError(f"image_std={image_std} holds a 0, and pixels are divided by it: give numbers above 0.")
        if do_rescale:
            warn_of_rescaled(videos)
        longest = max(len(video) for video in videos)
        frame_mask = torch.stack([torch.arange(longest, device=video.device) < len(video) for video in videos])
        pixel_values: torch.Tensor | None = None
        for i, video in enumerate(videos):
            for start in range(0, len(video), _CHUNK_FRAMES):
                frames = video[start : start + _CHUNK_FRAMES]
                if do_pad:
                    frames = pad_to_square(frames, image_mean)
                if do_resize:
                    frames = self.resize(frames, size=size, resample=resample)
                if do_center_crop:
                    frames = self.center_crop(frames, crop_size)
                frames = self.rescale_and_normalize(
                    frames, do_rescale, rescale_factor, do_normalize, image_mean, image_std
                )
                if pixel_values is None:
                    pixel_values = frames.new_zeros((len(videos), longest, *frames.shape[1:]))
                if frames.shape[1:] != pixel_values.shape[2:]:
                    raise ValueError(
                        f"The videos have frames of different shapes, {tuple(pixel_values.shape[2:])} and "
                        f"{tuple(frames.shape[1:])}, and cannot form one batch: pass a `size` with height and width, "
                        "or one video at a time."
                    )
                pixel_values[i, start : start + len(frames)] = frames
        data = {"pixel_values_videos": pixel_values, "frame_mask": frame_mask}
        return BatchFeature(data=data, tensor_type=return_tensors)


__all__ = ["MambaMiaVideoProcessor", "TimedBatch", "duration_of", "pad_to_square", "warn_of_rescaled"]
