"""Writes tiny video files whose frames carry their own number, so that tests can tell which frame was decoded."""

import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np


HEIGHT, WIDTH = 48, 64
_ROWS, _COLUMNS = 3, 4


def draw_number(number: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """An RGB image of shape `(height, width, 3)` with `number` (below 4096) as 3 rows of 4 black or white blocks."""
    bits = [(number >> place) & 1 for place in range(_ROWS * _COLUMNS)]
    blocks = np.array(bits, dtype=np.uint8).reshape(_ROWS, _COLUMNS) * 255
    image = np.kron(blocks, np.ones((height // _ROWS, width // _COLUMNS), dtype=np.uint8))
    return np.repeat(image[:, :, None], 3, axis=2)


def read_number(image) -> int:
    """The number in an image of shape `(3, height, width)`, array or tensor, that `draw_number` drew at any size."""
    image = np.asarray(image, dtype=float).mean(axis=0)
    height, width = image.shape
    number = 0
    for place in range(_ROWS * _COLUMNS):
        row, column = divmod(place, _COLUMNS)
        centre = image[int((row + 0.5) * height / _ROWS), int((column + 0.5) * width / _COLUMNS)]
        number += int(centre > 127) << place
    return number


def read_numbers(video) -> list[int]:
    """`read_number` of each frame of a video of shape `(num_frames, 3, height, width)`."""
    return [read_number(frame) for frame in video]


def write_video(
    path: Path,
    num_frames: int = 40,
    fps: int = 10,
    times: Sequence[float] | None = None,
    start: float = 0.0,
    key_every: int = 10,
    codec: str = "libx264",
    codec_options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
    container_format: str | None = None,
    images: Sequence[np.ndarray] | None = None,
    with_sound: bool = False,
) -> Path:
    """
    Writes a video and returns its path.

    Args:
        num_frames: How many frames, each of which shows its number.
        fps: The frame rate; where `times` are given, the rate that the file states.
        times: When each frame is shown, in seconds, for a variable rate.
        start: The time of the first frame in seconds.
        key_every: The largest number of frames from one key frame to the next.
        codec_options: Options of the encoder, B-frames by default.
        container_options: Options of the muxer, such as `{"movflags": "faststart"}`.
        container_format: The container, by default what the path's suffix says.
        images: The frames to write instead, of shape `(height, width, 3)`.
        with_sound: Whether to add a silent sound track.
    """
    if images is None:
        images = [draw_number(number) for number in range(num_frames)]
    if times is None:
        times = [number / fps for number in range(len(images))]
    is_regular = all(abs(time * fps - round(time * fps)) < 1e-6 for time in times)
    time_base = Fraction(1, fps if is_regular else 1000 * fps)
    if codec_options is None:
        codec_options = {"bf": "2", "preset": "veryfast", "sc_threshold": "0"} if codec == "libx264" else {}

    with av.open(str(path), "w", format=container_format, options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=fps, options={"g": str(key_every), **codec_options})
        stream.height, stream.width = images[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = time_base
        sound = container.add_stream("aac", rate=8000) if with_sound else None
        for image, time in zip(images, times, strict=True):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            frame.time_base = time_base
            frame.pts = round((start + time) / time_base)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if sound is not None:
            _encode_silence(container, sound, seconds=times[-1])
    return path


def write_sound(path: Path, seconds: float = 1.0) -> Path:
    """Writes a silent sound file and returns its path."""
    with av.open(str(path), "w") as container:
        _encode_silence(container, container.add_stream("aac", rate=8000), seconds)
    return path


def _encode_silence(container, stream, seconds: float) -> None:
    for start in range(0, int(8000 * seconds), 1024):
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
        frame.rate = 8000
        frame.pts = start
        container.mux(stream.encode(frame))
    container.mux(stream.encode())


def write_rotated_video(path: Path, turns: int, num_frames: int = 10) -> Path:
    """
    Writes an MP4 whose frames are stored turned clockwise by `turns` quarters and which says so, as a phone held on
    its side does: shown as intended, they are upright again.
    """
    write_video(path, images=[np.rot90(draw_number(number), -turns) for number in range(num_frames)])
    # PyAV has no lasting way to write the display matrix, so it is set where MP4 keeps it, 40 bytes into `tkhd`.
    cosine, sine = [(1, 0), (0, -1), (-1, 0), (0, 1)][turns % 4]
    matrix = [cosine << 16, sine << 16, 0, -sine << 16, cosine << 16, 0, 0, 0, 1 << 30]
    content = bytearray(path.read_bytes())
    start = content.index(b"tkhd") + 4 + 40
    content[start : start + 36] = struct.pack(">9i", *matrix)
    path.write_bytes(content)
    return path


def write_cut_video(path: Path, share: float, **kwargs) -> Path:
    """Writes a video (see `write_video`) and keeps the first `share` of its bytes."""
    content = write_video(path, **kwargs).read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    return path


def blank_frames(path: Path, numbers: Sequence[int], keep: int = 0) -> Path:
    """
    Overwrites the coded pictures of the frames with these numbers, in the order of showing, with zeros, apart from the
    first `keep` bytes of each.
    """
    with av.open(str(path)) as container:
        packets = sorted((packet.pts, packet.pos, packet.size) for packet in container.demux(video=0) if packet.size)
    content = bytearray(path.read_bytes())
    for _, position, size in (packets[number] for number in numbers):
        content[position + keep : position + size] = bytes(size - keep)
    path.write_bytes(content)
    return path
