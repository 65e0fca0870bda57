"""Needle videos: H.264 files of moving texture in which a bright glyph shows up for a short time.

A video is planned from its seed alone (`NeedleVideo`), rendered frame by frame and encoded. What is shown when and
where is therefore known exactly, and the same seed gives the same video again. Background and needles draw from
separate random streams: a plan without its needles (`dataclasses.replace(video, needles=[])`) renders the same
background.
"""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont


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

# A needle is visible when it lasts as long as the gap between two sampled frames: at most 2 a second, here 64 in all.
SAMPLES_PER_SECOND = 2.0
SAMPLES_PER_VIDEO = 64

NEEDLE_SIZES = (0.30, 0.45)  # of the frame's shorter side
OUTLINE = 0.06  # of the needle's size, drawn around it
SUPERSAMPLE = 4

SOFT_PATTERNS = ("gradient", "noise", "grain", "blobs")
LINE_PATTERNS = ("stripes", "checks")


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

    `size` is (height, width) in pixels, `fps` the file's frame rate, `path` the file once it is written.
    """

    seed: int
    num_frames: int
    fps: float
    size: tuple[int, int]
    needles: list[Needle]
    path: Path | None = None

    @property
    def duration(self) -> float:
        """Length in seconds."""
        return self.num_frames / self.fps


def write_needle_video(
    path: str | os.PathLike,
    seed: int,
    *,
    duration: float = 32.0,
    fps: float = 2.0,
    size: tuple[int, int] = (128, 128),
    needle_seconds: float | None = None,
) -> NeedleVideo:
    """Write an MP4 file (H.264) with one needle in it and return its ground truth.

    The file appears under its name only when it is complete.

    Args:
        path: the file to write.
        seed: non-negative; decides background, needle, time and place.
        duration: length in seconds.
        fps: the file's frame rate.
        size: (height, width) in pixels, even numbers.
        needle_seconds: how long the needle is shown, rounded up to whole frames. By default one to three times the gap
            between sampled frames, for a sampling at 2 frames a second and at most 64 frames.

    Raises:
        ValueError: for a setting that no video can have.
    """
    path = Path(path)
    video = _plan(seed, duration, fps, size, needle_seconds, path)
    _encode(path, render_frames(video), video)
    return video


def needle_image(seed: int, size: tuple[int, int] = (128, 128)) -> tuple[Image.Image, Needle]:
    """A still of `size` (height, width) with a needle in it, and that needle. Deterministic in `seed`."""
    video = _plan(seed, 1.0, 1.0, size, 1.0, None)
    return next(render_frames(video)), video.needles[0]


def questions(video: NeedleVideo) -> list[tuple[str, str]]:
    """Every question about a video of one needle, in all its wordings, with its answer (one lowercase word)."""
    if len(video.needles) != 1:
        raise ValueError(
            f"questions are about a video of one needle, this one has {len(video.needles)}; give one needle."
        )
    return needle_questions(video.needles[0], "video")


def needle_questions(needle: Needle, medium: str) -> list[tuple[str, str]]:
    """The questions about `needle` in a "video" or an "image": those about what it is, then those about its colour."""
    asked = [(wording, needle.value) for wording in QUESTIONS[needle.kind]]
    asked += [(wording, needle.colour) for wording in QUESTIONS["colour"]]
    return [(wording.format(medium=medium, kind=needle.kind), answer) for wording, answer in asked]


def render_frames(video: NeedleVideo) -> Iterator[Image.Image]:
    """The frames of `video` in order, RGB, before encoding."""
    glyphs = [(needle, _glyph(needle, min(video.size))) for needle in video.needles]
    shots = _shots(video)
    shot_end = 0.0
    for index in range(video.num_frames):
        time = index / video.fps
        if time >= shot_end:
            shot, shot_end = next((shot, end) for shot, end in shots if time < end)
            scene = Scene(_rng(video.seed, _SCENE, shot), video.size)
        frame = scene.render(time)
        for needle, glyph in glyphs:
            # Half a frame of slack keeps rounding of the times from moving an edge by a frame.
            if needle.start <= time + 0.5 / video.fps < needle.start + needle.duration:
                left = round(needle.x * video.size[1] - glyph.width / 2)
                top = round(needle.y * video.size[0] - glyph.height / 2)
                frame.paste(glyph, (left, top), glyph)
        yield frame


# --- Planning

_NEEDLE, _CUTS, _SCENE = range(3)  # random streams of one seed


def _rng(seed: int, stream: int, index: int = 0) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(stream, index)))


def _plan(
    seed: int,
    duration: float,
    fps: float,
    size: tuple[int, int],
    needle_seconds: float | None,
    path: Path | None,
) -> NeedleVideo:
    if seed < 0:
        raise ValueError(f"seed must not be negative, got {seed}; give 0 or more.")
    if not 0 < fps <= 240:
        raise ValueError(f"fps must be above 0 and at most 240, got {fps}; give the file's frames per second.")
    if not (math.isfinite(duration) and round(duration * fps) >= 1):
        raise ValueError(f"duration {duration} s holds no frame at {fps} fps; give a longer one.")
    if len(size) != 2 or any(side < 32 or side % 2 for side in size):
        raise ValueError(
            f"size must be (height, width), both even and at least 32, got {tuple(size)}; give e.g. (128, 128)."
        )
    num_frames = round(duration * fps)
    rng = _rng(seed, _NEEDLE)
    if needle_seconds is None:
        gap = max(duration / SAMPLES_PER_VIDEO, 1 / SAMPLES_PER_SECOND)
        needle_seconds = min(gap * int(rng.integers(1, 4)), duration)
    if not 0 < needle_seconds <= duration:
        raise ValueError(
            f"needle_seconds must be above 0 and at most the duration ({duration} s), got {needle_seconds}; "
            "leave it out for a needle that sampling meets."
        )
    needle_frames = min(math.ceil(round(needle_seconds * fps, 6)), num_frames)
    start_frame = int(rng.integers(num_frames - needle_frames + 1))
    needle = _random_needle(rng, size, start_frame / fps, needle_frames / fps)
    return NeedleVideo(seed, num_frames, float(fps), tuple(size), [needle], path)


def _random_needle(rng: np.random.Generator, size: tuple[int, int], start: float, duration: float) -> Needle:
    kind = ("shape", "digit")[rng.integers(2)]
    value = str(rng.choice(SHAPES if kind == "shape" else DIGITS))
    colour = str(rng.choice(list(COLOURS)))
    extent = rng.uniform(*NEEDLE_SIZES)
    # The whole glyph with its outline stays inside the frame.
    margin_y, margin_x = (0.5 * extent * (1 + 2 * OUTLINE) * min(size) / side for side in size)
    x, y = rng.uniform(margin_x, 1 - margin_x), rng.uniform(margin_y, 1 - margin_y)
    return Needle(kind, value, colour, start, duration, float(x), float(y), float(extent), bool(rng.random() < 0.5))


def _shots(video: NeedleVideo) -> Iterator[tuple[int, float]]:
    """(number, end in seconds) of every shot. A video is calm or busy: its mean shot is 2 s to half the video long."""
    rng = _rng(video.seed, _CUTS)
    mean = 2.0 * max(video.duration / 4, 1.0) ** rng.random()
    end, shot = 0.0, 0
    while True:
        end += mean * rng.uniform(0.5, 1.5)
        yield shot, end
        shot += 1


# --- Background


class Scene:
    """One shot: a texture under a moving camera, at times a second one drifting in front of it, in changing light."""

    def __init__(self, rng: np.random.Generator, size: tuple[int, int]):
        self.layers = [Layer(_texture(rng, size), rng, size)]
        if rng.random() < 0.4:
            front = _texture(rng, size)
            front.putalpha(_cloud_mask(rng, front.width))
            self.layers.append(Layer(front, rng, size))
        self.tint = rng.uniform(0.8, 1.1, 3)
        self.light = Wave(rng, amplitude=rng.choice([0.05, 0.3]), seconds=(1.5, 20))

    def render(self, time: float) -> Image.Image:
        frame = self.layers[0].render(time)
        for layer in self.layers[1:]:
            front = layer.render(time)
            frame.paste(front, mask=front.getchannel("A"))
        gain = self.tint * (1 + self.light(time))
        levels = np.clip(gain[:, None] * np.arange(256), 0, 255).astype(np.uint8)
        return frame.point(levels.reshape(-1).tolist())


class Layer:
    """A square texture larger than the frame, seen through a window that pans, zooms and sways over it."""

    def __init__(self, texture: Image.Image, rng: np.random.Generator, size: tuple[int, int]):
        self.texture, self.size = texture, size
        reach = math.hypot(*size) / 2
        self.scale = rng.uniform(0.55, 0.75)  # texture pixels a frame pixel; the zoom below adds at most a fifth
        self.angle = rng.uniform(0, 2 * math.pi)
        slack = texture.width / 2 - 1.2 * self.scale * reach - 1
        self.pan_x, self.pan_y = (Wave(rng, amplitude=slack * rng.uniform(0.3, 0.7), seconds=(6, 40)) for _ in "xy")
        self.zoom = Wave(rng, amplitude=rng.choice([0.02, 0.2]), seconds=(4, 30))
        self.sway = Wave(rng, amplitude=rng.choice([0.02, 0.3]), seconds=(5, 40))

    def render(self, time: float) -> Image.Image:
        scale, angle = self.scale * (1 + self.zoom(time)), self.angle + self.sway(time)
        cos, sin = scale * math.cos(angle), scale * math.sin(angle)
        (height, width), middle = self.size, self.texture.width / 2
        left = middle + self.pan_x(time) - cos * width / 2 + sin * height / 2
        top = middle + self.pan_y(time) - sin * width / 2 - cos * height / 2
        window = (cos, -sin, left, sin, cos, top)
        return self.texture.transform((width, height), Image.Transform.AFFINE, window, Image.Resampling.BILINEAR)


class Wave:
    """A sine in time, its period of `seconds` (low, high) and its phase random: motion that never leaves its range."""

    def __init__(self, rng: np.random.Generator, amplitude: float, seconds: tuple[float, float]):
        self.amplitude = amplitude
        self.rate = 2 * math.pi / rng.uniform(*seconds)
        self.phase = rng.uniform(0, 2 * math.pi)

    def __call__(self, time: float) -> float:
        return self.amplitude * math.sin(self.rate * time + self.phase)


def _texture(rng: np.random.Generator, size: tuple[int, int]) -> Image.Image:
    """A square RGB texture, large enough for the camera of a frame of `size`: one or two patterns in a few colours."""
    side = math.ceil(1.3 * math.hypot(*size))
    field = _pattern(rng, side, SOFT_PATTERNS + LINE_PATTERNS)
    if rng.random() < 0.5:
        # Lines over lines would draw cells and dots, so the second pattern is a soft one.
        field = field + rng.uniform(0.2, 0.8) * _pattern(rng, side, SOFT_PATTERNS)
    field = (field - field.min()) * (255 / np.ptp(field))
    texture = Image.fromarray(field.astype(np.uint8))  # the pattern as palette indices
    texture = Image.frombytes("P", texture.size, texture.tobytes())
    texture.putpalette(_palette(rng).tobytes())
    return texture.convert("RGB")


def _palette(rng: np.random.Generator) -> np.ndarray:
    """256 colours (256, 3) that run through two to four random ones, vivid or muted, dark or bright."""
    stops = int(rng.integers(2, 5))
    grey = rng.uniform(0, 255, (stops, 1))
    colours = grey + rng.uniform(0.1, 1.0) * (rng.uniform(0, 255, (stops, 3)) - grey)
    ramp = np.linspace(0, stops - 1, 256)
    return np.stack([np.interp(ramp, range(stops), channel) for channel in colours.T], axis=1).astype(np.uint8)


def _pattern(rng: np.random.Generator, side: int, kinds: tuple[str, ...]) -> np.ndarray:
    """A random pattern (side, side) with values of order one. None draws figures that could pass for a needle."""
    kind = rng.choice(kinds)
    if kind == "noise":
        return sum(_noise(rng, side, cells) * cells**-0.7 for cells in (3, 6, 12, 24)) * 2
    if kind == "grain":
        return _noise(rng, side, int(rng.integers(30, 90)))
    if kind == "blobs":
        return np.tanh(rng.uniform(3, 12) * (_noise(rng, side, int(rng.integers(2, 7)), stretch=3) - 0.5))
    angle = rng.uniform(0, 2 * math.pi)
    line = np.linspace(-1, 1, side, dtype=np.float32)
    x = math.cos(angle) * line[None, :] + math.sin(angle) * line[:, None]
    x += rng.uniform(0.05, 0.6) * _noise(rng, side, int(rng.integers(2, 6)))
    if kind == "gradient":
        return x
    sharpness = rng.uniform(0.5, 6)
    stripes = np.tanh(sharpness * np.sin(rng.uniform(10, 40) * x))
    if kind == "stripes":
        return stripes
    # Checks are skewed, bent and longer than wide, so that no square or diamond comes out.
    y = math.cos(angle + 0.9) * line[None, :] + math.sin(angle + 0.9) * line[:, None]
    return stripes * np.tanh(sharpness * np.sin(rng.uniform(3, 5) * y))


def _noise(rng: np.random.Generator, side: int, cells: int, stretch: int = 1) -> np.ndarray:
    """Smooth noise (side, side) in about 0..1: `cells` bumps in its width, each `stretch` times wider than high."""
    grid = Image.fromarray(rng.random((stretch * cells + 1, cells + 1), dtype=np.float32))
    return np.asarray(grid.resize((side, side), Image.Resampling.BICUBIC))


def _cloud_mask(rng: np.random.Generator, side: int) -> Image.Image:
    """An alpha channel (side, side) of soft patches."""
    cover = 1 / (1 + np.exp(-rng.uniform(10, 30) * (_noise(rng, side, int(rng.integers(2, 5)), stretch=2) - 0.6)))
    return Image.fromarray((255 * cover).astype(np.uint8))


# --- Needles


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


def _encode(path: Path, frames: Iterator[Image.Image], video: NeedleVideo) -> None:
    """Write `frames` as H.264 in MP4, under a temporary name beside `path` until the file is complete."""
    rate = Fraction(video.fps).limit_denominator(1001)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with av.open(str(partial), "w", format="mp4") as container:
            stream = container.add_stream("libx264", rate=rate)
            stream.height, stream.width = video.size
            stream.pix_fmt = "yuv420p"
            stream.codec_context.gop_size = min(max(round(4 * video.fps), 12), 60)
            stream.codec_context.thread_count = (
                1  # frames this small gain nothing from more, and the file stays the same
            )
            stream.options = {"preset": "superfast", "crf": "24"}
            for frame in frames:
                container.mux(stream.encode(av.VideoFrame.from_image(frame)))
            container.mux(stream.encode())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
