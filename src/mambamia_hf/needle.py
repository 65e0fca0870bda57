"""Needle videos: H.264 files in which bright glyphs show up for a short time, with questions whose answers are known.

A video is planned from its seed alone (`NeedleVideo`), rendered and encoded. What is shown when and where is therefore
known exactly, and the same seed gives the same video again. There are three tasks: which glyph appears (retrieval), in
which order three of them appear (ordering), and how often one appears (counting). Background and needles draw from
separate random streams: a plan without its needles (`dataclasses.replace(video, needles=[])`) renders the same
background.

Long videos have a few thousand different pictures at most, each shown for several frames: files of an hour are then
quick to make and small at any frame rate.
"""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import permutations
from pathlib import Path

import av
import numpy as np
from av.video.frame import PictureType
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from .scenery import Planes, Stamp, render_clip, render_scenes, to_frame, to_image


TASKS = ("retrieval", "ordering", "counting")
SPLITS = ("train", "test")

SHAPES = ("circle", "square", "triangle", "star", "cross", "heart", "diamond", "ring")
DIGITS = tuple("0123456789")
COLOURS = {
    "red": (225, 25, 25),
    "green": (20, 160, 45),
    "blue": (25, 65, 235),
    "yellow": (255, 230, 20),
    "orange": (255, 130, 0),
    "purple": (150, 35, 190),
    "white": (255, 255, 255),
    "black": (0, 0, 0),
}

# `{medium}` is "video" or "image"; the first of each list is the plainest. Both spellings of colour are asked.
QUESTIONS = {
    "shape": [
        "What shape appears in the {medium}?",
        "Which shape is shown in the {medium}?",
        "What shape can be seen in the {medium}?",
        "Which shape shows up in the {medium}?",
        "Name the shape that appears in the {medium}.",
    ],
    "digit": [
        "Which digit appears in the {medium}?",
        "What digit is shown in the {medium}?",
        "What number can be seen in the {medium}?",
        "Which number shows up in the {medium}?",
        "Name the digit that appears in the {medium}.",
    ],
    "colour": [
        "What colour is the {kind}?",
        "What color is the {kind}?",
        "Which colour does the {kind} in the {medium} have?",
        "Which color does the {kind} in the {medium} have?",
        "Name the colour of the {kind} in the {medium}.",
        "Name the color of the {kind} in the {medium}.",
    ],
}

# Multiple choice, the plainest wording first.
CHOICE_QUESTIONS = {
    "retrieval": [
        "What appears in the {medium}?",
        "Which symbol appears in the {medium}?",
        "Which symbol is shown in the {medium}?",
        "Which of these can be seen in the {medium}?",
        "What shows up in the {medium}?",
    ],
    "ordering": [
        "In which order do the symbols appear in the {medium}?",
        "In what order are the symbols shown in the {medium}?",
        "What is the order of the symbols in the {medium}?",
        "Which order do the symbols in the {medium} have?",
        "In which order do the symbols show up in the {medium}?",
    ],
    "counting": [
        "How many times does the {value} appear in the {medium}?",
        "How many times is the {value} shown in the {medium}?",
        "How often does the {value} appear in the {medium}?",
        "How often is the {value} shown in the {medium}?",
        "How many times can the {value} be seen in the {medium}?",
    ],
}
NUM_ORDERED = 3
MAX_COUNT = 4
NUM_OPTIONS = 4

# A model is taken to sample at most this many frames a second, evenly over the video.
SAMPLES_PER_SECOND = 2.0

NEEDLE_SIZES = (0.30, 0.45)  # of the frame's shorter side
# Needles are centred on points of a lattice with this many steps a side. As on a checkerboard, "train" takes the black
# points and "test" the white ones.
LATTICE = 48
OUTLINE = 0.06  # of the needle's size, drawn around it
SUPERSAMPLE = 4

MAX_PICTURES = 1800  # rendered for a long video, or as many as there are sampled frames
MAX_FILE_BYTES = 20e6  # of the pictures of a video


@dataclass(frozen=True)
class Needle:
    """One glyph shown at one place for one stretch of time.

    `kind` is "shape" or "digit", `value` one of `SHAPES` or `DIGITS`, `colour` a key of `COLOURS`. It is on screen for
    `start <= t < start + duration` (seconds). `x` and `y` are its centre as fractions of the frame's width and height,
    `size` its height as a fraction of the frame's shorter side. With `halo`, the background fades around it.
    """

    kind: str
    value: str
    colour: str
    start: float
    duration: float
    x: float
    y: float
    size: float
    halo: bool


