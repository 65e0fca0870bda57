"""Frames of a video file or of a folder of images, sampled between two times as a video processor samples."""

import os
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import numpy as np
import torch
from transformers.image_utils import load_image

from .inputs import STANDARD_INPUT, check_part, check_video, frame_files
from .video_decoding import FrameBatch, VideoReader
from .video_index import TimedVideoMetadata
from .video_memory import describe_images, describe_sampling
from .video_processing_mambamia import MambaMiaVideoProcessor


class FrameFolder:
    """A folder of frames as images, asked for frames like a [`VideoReader`].

    Args:
        folder: with the images, in the order of the numbers in their names.
        fps: frames per second.

    Raises:
        ValueError: if there are no images in the folder.
    """

    def __init__(self, folder: str | os.PathLike[str], fps: float):
        self.folder, self.files = os.fspath(folder), frame_files(folder)
        self.metadata = TimedVideoMetadata(
            total_num_frames=len(self.files),
            fps=fps,
            duration=len(self.files) / fps,
            frame_timestamps=np.arange(len(self.files)) / fps,
        )
        self._first: tuple[str, int, int] | None = None

    def close(self) -> None:
        """Nothing is open between two calls."""

    def frames_at(
        self,
        indices: Sequence[int] | np.ndarray,
        transform: Callable[[torch.Tensor], torch.Tensor] | None = None,
        progress: bool = False,
    ) -> FrameBatch:
        """As [`VideoReader.frames_at`]; `progress` shows nothing, as images are read at once.

        Raises:
            ValueError: if an image cannot be read, or their sizes differ.
        """
        frames = []
        for index in indices:
            try:
                image = load_image(str(self.files[index]))
            except OSError as error:
                raise ValueError(f"the frame '{self.files[index]}' cannot be read as an image ({error}).") from error
            self._check_size(self.files[index].name, *image.size)
            frame = torch.from_numpy(np.array(image)).permute(2, 0, 1)
            frames.append(frame if transform is None else transform(frame))
        numbers = [int(index) for index in indices]
        return FrameBatch(torch.stack(frames), numbers, self.metadata.frame_timestamps[numbers].tolist())

    def batches_at(
        self,
        indices: Sequence[int] | np.ndarray,
        batch_size: int,
        transform: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> Generator[tuple[np.ndarray, FrameBatch], None, None]:
        """As [`VideoReader.batches_at`]; the next batch is read while one is in use."""
        places = np.split(np.arange(len(indices)), range(batch_size, len(indices), batch_size))
        batches = [np.asarray(indices)[part] for part in places]
        with ThreadPoolExecutor(1) as pool:
            coming = pool.submit(self.frames_at, batches[0], transform)
            for part, following in zip(places, [*batches[1:], None], strict=True):
                batch = coming.result()
                if following is not None:
                    coming = pool.submit(self.frames_at, following, transform)
                yield part, batch

    def _check_size(self, name: str, width: int, height: int) -> None:
        if self._first is None:
            self._first = name, width, height
            self.metadata.width, self.metadata.height = width, height
        first, *size = self._first
        if size != [width, height]:
            raise ValueError(
                f"the images in '{self.folder}' differ in size ({first} of {size[0]} x {size[1]}, {name} of {width} x "
                f"{height}) and so are no frames of one video."
            )


class SampledVideo:
    """The sampled frames of a video, as the vision tower takes them, batch by batch.

    Args:
        reader: of the video.
        video_processor: samples, resizes and normalises.
        num_frames: how many frames to sample, at most all; by default as the video processor samples.
        fps: how many frames to sample per second.
        start, end: sample between these seconds only.
        seek_mode: that the reader was opened with, as far as one was asked for.
        name: of the video.

    Attributes:
        numbers (`np.ndarray` of shape `(num_frames,)`): of the frames in the file, -1 for one that is not decoded.
        seconds_waited (`float`): how long whoever took the batches has waited for them.

    Raises:
        ValueError: if nothing is between the times, or for a number that cannot be sampled.
    """

    def __init__(
        self,
        reader: VideoReader | FrameFolder,
        video_processor: MambaMiaVideoProcessor,
        num_frames: int | None = None,
        fps: float | None = None,
        start: float = 0.0,
        end: float | None = None,
        seek_mode: str | None = None,
        name: str = "",
    ):
        self.reader, self.video_processor, self.name = reader, video_processor, name
        self._sampling = describe_sampling(num_frames, fps, start, end, seek_mode)
        self.indices = sample_part(video_processor, num_frames, fps, start, end, reader.metadata)
        self.numbers = np.full(len(self.indices), -1)
        self.seconds_waited = 0.0

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def timestamps(self) -> list[float]:
        """The times of the frames that were decoded, in seconds; no container knows them better than rounded here."""
        times = self.reader.metadata.frame_timestamps[self.numbers[self.numbers >= 0]]
        return [round(seconds, 6) for seconds in times.tolist()]

    @property
    def fingerprint(self) -> dict[str, str]:
        """Its parts of the fingerprint of a memory."""
        return {"images": describe_images(self.video_processor), "sampling": self._sampling}

    @property
    def about(self) -> dict[str, Any]:
        """What a memory tells of the video."""
        metadata = self.reader.metadata
        size = {"width": metadata.width, "height": metadata.height}
        return {"name": self.name, **size, "duration": float(metadata.duration)}

    def batches(self, batch_size: int) -> Generator[tuple[np.ndarray, torch.Tensor], None, None]:
        """Decodes the next batches while one is in use.

        Args:
            batch_size: of frames.

        Yields:
            The places of frames among the sampled ones, and their pixels `(batch_size, channels, height, width)`. A
            place that comes again replaces what came before.
        """
        processor: Any = self.video_processor
        start, num_places = time.perf_counter(), 0
        with closing(self.reader.batches_at(self.indices, batch_size, processor.frame_transform())) as read:
            for places, batch in read:
                if places[0] < num_places:  # once more from the start
                    self.numbers[:] = -1
                num_places = places[-1] + 1
                self.numbers[places] = batch.indices
                inputs = processor([batch.data], do_sample_frames=False, do_resize=False, return_tensors="pt")
                self.seconds_waited += time.perf_counter() - start
                yield places, inputs["pixel_values_videos"][0]
                start = time.perf_counter()
        self.seconds_waited += time.perf_counter() - start


def open_video(
    video: str | os.PathLike[str], video_processor: MambaMiaVideoProcessor, fps: float | None, seek_mode: str | None
) -> VideoReader | FrameFolder:
    """Opens a file, a URL or a folder of frames.

    Args:
        video: its path or URL; "-" for a file from standard input.
        video_processor: tells how to read where the other arguments do not.
        fps: frames per second of a folder.
        seek_mode: see [`VideoReader`].

    Raises:
        FileNotFoundError: if there is nothing at the path.
        ValueError: if it is no video.
    """
    video = os.fspath(video)
    if video == STANDARD_INPUT:
        return VideoReader(video, seek_mode or video_processor.seek_mode)
    check_video(video)
    if os.path.isdir(video):
        return FrameFolder(video, fps or video_processor.fps or 1.0)
    return VideoReader(video, seek_mode or video_processor.seek_mode)


def sample_part(
    video_processor: MambaMiaVideoProcessor,
    num_frames: int | None,
    fps: float | None,
    start: float,
    end: float | None,
    metadata: TimedVideoMetadata,
) -> np.ndarray:
    """The frames that the video processor samples between two times, the frame on display at `start` included.

    Args:
        video_processor: the one that samples.
        num_frames: how many frames, at most all; by default as the video processor samples.
        fps: how many frames per second.
        start, end: in seconds; by default to the end of the video.
        metadata: of the video.

    Raises:
        ValueError: if nothing is between the times, or for a number that cannot be sampled.
    """
    check_part(start, end)
    duration = float(metadata.duration or 0)
    stop = duration if end is None else min(end, duration)
    if start >= stop:
        raise ValueError(f"the video ends after {duration:g} seconds; start before that, not at {start:g}.")
    times = metadata.frame_timestamps
    first = max(int(np.searchsorted(times, start + 1e-3, side="right")) - 1, 0)
    times = times[first : np.searchsorted(times, stop, side="left")]
    part = TimedVideoMetadata(
        total_num_frames=len(times),
        fps=len(times) / (stop - start),
        duration=stop - start,
        frame_timestamps=times - start,
    )
    if num_frames is not None:
        num_frames = min(num_frames, len(times))
    return first + video_processor.sample_frames(part, num_frames=num_frames, fps=fps)


__all__ = ["FrameFolder", "SampledVideo", "open_video", "sample_part"]
