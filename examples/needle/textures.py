"""Random textures: what the camera of a background looks at.

They have the statistics of natural pictures that matter here (edges at all scales, smooth and rough surfaces, printed
pages) and no figure that could pass for a needle.
"""

import math
from functools import cached_property, lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from .pictures import LEVELS, rgb_to_yuv


SOFT_PATTERNS = ("gradient", "fractal", "noise", "grain", "blobs")
LINE_PATTERNS = ("stripes", "checks", "print")


class Texture:
    """A square picture, large enough for the camera of a frame of `size` (height, width).

    `planes` are as in `pictures.Planes`, except that brightness has double the resolution.
    """

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
        # The camera takes the nearest pixel. At double resolution this is nearly as good as interpolation.
        brightness = brightness.resize((2 * self.side, 2 * self.side), Image.Resampling.BILINEAR)
        self.planes = [
            brightness,
            *(Image.fromarray(np.clip(colour, 16, 240).astype(np.uint8)[index]) for colour in colours),
        ]

    @cached_property
    def mask(self) -> Image.Image:
        """Patches, with edges from soft to hard, in which the texture covers another one behind it."""
        rng = self.mask_rng
        cells = int(rng.integers(2, 6))
        grid = Image.fromarray(rng.integers(0, 256, (2 * cells + 1, cells + 1), dtype=np.uint8))
        sharpness = rng.uniform(10, 100)
        cover = 255 / (1 + np.exp(-sharpness * (LEVELS / 255 - 0.6)))
        return grid.resize((self.side, self.side), Image.Resampling.BICUBIC).point(cover.astype(int).tolist())


def _field(rng: np.random.Generator, side: int) -> np.ndarray:
    """One pattern or the sum of two, as levels `(side, side)`."""
    field = _pattern(rng, side, SOFT_PATTERNS + LINE_PATTERNS)
    if rng.random() < 0.5:
        # Lines over lines would draw cells and dots, so the second pattern is a soft one.
        field = field + rng.uniform(0.2, 0.8) * _pattern(rng, side, SOFT_PATTERNS)
    return ((field - field.min()) * (255 / np.ptp(field))).astype(np.uint8)


def _leaves(rng: np.random.Generator, side: int) -> np.ndarray:
    """Irregular patches that cover each other, as levels `(side, side)`: few large ones, many small ones in front.

    Natural pictures have such hard edges at all scales. No patch has an outline, so none passes for a needle.
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
    """A ramp of colours `(256, 3)` through two to four random ones, vivid or muted, dark or bright."""
    stops = int(rng.integers(2, 5))
    grey = rng.uniform(0, 255, (stops, 1))
    colours = grey + rng.uniform(0.3, 1.0) ** 2 * (rng.uniform(0, 255, (stops, 3)) - grey)
    ramp = np.linspace(0, stops - 1, 256)
    return np.stack([np.interp(ramp, range(stops), channel) for channel in colours.T], axis=1)


def _pattern(rng: np.random.Generator, side: int, kinds: tuple[str, ...]) -> np.ndarray:
    """A random pattern `(side, side)` with values of order one. None draws figures that could pass for a needle."""
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
    """Smooth noise `(side, side)` in about 0..1: `cells` bumps across, each `stretch` times wider than high."""
    grid = Image.fromarray(rng.random((stretch * cells + 1, cells + 1), dtype=np.float32))
    return np.asarray(grid.resize((side, side), Image.Resampling.BICUBIC))


def _fractal(rng: np.random.Generator, side: int, exponent: float) -> np.ndarray:
    """Noise `(side, side)` with amplitudes proportional to `frequency ** -exponent`, as in natural pictures."""
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
    """Lines of small marks `(side, side)`, grouped into words like a printed page seen from afar."""
    mark = int(rng.integers(1, 1 + max(2, side // 128)))  # pixels of a dot of the marks
    rows, columns = side // (7 * mark) + 1, side // (4 * mark) + 1
    dots = rng.random((rows, 7, columns, 4)) < 0.55
    dots[:, 5:] = False
    dots[..., 3] = False
    dots &= (rng.random((rows, columns)) < 0.85)[:, None, :, None]
    page = Image.fromarray(255 * dots.reshape(7 * rows, 4 * columns).astype(np.uint8))
    page = page.resize((mark * page.width, mark * page.height), Image.Resampling.BILINEAR)
    return np.asarray(page.crop((0, 0, side, side)), np.float32) / 255
