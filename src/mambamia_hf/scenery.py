"""What is behind the needles: moving textures made from a seed, or the pictures of a video file.

A picture is a list of three planes, as in YUV 4:2:0: brightness (height, width) and two of colour, half as high and
wide. Video files hold pictures like this, so that nothing needs to be converted on the way to the encoder.
"""

import math
import os
from collections.abc import Callable, Iterator
from functools import cache, cached_property, lru_cache
from string import ascii_lowercase

import av
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from .video_decoding import TimedVideoMetadata, decode_video


Planes = list[Image.Image]

_LEVELS = np.arange(256)

SOFT_PATTERNS = ("gradient", "fractal", "noise", "grain", "blobs")
LINE_PATTERNS = ("stripes", "checks", "print")
MAX_TEXTURES = 24

# Of a longer clip this much is shown, and no more of it is held in memory.
MAX_CLIP_SECONDS = 600.0
MAX_CLIP_BYTES = 400e6


def rgb_to_yuv(colours: np.ndarray) -> np.ndarray:
    """Colours (..., 3) from RGB to YUV (BT.601, limited range, as in most files), both 0 to 255."""
    matrix = np.array([[65.738, 129.057, 25.064], [-37.945, -74.494, 112.439], [112.439, -94.154, -18.285]]) / 256
    return colours @ matrix.T + (16, 128, 128)


