"""Memories of many videos, each written once: `mambamia encode` and `examples/corpus`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open

from .video_memory import VideoMemory, describe_images, describe_sampling, encoder_fingerprint


Outcome = Literal["written", "written again", "there already"]


class MemoryWriter:
    """Writes memories of videos; those that are there, whole and what would be written, are left alone.

    Args:
        model: that sees the videos; a [`MambaMiaEncoder`] is enough.
        processor: of the same checkpoint.
        num_frames, fps, start, end, seek_mode: which frames are sampled, as in `encode_video`.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        *,
        num_frames: int | None = None,
        fps: float | None = None,
        start: float = 0.0,
        end: float | None = None,
        seek_mode: str | None = None,
    ) -> None:
        self.model, self.processor = model, processor
        self.sampling: dict[str, Any] = {
            "num_frames": num_frames,
            "fps": fps,
            "start": start,
            "end": end,
            "seek_mode": seek_mode,
        }
        self.made_by = {
            **encoder_fingerprint(model),
            "images": describe_images(processor.video_processor),
            "sampling": describe_sampling(**self.sampling),
        }

    def write(self, video: str, target: Path, progress: Callable[[int, int], None] | None = None) -> Outcome:
        """Writes the memory of a video, whole or not at all.

        Args:
            video: path or URL of a video file, or a folder of its frames.
            target: the file to write.
            progress: called with the number of frames that have been looked at, and that of all frames.

        Returns:
            What was done: "written again" where a part of the file was missing.

        Raises:
            OSError, ValueError: if the video cannot be read, or the file is there and is something else.
        """
        is_there = target.exists()
        if is_there and not _is_cut(target):
            self._check(target)
            return "there already"
        self.model.encode_video(video, self.processor, **self.sampling, progress=progress).save(target)
        return "written again" if is_there else "written"

    def _check(self, target: Path) -> None:
        """Raises unless the file is a memory that this model would make with these options."""
        try:
            VideoMemory.load(target).check(self.made_by)
        except ValueError as error:
            raise ValueError(
                f"{str(error).rstrip('.')}; '{target}' stays as it is: name another folder, or delete it."
            ) from error


def _is_cut(target: Path) -> bool:
    """Whether a part of the file is missing; nothing is lost if it is written again."""
    try:
        with safe_open(target, "pt"):
            return False
    except SafetensorError:
        return True


__all__ = ["MemoryWriter", "Outcome"]