@dataclass(frozen=True)
class NeedleVideo:
    """The plan of a video and its ground truth: everything that is needed to render it again.

    `total_num_frames` is the length of the file in frames, `fps` its frame rate, `size` (height, width) in pixels.
    `needles` are in the order in which they appear. Every picture is shown for `frames_per_picture` frames.
    `background` is a video file, or None for a background made from the seed. `path` is the file once it is written.
    """

    seed: int
    total_num_frames: int
    fps: float
    size: tuple[int, int]
    needles: list[Needle]
    path: Path | None = None
    task: str = "retrieval"
    split: str = "train"
    frames_per_picture: int = 1
    background: Path | None = None

    @property
    def duration(self) -> float:
        """Length in seconds."""
        return self.total_num_frames / self.fps


@dataclass(frozen=True)
class Question:
    """A question, the options to choose from and the right one, in words."""

    text: str
    options: tuple[str, ...]
    answer: str

    @property
    def prompt(self) -> str:
        """The question with its options: what a model is asked."""
        return f"{self.text} Options: {'; '.join(self.options)}."


def write_needle_video(
    path: str | os.PathLike,
    seed: int,
    *,
    task: str = "retrieval",
    split: str = "train",
    duration: float = 32.0,
    fps: float = 2.0,
    size: tuple[int, int] = (128, 128),
    num_frames: int = 384,
    needle_seconds: float | None = None,
    background: str | os.PathLike | None = None,
) -> NeedleVideo:
    """Write an MP4 file (H.264) with the needles of a task in it and return its ground truth.

    The file appears under its name only when it is complete.

    Args:
        path: the file to write.
        seed: non-negative; decides background, needles, times and places.
        task: "retrieval" (one needle), "ordering" (three of different values, one after another) or "counting" (one
            value, one to four times).
        split: "train" or "test". The two share neither backgrounds nor the places of needles.
        duration: length in seconds.
        fps: the file's frame rate.
        size: (height, width) in pixels, even numbers.
        num_frames: how many frames a model samples at most, beside at most 2 a second. Every needle is shown in at
            least one sampled frame, and at least two without any lie between needles (one, where time is short).
        needle_seconds: how long a needle is shown, rounded up to whole pictures. By default one to three times the
            gap between sampled frames, in counting one or two; less than one is an error.
        background: a video file to show behind the needles, cropped and resized, from a random point on and in a loop
            where it is shorter. Use other files for other splits. By default moving textures that the seed decides.

    Raises:
        ValueError: for a setting that no video can have, or a background that cannot be read.
        FileNotFoundError: if there is no file `background`.
    """
    path = Path(path)
    video = _plan(path, seed, task, split, duration, fps, size, num_frames, needle_seconds, background)
    _encode(video)
    return video


def needle_image(seed: int, size: tuple[int, int] = (128, 128), split: str = "train") -> tuple[Image.Image, Needle]:
    """A still of `size` (height, width) with a needle in it, and that needle; deterministic in `seed` and `split`."""
    video = _plan(None, seed, "retrieval", split, 1.0, 1.0, size, 1, None, None)
    return next(render_frames(video)), video.needles[0]


def needle_frames(
    seed: int, num_frames: int, size: tuple[int, int] = (128, 128), split: str = "train"
) -> list[tuple[Image.Image, Needle | None]]:
    """Frames of one video, a second apart, and the needle that each of them shows: another in every other frame.

    What tells such frames apart is the needle alone, as their background is the same. Deterministic in `seed` and
    `split`; `size` is (height, width).
    """
    rng = _rng(seed, split, _FRAMES)
    shown = [
        _random_needle(rng, _random_value(rng), split, size, float(time), 1.0) if rng.random() < 0.5 else None
        for time in range(num_frames)
    ]
    needles = [needle for needle in shown if needle is not None]
    video = NeedleVideo(seed=seed, total_num_frames=num_frames, fps=1.0, size=size, needles=needles, split=split)
    return list(zip(render_frames(video), shown, strict=True))


def questions(video: NeedleVideo) -> list[tuple[str, str]]:
    """Every open question about a video of one needle, in all its wordings, with its answer (one lowercase word)."""
    if len(video.needles) != 1:
        raise ValueError(
            f"questions are about a video of one needle, this one has {len(video.needles)}; give one needle."
        )
    return needle_questions(video.needles[0], "video")


def needle_questions(needle: Needle, medium: str) -> list[tuple[str, str]]:
    """The open questions about `needle` in a "video" or an "image": what it is, then those about its colour."""
    asked = [(wording, needle.value) for wording in QUESTIONS[needle.kind]]
    asked += [(wording, needle.colour) for wording in QUESTIONS["colour"]]
    return [(wording.format(medium=medium, kind=needle.kind), answer) for wording, answer in asked]