def to_frame(planes: Planes) -> av.VideoFrame:
    width, height = planes[0].size
    samples = np.frombuffer(b"".join(plane.tobytes() for plane in planes), np.uint8)
    return av.VideoFrame.from_ndarray(samples.reshape(height * 3 // 2, width), "yuv420p")


def to_image(planes: Planes) -> Image.Image:
    """The picture in RGB."""
    bands = (
        plane.resize(planes[0].size, Image.Resampling.NEAREST).point(levels)
        for plane, levels in zip(planes, _full_range(), strict=True)
    )
    return Image.merge("YCbCr", list(bands)).convert("RGB")


@cache
def _full_range() -> list[list[int]]:
    """For each plane, what Pillow calls the levels that video files hold."""
    brightness, colour = np.clip([(_LEVELS - 16) * 255 / 219, (_LEVELS - 128) * 255 / 224 + 128], 0, 255).round()
    return [brightness.astype(int).tolist(), *2 * [colour.astype(int).tolist()]]


class Stamp:
    """An RGBA image that is put onto pictures, with its upper left corner at (left, top)."""

    def __init__(self, image: Image.Image, left: int, top: int):
        # A pixel of colour covers two by two of brightness, counted from the frame's corner.
        self.corner = left - left % 2, top - top % 2
        whole = Image.new("RGBA", tuple(2 * math.ceil((side + 1) / 2) for side in image.size))
        whole.paste(image, (left % 2, top % 2))
        pixels = np.asarray(whole)
        planes = np.moveaxis(rgb_to_yuv(pixels[..., :3]).round().astype(np.uint8), 2, 0)
        brightness, *colours = (Image.fromarray(plane) for plane in planes)
        alpha = Image.fromarray(pixels[..., 3])
        self.planes = [brightness, *(colour.reduce(2) for colour in colours)]
        self.masks = [alpha, alpha.reduce(2), alpha.reduce(2)]

    def paste_onto(self, planes: Planes) -> None:
        left, top = self.corner
        for plane, stamp, mask, step in zip(planes, self.planes, self.masks, (1, 2, 2), strict=True):
            plane.paste(stamp, (left // step, top // step), mask)


# --- Video files


def render_clip(
    path: str | os.PathLike, rng: np.random.Generator, size: tuple[int, int], times: np.ndarray
) -> Iterator[Planes]:
    """The pictures of a video file at `times` (seconds, ascending) from a random point on, as frames of `size`.

    What does not fit the frame's shape is cut off. The clip, or a random part of a long one, is shown in a loop.
    """
    height, width = size

    def choose_frames(metadata: TimedVideoMetadata) -> np.ndarray:
        nonlocal wanted
        length = min(metadata.duration, MAX_CLIP_SECONDS)
        start, offset = rng.random(2) * (metadata.duration - length, length)
        shown = start + (offset + times) % length
        wanted = np.maximum(np.searchsorted(metadata.frame_timestamps, shown, side="right") - 1, 0)
        numbers = np.unique(wanted)
        return numbers[:: math.ceil(len(numbers) * height * width * 1.5 / MAX_CLIP_BYTES)]

    def resize(frame: torch.Tensor) -> torch.Tensor:
        scale = min(frame.shape[1] / height, frame.shape[2] / width)
        rows, columns = round(scale * height), round(scale * width)
        top, left = (frame.shape[1] - rows) // 2, (frame.shape[2] - columns) // 2
        frame = frame[None, :, top : top + rows, left : left + columns]
        frame = torch.nn.functional.interpolate(frame, size, mode="bilinear", antialias=True)[0]
        frame = av.VideoFrame.from_ndarray(frame.permute(1, 2, 0).contiguous().numpy(), "rgb24")
        return torch.from_numpy(frame.to_ndarray(format="yuv420p"))

    wanted = None
    frames, metadata = decode_video(path, choose_frames, resize)
    numbers = np.array(metadata.frames_indices)
    for index in np.maximum(np.searchsorted(numbers, wanted, side="right") - 1, 0):
        brightness, colours = frames[index].numpy()[:height], frames[index].numpy()[height:]
        yield [Image.fromarray(plane) for plane in (brightness, *colours.reshape(2, height // 2, width // 2))]


# --- Textures


class Texture:
    """A square picture, large enough for the camera of a frame of `size`. Brightness has double the resolution."""

    def __init__(self, rng: np.random.Generator, size: tuple[int, int]):
        self.side = 32 * math.ceil(1.4 * math.hypot(*size) / 32)
        self.mask_rng = rng
        if rng.random() < 0.3:
            index, palette = _field(rng, self.side), _palette(rng)
        else:
            index, palette = _leaves(rng, self.side), rng.permutation(_palette(rng))
        # Surfaces differ in how rough they are and in how the light falls on them.
        roughness = rng.exponential(rng.uniform(0.02, 0.3), 256)
        shading = rng.normal(0, rng.uniform(0, 0.7), 256)
        brightness, *colours = rgb_to_yuv(palette).T
        brightness = brightness.astype(np.float32)[index]
        brightness *= (
            1
            + roughness.astype(np.float32)[index] * _pattern(rng, self.side, SOFT_PATTERNS + LINE_PATTERNS)
            + shading.astype(np.float32)[index] * (_noise(rng, self.side, int(rng.integers(2, 7))) - 0.5)
        )
        contrast = rng.uniform(8, 75) / max(brightness.std(), 1)
        brightness = rng.uniform(50, 190) + contrast * (brightness - brightness.mean())
        brightness = Image.fromarray(np.clip(brightness, 16, 235).astype(np.uint8))
        if rng.random() < 0.15:
            blur = int(rng.integers(2, 8))  # by motion
            brightness = brightness.filter(ImageFilter.BoxBlur((blur, 0) if rng.random() < 0.7 else (0, blur)))
        else:
            brightness = brightness.filter(ImageFilter.GaussianBlur(rng.exponential(0.8)))
        # Frames take the nearest pixel, which is only as good as a mean of several where pixels are small.
        brightness = brightness.resize((2 * self.side, 2 * self.side), Image.Resampling.BILINEAR)
        self.planes = [
            brightness,
            *(Image.fromarray(np.clip(colour, 16, 240).astype(np.uint8)[index]) for colour in colours),
        ]

    @cached_property
    def mask(self) -> Image.Image:
        """Patches with edges from soft to hard, where the texture is in front of another."""
        rng = self.mask_rng
        cells = int(rng.integers(2, 6))
        grid = Image.fromarray(rng.integers(0, 256, (2 * cells + 1, cells + 1), dtype=np.uint8))
        sharpness = rng.uniform(10, 100)
        cover = 255 / (1 + np.exp(-sharpness * (_LEVELS / 255 - 0.6)))
        return grid.resize((self.side, self.side), Image.Resampling.BICUBIC).point(cover.astype(int).tolist())


def _field(rng: np.random.Generator, side: int) -> np.ndarray:
    """One or two patterns over each other as levels (side, side)."""
    field = _pattern(rng, side, SOFT_PATTERNS + LINE_PATTERNS)
    if rng.random() < 0.5:
        # Lines over lines would draw cells and dots, so the second pattern is a soft one.
        field = field + rng.uniform(0.2, 0.8) * _pattern(rng, side, SOFT_PATTERNS)
    return ((field - field.min()) * (255 / np.ptp(field))).astype(np.uint8)


def _leaves(rng: np.random.Generator, side: int) -> np.ndarray:
    """Irregular patches that cover each other, as levels (side, side): few large ones, many small ones in front.

    Pictures of the real world have such hard edges at all scales. None has an outline, so none passes for a needle.
    """
    count = int(rng.integers(30, 250))
    smallest, largest = rng.uniform(0.01, 0.03), math.exp(rng.uniform(math.log(0.1), math.log(0.5)))
    radius = (smallest**-2 + rng.random(count) * (largest**-2 - smallest**-2)) ** -0.5
    radius = side * radius[np.argsort(-radius * rng.uniform(0.3, 1, count))]
    if rng.random() < 0.5:
        corners = int(rng.integers(4, 9))
        turns = (np.arange(corners) + rng.uniform(0, 0.8, (count, corners))) * (2 * math.pi / corners)
        reach = radius[:, None] * rng.uniform(0.6, 1.2, (count, corners))
    else:
        turns = np.linspace(0, 2 * math.pi, 24)[None]
        reach = radius[:, None] * (
            1
            + sum(
                rng.uniform(0, 0.3, (count, 1)) * np.cos(k * turns + rng.uniform(0, 6, (count, 1))) for k in (2, 3, 5)
            )
        )
    stretch = rng.uniform(1.1, 2.5, (count, 1)) ** 0.5
    x, y = reach * np.cos(turns) * stretch, reach * np.sin(turns) / stretch
    upright = rng.random(count) < 0.5
    tilt = np.where(upright, rng.integers(0, 2, count) * math.pi / 2, rng.uniform(0, math.pi, count))[:, None]
    centre = rng.uniform(0, side, (2, count, 1))
    points = np.stack([np.cos(tilt) * x - np.sin(tilt) * y, np.sin(tilt) * x + np.cos(tilt) * y]) + centre
    image = Image.fromarray(_field(rng, side) // 64)
    draw = ImageDraw.Draw(image)
    for level, corner in enumerate(points.transpose(1, 2, 0).reshape(count, -1).tolist(), start=1):
        draw.polygon(corner, fill=level % 256)
    return np.asarray(image)


def _palette(rng: np.random.Generator) -> np.ndarray:
    """256 colours (256, 3) that run through two to four random ones, vivid or muted, dark or bright."""
    stops = int(rng.integers(2, 5))
    grey = rng.uniform(0, 255, (stops, 1))
    colours = grey + rng.uniform(0.3, 1.0) ** 2 * (rng.uniform(0, 255, (stops, 3)) - grey)
    ramp = np.linspace(0, stops - 1, 256)
    return np.stack([np.interp(ramp, range(stops), channel) for channel in colours.T], axis=1)


def _pattern(rng: np.random.Generator, side: int, kinds: tuple[str, ...]) -> np.ndarray:
    """A random pattern (side, side) with values of order one. None draws figures that could pass for a needle."""
    kind = rng.choice(kinds)
    if kind == "fractal":
        return _fractal(rng, side, rng.uniform(0.7, 1.8))
    if kind == "noise":
        return sum(_noise(rng, side, cells) * cells**-0.7 for cells in (3, 6, 12, 24)) * 2
    if kind == "grain":
        return _noise(rng, side, int(rng.integers(30, 90)))
    if kind == "blobs":
        return np.tanh(rng.uniform(3, 12) * (_noise(rng, side, int(rng.integers(2, 7)), stretch=3) - 0.5))
    if kind == "print":
        return _print(rng, side)
    angle = rng.uniform(0, 2 * math.pi)
    line = np.linspace(-1, 1, side, dtype=np.float32)
    x = math.cos(angle) * line[None, :] + math.sin(angle) * line[:, None]
    x += np.float32(rng.uniform(0.05, 0.6)) * _noise(rng, side, int(rng.integers(2, 6)))
    if kind == "gradient":
        return x
    sharpness = np.float32(rng.uniform(0.5, 6))
    stripes = np.tanh(sharpness * np.sin(np.float32(rng.uniform(10, 40)) * x))
    if kind == "stripes":
        return stripes
    # Checks are skewed, bent and longer than wide, so that no square or diamond comes out.
    y = math.cos(angle + 0.9) * line[None, :] + math.sin(angle + 0.9) * line[:, None]
    return stripes * np.tanh(sharpness * np.sin(np.float32(rng.uniform(3, 5)) * y))


def _noise(rng: np.random.Generator, side: int, cells: int, stretch: int = 1) -> np.ndarray:
    """Smooth noise (side, side) in about 0..1: `cells` bumps in its width, each `stretch` times wider than high."""
    grid = Image.fromarray(rng.random((stretch * cells + 1, cells + 1), dtype=np.float32))
    return np.asarray(grid.resize((side, side), Image.Resampling.BICUBIC))


def _fractal(rng: np.random.Generator, side: int, exponent: float) -> np.ndarray:
    """Noise (side, side) whose amplitudes fall with the frequency to the `exponent`, as in pictures of nature."""
    amplitude = _frequencies(side) ** np.float32(-exponent)
    amplitude[0, 0] = 0
    real, imaginary = rng.standard_normal((2, *amplitude.shape), dtype=np.float32)
    field = np.fft.irfft2(amplitude * (real + 1j * imaginary), s=(side, side)).astype(np.float32)
    return field / field.std()


@lru_cache(maxsize=4)
def _frequencies(side: int) -> np.ndarray:
    rows, columns = np.fft.fftfreq(side, 1 / side), np.fft.rfftfreq(side, 1 / side)
    return np.maximum(np.hypot(rows[:, None], columns[None, :]), 1).astype(np.float32)


def _print(rng: np.random.Generator, side: int) -> np.ndarray:
    """Lines of small marks in words (side, side), like a printed page seen from afar."""
    mark = int(rng.integers(1, 1 + max(2, side // 128)))  # pixels of a dot of the marks
    rows, columns = side // (7 * mark) + 1, side // (4 * mark) + 1
    dots = rng.random((rows, 7, columns, 4)) < 0.55
    dots[:, 5:] = False
    dots[..., 3] = False
    dots &= (rng.random((rows, columns)) < 0.85)[:, None, :, None]
    page = Image.fromarray(255 * dots.reshape(7 * rows, 4 * columns).astype(np.uint8))
    page = page.resize((mark * page.width, mark * page.height), Image.Resampling.BILINEAR)
    return np.asarray(page.crop((0, 0, side, side)), np.float32) / 255


# --- Moving textures


def render_scenes(seeds: np.random.SeedSequence, size: tuple[int, int], times: np.ndarray) -> Iterator[Planes]:
    """Pictures of `size` at `times` (seconds, ascending): shots that return to a few places."""

    def stream(kind: int, index: int = 0) -> np.random.Generator:
        return np.random.default_rng(np.random.SeedSequence(seeds.entropy, spawn_key=(*seeds.spawn_key, kind, index)))

    @cache
    def texture(index: int) -> Texture:
        return Texture(stream(0, index), size)

    def some_texture(rng: np.random.Generator) -> Texture:
        return texture(int(rng.integers(num_textures)))

    num_textures = min(2 + len(times) // 48, MAX_TEXTURES)
    cuts = stream(1)
    # A video is calm or busy: a shot lasts 2 s to half the video on average.
    mean = 2.0 * max(times[-1] / 4, 1.0) ** cuts.random()
    shot, end = -1, 0.0
    for time in times:
        if time >= end:
            while time >= end:
                shot, end = shot + 1, end + mean * cuts.uniform(0.5, 1.5)
            scene = Scene(stream(2, shot), size, some_texture)
        yield scene.render(time)


class Scene:
    """One shot: a texture under a moving camera, at times a second one drifting in front of it, in changing light."""

    def __init__(
        self, rng: np.random.Generator, size: tuple[int, int], draw_texture: Callable[[np.random.Generator], Texture]
    ):
        self.back = Layer(draw_texture(rng), rng, size)
        self.front = Layer(draw_texture(rng), rng, size) if rng.random() < 0.4 else None
        self.exposure = rng.uniform(0.7, 1.2)
        self.light = Wave(rng, amplitude=rng.choice([0.05, 0.3]), seconds=(1.5, 20))
        self.caption = _caption(rng, size) if rng.random() < 0.2 else None

    def render(self, time: float) -> Planes:
        planes = self.back.render(time)
        if self.front is not None:
            masks = self.front.render_masks(time)
            for plane, front, mask in zip(planes, self.front.render(time), masks, strict=True):
                plane.paste(front, mask=mask)
        gain = self.exposure * (1 + self.light(time))
        planes = [
            Image.frombytes("L", plane.size, plane.tobytes().translate(levels))
            for plane, levels in zip(planes, _levels(round(gain, 2)), strict=True)
        ]
        if self.caption is not None:
            self.caption.paste_onto(planes)
        return planes


def _caption(rng: np.random.Generator, size: tuple[int, int]) -> Stamp:
    """Words of random letters, far smaller than a needle, at the top or the bottom of a frame of `size`."""
    font = ImageFont.load_default(max(6, round(rng.uniform(0.05, 0.09) * min(size))))
    words = ["".join(rng.choice(list(ascii_lowercase), length)) for length in rng.integers(2, 9, rng.integers(1, 7))]
    lines = " ".join(words[:3]), " ".join(words[3:])
    ink, edge = [(255, 255, 255), (20, 20, 20)][:: rng.choice([1, -1])]
    image = Image.new("RGBA", (size[1], size[0]), (*edge, 0))
    place, anchor = [(0.03, "ma"), (0.97, "md")][rng.integers(2)]
    ImageDraw.Draw(image).text(
        (size[1] / 2, place * size[0]),
        "\n".join(filter(None, lines)),
        (*ink, 255),
        font,
        anchor,
        align="center",
        stroke_width=int(rng.integers(2)),
        stroke_fill=(*edge, 255),
    )
    left, top, right, bottom = image.getbbox()
    return Stamp(image.crop((left, top, right, bottom)), left, top)


@lru_cache(maxsize=256)
def _levels(gain: float) -> list[bytes]:
    """For each plane, the levels 0 to 255 after the light has changed by a factor."""
    brightness = np.clip(16 + gain * (_LEVELS - 16), 16, 235).astype(np.uint8).tobytes()
    colour = np.clip(128 + gain * (_LEVELS - 128), 16, 240).astype(np.uint8).tobytes()
    return [brightness, colour, colour]


class Layer:
    """A texture seen through a window that pans, zooms and sways over it."""

    def __init__(self, texture: Texture, rng: np.random.Generator, size: tuple[int, int]):
        self.texture, self.size = texture, size
        reach = math.hypot(*size) / 2
        self.scale = rng.uniform(0.65, 1.0)  # texture pixels a frame pixel; the zoom below adds at most a fifth
        # Cameras are mostly held upright.
        self.angle = rng.normal(0, 0.1) if rng.random() < 0.6 else rng.uniform(0, 2 * math.pi)
        slack = texture.side / 2 - 1.2 * self.scale * reach - 1
        slack *= rng.choice([0.05, 1.0], p=[0.25, 0.75])
        self.pan_x, self.pan_y = (Wave(rng, amplitude=slack * rng.uniform(0.3, 1.0), seconds=(6, 40)) for _ in "xy")
        self.zoom = Wave(rng, amplitude=rng.choice([0.02, 0.2]), seconds=(4, 30))
        self.sway = Wave(rng, amplitude=rng.choice([0.02, 0.3]), seconds=(5, 40))

    def render(self, time: float) -> Planes:
        window = self._window(time)
        return [self._look_at(plane, window, step) for plane, step in zip(self.texture.planes, (1, 2, 2), strict=True)]

    def render_masks(self, time: float) -> Planes:
        """Where the layer covers what is behind it, for each plane."""
        window = self._window(time)
        whole, half = (self._look_at(self.texture.mask, window, step) for step in (1, 2))
        return [whole, half, half]

    def _window(self, time: float) -> tuple[float, ...]:
        """What takes frame coordinates to texture coordinates: x = a·u + b·v + c, y = d·u + e·v + f."""
        scale, angle = self.scale * (1 + self.zoom(time)), self.angle + self.sway(time)
        cos, sin = scale * math.cos(angle), scale * math.sin(angle)
        (height, width), middle = self.size, self.texture.side / 2
        left = middle + self.pan_x(time) - cos * width / 2 + sin * height / 2
        top = middle + self.pan_y(time) - sin * width / 2 - cos * height / 2
        return cos, -sin, left, sin, cos, top

    def _look_at(self, image: Image.Image, window: tuple[float, ...], step: int) -> Image.Image:
        """What the frame, or every `step`-th pixel of it, sees of an image of the texture."""
        fine = image.width / self.texture.side
        a, b, c, d, e, f = (fine * value for value in window)
        height, width = self.size
        coefficients = (step * a, step * b, c, step * d, step * e, f)
        return image.transform((width // step, height // step), Image.Transform.AFFINE, coefficients)


class Wave:
    """A sine in time, its period of `seconds` (low, high) and its phase random: motion that never leaves its range."""

    def __init__(self, rng: np.random.Generator, amplitude: float, seconds: tuple[float, float]):
        self.amplitude = amplitude
        self.rate = 2 * math.pi / rng.uniform(*seconds)
        self.phase = rng.uniform(0, 2 * math.pi)

    def __call__(self, time: float) -> float:
        return self.amplitude * math.sin(self.rate * time + self.phase)
