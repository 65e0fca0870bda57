"""Frames of a video file or of a folder of images, sampled between two times as a video processor samples."""

import os
from collections.abc import Callable, Sequence

import numpy as np
import torch
from transformers.image_utils import load_image

from .inputs import check_part, check_video, frame_files
from .video_decoding import FrameBatch, VideoReader
from .video_index import TimedVideoMetadata
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
        frames, sizes = [], dict[tuple[int, int], str]()
        for index in indices:
            try:
                image = load_image(str(self.files[index]))
            except OSError as error:
                raise ValueError(f"the frame '{self.files[index]}' cannot be read as an image ({error}).") from error
            sizes.setdefault(image.size, self.files[index].name)
            frame = torch.from_numpy(np.array(image)).permute(2, 0, 1)
            frames.append(frame if transform is None else transform(frame))
        if len(sizes) > 1:
            named = ", ".join(f"{name} of {width} x {height}" for (width, height), name in list(sizes.items())[:2])
            raise ValueError(
                f"the images in '{self.folder}' differ in size ({named}) and so are no frames of one video."
            )
        self.metadata.width, self.metadata.height = next(iter(sizes))
        numbers = [int(index) for index in indices]
        return FrameBatch(torch.stack(frames), numbers, self.metadata.frame_timestamps[numbers].tolist())


def open_video(
    video: str | os.PathLike[str], video_processor: MambaMiaVideoProcessor, fps: float | None, seek_mode: str | None
) -> VideoReader | FrameFolder:
    """Opens a file, a URL or a folder of frames.

    Args:
        video: its path or URL.
        video_processor: tells how to read where the other arguments do not.
        fps: frames per second of a folder.
        seek_mode: see [`VideoReader`].

    Raises:
        FileNotFoundError: if there is nothing at the path.
        ValueError: if it is no video.
    """
    video = os.fspath(video)
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


__all__ = ["FrameFolder", "open_video", "sample_part"]
