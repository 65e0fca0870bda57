"""The pixels of needle videos, as files and as rendered."""

from pathlib import Path

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from needle.plan import NeedleVideo
from needle.video import render_frames


def decode(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """All frames of a file, `(frames, height, width, 3)`, and their times in seconds."""
    reformatter = VideoReformatter()
    with av.open(str(path)) as container:
        frames = [reformatter.reformat(frame, format="rgb24") for frame in container.decode(video=0)]
    return np.stack([frame.to_ndarray() for frame in frames]), np.array([frame.time for frame in frames])


def render(video: NeedleVideo) -> np.ndarray:
    """The frames of a plan before encoding, `(frames, height, width, 3)`."""
    return np.stack([np.asarray(frame) for frame in render_frames(video)]).astype(np.int16)


def changed_area(frames: np.ndarray, without: np.ndarray) -> np.ndarray:
    """The share of each frame that differs from the one `without` needles by more than coding noise."""
    return (np.abs(frames - without).max(axis=-1) > 64).mean(axis=(1, 2))