def multiple_choice(video: NeedleVideo, seed: int) -> Question:
    """The question of the video's task, with four options; `seed` decides on wording and options."""
    rng = _rng(seed, video.split, _CHOICE, video.seed)
    values = [needle.value for needle in video.needles]
    if video.task == "retrieval":
        return _retrieval_question(values[0], "video", rng)
    text = str(rng.choice(CHOICE_QUESTIONS[video.task])).format(medium="video", value=values[0])
    if video.task == "counting":
        return Question(text, tuple(str(count) for count in range(1, MAX_COUNT + 1)), str(len(values)))
    wrong = [" ".join(order) for order in permutations(values) if list(order) != values]
    return _shuffled(text, " ".join(values), wrong, rng)


def needle_multiple_choice(needle: Needle, medium: str, seed: int) -> Question:
    """Which of four symbols `needle` in a "video" or an "image" is; `seed` decides on wording and options."""
    return _retrieval_question(needle.value, medium, _rng(seed, "train", _CHOICE))


def render_frames(video: NeedleVideo) -> Iterator[Image.Image]:
    """The frames of `video` in order, RGB, before encoding."""
    left = video.total_num_frames
    for planes in _render_pictures(video):
        yield from [to_image(planes)] * min(video.frames_per_picture, left)
        left -= video.frames_per_picture


# --- Planning

_NEEDLES, _SCENES, _CLIP, _CHOICE, _FRAMES = range(5)  # random streams of one seed


def _seeds(seed: int, split: str, stream: int, index: int = 0) -> np.random.SeedSequence:
    return np.random.SeedSequence(seed, spawn_key=(SPLITS.index(split), stream, index))


def _rng(seed: int, split: str, stream: int, index: int = 0) -> np.random.Generator:
    return np.random.default_rng(_seeds(seed, split, stream, index))


