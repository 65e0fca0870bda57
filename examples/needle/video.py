"""Renders needle videos and writes them as H.264 files.

The same seed gives the same pictures again. Long videos have a few thousand different pictures at most, each shown for
several frames: files of an hour are then quick to make and small at any frame rate.
"""

import math
import os
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.frame import PictureType
from PIL import Image

from mambamia_hf.files import atomic_write

from .backgrounds import render_clip, render_scenes
from .glyphs import draw_glyph
from .pictures import Planes, Stamp, to_frame, to_image
from .plan import (
    Needle,
    NeedleVideo,
    Stream,
    plan_video,
    random_generator,
    random_needle,
    random_value,
    seed_sequence,
)


MAX_FILE_BYTES = 20e6  # of the pictures of a video


def write_needle_video(
    path: str | os.PathLike[str],
    seed: int,
    *,
    task: str = "retrieval",
    split: str = "train",
    duration: float = 32.0,
    fps: float = 2.0,
    size: tuple[int, int] = (128, 128),
    num_frames: int = 384,
    needle_seconds: float | None = None,
    background: str | os.PathLike[str] | None = None,
) -> NeedleVideo:
    """Writes an MP4 file (H.264) with the needles of a task in it. It is written whole or not at all.

    Args:
        path: the file to write.
        seed: non-negative; decides background, needles, times and places.
        task: "retrieval" or "when" (one needle), "ordering" (three of different values, one after another),
            "counting" (one value, one to four times) or "nothing" (no needle).
        split: "train" or "test". The two share neither backgrounds nor the places of needles.
        duration: length in seconds.
        fps: the file's frame rate.
        size: (height, width) in pixels, even numbers.
        num_frames: most frames that a model samples; it samples at most 2 per second. Every needle is shown in at
            least one sampled frame, and between two needles lie at least two sampled frames without any (one, where
            time is short).
        needle_seconds: how long a needle is shown, rounded up to whole pictures. By default one to three times the
            gap between sampled frames, in counting one or two. Less than one is an error.
        background: a video file to show behind the needles, cropped and resized, from a random point on, in a loop
            if it is shorter. Use different files for different splits. By default moving textures made from the seed.

    Returns:
        The ground truth.

    Raises:
        ValueError: for settings that no video can have, or a background that cannot be read.
        FileNotFoundError: if there is no file `background`.
    """
    plan = plan_video(
        seed,
        task=task,
        split=split,
        duration=duration,
        fps=fps,
        size=size,
        num_frames=num_frames,
        needle_seconds=needle_seconds,
        background=background,
    )
    video = replace(plan, path=Path(path))
    with atomic_write(path) as partial:
        _encode(video, partial)
    return video


def needle_image(seed: int, size: tuple[int, int] = (128, 128), split: str = "train") -> tuple[Image.Image, Needle]:
    """A still of `size` (height, width) with a needle in it, and that needle; deterministic in `seed` and `split`."""
    video = plan_video(seed, split=split, duration=1.0, fps=1.0, size=size, num_frames=1)
    return next(render_frames(video)), video.needles[0]


def needle_frames(
    seed: int, num_frames: int, size: tuple[int, int] = (128, 128), split: str = "train"
) -> list[tuple[Image.Image, Needle | None]]:
    """Frames of one video, a second apart, half of them at random with a needle each.

    Only the needles tell such frames apart, as their background is the same. Deterministic in `seed` and `split`.

    Args:
        seed: non-negative.
        num_frames: how many frames.
        size: (height, width) in pixels.
        split: "train" or "test".

    Returns:
        Each frame with the needle that it shows, or None.
    """
    rng = random_generator(seed, split, Stream.FRAMES)
    shown = [
        random_needle(rng, random_value(rng), split, size, float(time), 1.0) if rng.random() < 0.5 else None
        for time in range(num_frames)
    ]
    needles = [needle for needle in shown if needle is not None]
    video = NeedleVideo(seed=seed, total_num_frames=num_frames, fps=1.0, size=size, needles=needles, split=split)
    return list(zip(render_frames(video), shown, strict=True))