def _plan(
    path: Path | None,
    seed: int,
    task: str,
    split: str,
    duration: float,
    fps: float,
    size: tuple[int, int],
    num_frames: int,
    needle_seconds: float | None,
    background: str | os.PathLike | None,
) -> NeedleVideo:
    if seed < 0:
        raise ValueError(f"seed must not be negative, got {seed}; give 0 or more.")
    if task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got '{task}'; give one of these.")
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got '{split}'; give one of these.")
    if not 0 < fps <= 240:
        raise ValueError(f"fps must be above 0 and at most 240, got {fps}; give the file's frames per second.")
    if not (math.isfinite(duration) and round(duration * fps) >= 1):
        raise ValueError(f"duration {duration} s holds no frame at {fps} fps; give a longer one.")
    if len(size) != 2 or any(side < 32 or side % 2 for side in size):
        raise ValueError(
            f"size must be (height, width), both even and at least 32, got {tuple(size)}; give e.g. (128, 128)."
        )
    if num_frames < 1:
        raise ValueError(f"num_frames must be at least 1, got {num_frames}; give how many frames a model samples.")
    if needle_seconds is not None and not 0 < needle_seconds <= duration:
        raise ValueError(
            f"needle_seconds must be above 0 and at most the duration ({duration} s), got {needle_seconds}; "
            "leave it out for needles that sampling meets."
        )
    rng = _rng(seed, split, _NEEDLES, TASKS.index(task))
    total = round(duration * fps)
    samples = min(total, num_frames, max(1, int(total / fps * SAMPLES_PER_SECOND + 1e-3)))
    if needle_seconds is not None and needle_seconds < total / fps / samples - 1e-6:
        raise ValueError(
            f"needle_seconds is {needle_seconds}, but {samples} frames sampled from {duration} s lie "
            f"{total / fps / samples:.3g} s apart; give at least that, or a larger num_frames."
        )
    frames_per_picture = min(math.ceil(total / MAX_PICTURES), total // samples)
    period = frames_per_picture / fps
    num_pictures = total // frames_per_picture
    gap = math.ceil(total / samples / frames_per_picture - 1e-6)  # pictures from one sampled frame to the next
    if task == "retrieval":
        values = [_random_value(rng)]
    elif task == "ordering":
        values = [str(value) for value in rng.choice(SHAPES + DIGITS, NUM_ORDERED, replace=False)]
    else:
        values = [_random_value(rng)] * int(rng.integers(1, MAX_COUNT + 1))
    count = MAX_COUNT if task == "counting" else len(values)  # room for four, so that every count is as likely
    shortest = gap if needle_seconds is None else min(math.ceil(round(needle_seconds / period, 6)), num_pictures)
    between = 2 * gap if count * shortest + (count - 1) * 2 * gap <= num_pictures else gap
    room = num_pictures - (count - 1) * between
    if count * shortest > room:
        raise ValueError(
            f"{duration} s with {samples} sampled frames have no room for {count} needles, as {task} needs; give a "
            "longer duration, a larger num_frames or a shorter needle_seconds."
        )
    if needle_seconds is None:
        longest = min(2 if task == "counting" else 3, room // count // gap)
        lengths = gap * rng.integers(1, longest + 1, len(values))
    else:
        lengths = np.full(len(values), shortest)
    free = num_pictures - int(lengths.sum()) - (len(values) - 1) * between
    starts = np.sort(rng.integers(0, free + 1, len(values)))
    starts[1:] += np.cumsum(lengths[:-1] + between)
    needles = [
        _random_needle(rng, value, split, size, start * period, length * period)
        for value, start, length in zip(values, starts.tolist(), lengths.tolist(), strict=True)
    ]
    return NeedleVideo(
        seed=seed,
        total_num_frames=total,
        fps=float(fps),
        size=tuple(size),
        needles=needles,
        path=path,
        task=task,
        split=split,
        frames_per_picture=frames_per_picture,
        background=None if background is None else Path(background),
    )


def _random_value(rng: np.random.Generator) -> str:
    return str(rng.choice((SHAPES, DIGITS)[rng.integers(2)]))


def _random_needle(
    rng: np.random.Generator, value: str, split: str, size: tuple[int, int], start: float, duration: float
) -> Needle:
    extent = rng.uniform(*NEEDLE_SIZES)
    # The whole glyph with its outline stays inside the frame.
    margin_y, margin_x = (math.ceil(0.5 * extent * (1 + 2 * OUTLINE) * min(size) / side * LATTICE) for side in size)
    column = int(rng.integers(margin_x, LATTICE - margin_x + 1))
    rows = np.arange(margin_y, LATTICE - margin_y + 1)
    row = int(rng.choice(rows[(rows + column) % 2 == SPLITS.index(split)]))
    return Needle(
        kind="shape" if value in SHAPES else "digit",
        value=value,
        colour=str(rng.choice(list(COLOURS))),
        start=start,
        duration=duration,
        x=column / LATTICE,
        y=row / LATTICE,
        size=float(extent),
        halo=bool(rng.random() < 0.5),
    )


def _retrieval_question(value: str, medium: str, rng: np.random.Generator) -> Question:
    text = str(rng.choice(CHOICE_QUESTIONS["retrieval"])).format(medium=medium)
    return _shuffled(text, value, [other for other in SHAPES + DIGITS if other != value], rng)


def _shuffled(text: str, answer: str, wrong: list[str], rng: np.random.Generator) -> Question:
    options = [answer, *rng.choice(wrong, NUM_OPTIONS - 1, replace=False)]
    return Question(text, tuple(str(option) for option in rng.permutation(options)), answer)


# --- Pictures


def _render_pictures(video: NeedleVideo) -> Iterator[Planes]:
    """The different pictures of `video` in order."""
    period = video.frames_per_picture / video.fps
    times = period * np.arange(math.ceil(video.total_num_frames / video.frames_per_picture))
    if video.background is None:
        pictures = render_scenes(_seeds(video.seed, video.split, _SCENES), video.size, times)
    else:
        pictures = render_clip(video.background, _rng(video.seed, video.split, _CLIP), video.size, times)
    stamps = [(needle, _stamp(needle, video.size)) for needle in video.needles]
    for time, planes in zip(times, pictures, strict=True):
        for needle, stamp in stamps:
            # Half a picture of slack keeps rounding of the times from moving an edge by a picture.
            if needle.start <= time + 0.5 * period < needle.start + needle.duration:
                stamp.paste_onto(planes)
        yield planes


# --- Needles


def _stamp(needle: Needle, size: tuple[int, int]) -> Stamp:
    glyph = _glyph(needle, min(size))
    left, top = round(needle.x * size[1] - glyph.width / 2), round(needle.y * size[0] - glyph.height / 2)
    return Stamp(glyph, left, top)


def _glyph(needle: Needle, shorter_side: int) -> Image.Image:
    """The needle as an RGBA image with its outline (and halo), its centre in the image's centre."""
    height = round(needle.size * shorter_side)
    pad = round((0.5 if needle.halo else 2 * OUTLINE) * height)
    canvas = SUPERSAMPLE * (height + 2 * pad)
    fill = Image.new("L", (canvas, canvas))
    draw_mask = {"shape": _shape_mask, "digit": _digit_mask}[needle.kind]
    figure = draw_mask(needle.value, SUPERSAMPLE * height)
    fill.paste(figure, ((canvas - figure.width) // 2, (canvas - figure.height) // 2))
    # A blurred edge cut low lies outside the edge by about 1.4 blur radii: an outline with round corners.
    blur = ImageFilter.GaussianBlur(OUTLINE * SUPERSAMPLE * height / 1.4)
    outline = fill.filter(blur).point(lambda level: 255 * (level > 20))
    colour = COLOURS[needle.colour]
    light = 0.3 * colour[0] + 0.59 * colour[1] + 0.11 * colour[2] > 130
    glyph = Image.new("RGBA", (height + 2 * pad,) * 2, (0, 0, 0, 0) if light else (255, 255, 255, 0))
    small = [mask.resize(glyph.size, Image.Resampling.BOX) for mask in (fill, outline)]
    alpha = small[1]
    if needle.halo:
        halo = small[1].filter(ImageFilter.GaussianBlur(pad / 2.5)).point(lambda v: int(0.8 * v))
        alpha = Image.fromarray(np.maximum(np.asarray(alpha), np.asarray(halo)))
    glyph.paste(colour, mask=small[0])
    glyph.putalpha(alpha)
    return glyph


def _shape_mask(shape: str, side: int) -> Image.Image:
    """A shape in white on black, `side` pixels high and wide."""
    mask = Image.new("L", (side, side))
    draw = ImageDraw.Draw(mask)

    def polygon(points):
        draw.polygon([(x * (side - 1), y * (side - 1)) for x, y in points], fill=255)

    def ellipse(left, top, right, bottom, fill=255):
        draw.ellipse([c * (side - 1) for c in (left, top, right, bottom)], fill=fill)

    if shape == "circle":
        ellipse(0, 0, 1, 1)
    elif shape == "ring":
        ellipse(0, 0, 1, 1)
        ellipse(0.25, 0.25, 0.75, 0.75, fill=0)
    elif shape == "square":
        polygon([(0.06, 0.06), (0.94, 0.06), (0.94, 0.94), (0.06, 0.94)])
    elif shape == "diamond":
        polygon([(0.5, 0), (0.9, 0.5), (0.5, 1), (0.1, 0.5)])
    elif shape == "triangle":
        polygon([(0.5, 0.04), (1, 0.96), (0, 0.96)])
    elif shape == "cross":
        a, b = 0.34, 0.66
        polygon([(a, 0), (b, 0), (b, a), (1, a), (1, b), (b, b), (b, 1), (a, 1), (a, b), (0, b), (0, a), (a, a)])
    elif shape == "star":
        corners = [(0.54 if k % 2 == 0 else 0.23, math.pi * k / 5) for k in range(10)]
        polygon([(0.5 + radius * math.sin(turn), 0.54 - radius * math.cos(turn)) for radius, turn in corners])
    else:
        turns = np.linspace(0, 2 * math.pi, 60)
        xs = 16 * np.sin(turns) ** 3
        ys = 13 * np.cos(turns) - 5 * np.cos(2 * turns) - 2 * np.cos(3 * turns) - np.cos(4 * turns)
        polygon([(0.5 + x / 33, 0.42 - y / 31) for x, y in zip(xs, ys, strict=True)])
    return mask


def _digit_mask(digit: str, height: int) -> Image.Image:
    """A digit in white on black, `height` pixels high, in a bold cut of Pillow's own font."""
    large = 200
    font = ImageFont.load_default(large)
    mask = Image.new("L", (2 * large, 2 * large))
    ImageDraw.Draw(mask).text((large // 2, large // 2), digit, fill=255, font=font, stroke_width=large // 40)
    mask = mask.crop(mask.getbbox())
    return mask.resize((round(mask.width * height / mask.height), height), Image.Resampling.BILINEAR)


# --- File


def _encode(video: NeedleVideo) -> None:
    """Write H.264 in MP4, under a temporary name beside the video's path until the file is complete.

    A picture that is shown for several frames is encoded once, as a key frame. The frames after it say "as before":
    they are the same bytes for any picture, so they are encoded only once for the whole file.
    """
    path, step = video.path, video.frames_per_picture
    rate = Fraction(video.fps).limit_denominator(1001)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with av.open(str(partial), "w", format="mp4") as container:
            stream = container.add_stream("libx264", rate=rate)
            _set_up(stream.codec_context, video, rate)
            repeats = _encode_repeats(video, rate) if step > 1 else []

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
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


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
    """The packets of the frames that show a picture again."""
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