def render_frames(video: NeedleVideo) -> Iterator[Image.Image]:
    """The frames of `video` in order, RGB, before encoding."""
    left = video.total_num_frames
    for planes in _render_pictures(video):
        yield from [to_image(planes)] * min(video.frames_per_picture, left)
        left -= video.frames_per_picture


def _render_pictures(video: NeedleVideo) -> Iterator[Planes]:
    """The different pictures of `video` in order."""
    period = video.frames_per_picture / video.fps
    times = period * np.arange(math.ceil(video.total_num_frames / video.frames_per_picture))
    if video.background is None:
        pictures = render_scenes(seed_sequence(video.seed, video.split, Stream.SCENES), video.size, times)
    else:
        rng = random_generator(video.seed, video.split, Stream.CLIP)
        pictures = render_clip(video.background, rng, video.size, times)
    stamps = [(needle, _stamp(needle, video.size)) for needle in video.needles]
    for time, planes in zip(times, pictures, strict=True):
        for needle, stamp in stamps:
            # Half a picture of slack keeps rounding of the times from moving an edge by a picture.
            if needle.start <= time + 0.5 * period < needle.start + needle.duration:
                stamp.paste_onto(planes)
        yield planes


def _stamp(needle: Needle, size: tuple[int, int]) -> Stamp:
    height, width = size
    glyph = draw_glyph(needle.value, needle.colour, round(needle.size * min(size)), needle.halo)
    return Stamp(glyph, round(needle.x * width - glyph.width / 2), round(needle.y * height - glyph.height / 2))


def _encode(video: NeedleVideo, path: Path) -> None:
    """Writes H.264 in MP4.

    A picture that is shown for several frames is encoded once, as a key frame. The frames after it say "as before":
    they are the same bytes for any picture, so they are encoded only once for the whole file.
    """
    step = video.frames_per_picture
    rate = Fraction(video.fps).limit_denominator(1001)
    repeats = _encode_repeats(video, rate) if step > 1 else []
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=rate)
        _set_up(stream.codec_context, video, rate)

        def write(packets: list[av.Packet]) -> None:
            for packet in packets:
                first, time_base = packet.pts, packet.time_base
                container.mux(packet)
                for number, repeat in enumerate(repeats[: video.total_num_frames - first - 1], start=first + 1):
                    packet = av.Packet(repeat)
                    packet.stream, packet.time_base, packet.duration = stream, time_base, 1
                    packet.pts = packet.dts = number
                    container.mux(packet)

        for number, planes in enumerate(_render_pictures(video)):
            picture = to_frame(planes)
            picture.pts, picture.time_base = number * step, 1 / rate
            if repeats:
                picture.pict_type = PictureType.I
            write(stream.encode(picture))
        write(stream.encode())


def _set_up(encoder: av.VideoCodecContext, video: NeedleVideo, rate: Fraction) -> None:
    encoder.height, encoder.width = video.size
    encoder.pix_fmt = "yuv420p"
    encoder.framerate, encoder.time_base = rate, 1 / rate
    # A key frame every few seconds lets readers start anywhere; there is none among the repeats of a picture.
    encoder.gop_size = max(min(max(round(4 * video.fps), 12), 60), video.frames_per_picture)
    encoder.thread_count = 1  # frames this small gain nothing from more, and the file stays the same
    bits_per_second = 8 * MAX_FILE_BYTES / video.duration
    encoder.options = {
        "preset": "ultrafast",
        "crf": "24",
        "bf": "0",
        "forced-idr": "1",
        "maxrate": str(round(bits_per_second)),
        "bufsize": str(round(bits_per_second * min(video.duration, 60.0))),
    }


def _encode_repeats(video: NeedleVideo, rate: Fraction) -> list[bytes]:
    """The packets of frames that repeat a picture."""
    encoder = av.CodecContext.create("libx264", "w")
    _set_up(encoder, video, rate)
    height, width = video.size
    picture = av.VideoFrame.from_ndarray(np.full((height * 3 // 2, width), 128, np.uint8), "yuv420p")
    packets = []
    for number in range(video.frames_per_picture):
        picture.pts, picture.time_base = number, 1 / rate
        packets += encoder.encode(picture)
    packets += encoder.encode()
    return [bytes(packet) for packet in packets[1:]]
