"""The needles' glyphs: eight shapes and ten digits in eight colours, with an outline that shows on any background."""

import math
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont


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
OUTLINE = 0.06  # width of the outline, as a fraction of the glyph's height
SUPERSAMPLE = 4  # glyphs are drawn this many times larger and scaled down


def draw_glyph(value: str, colour: str, height: int, halo: bool) -> Image.Image:
    """Draws a glyph with its outline, centred in a square RGBA image.

    Args:
        value: one of `SHAPES` or `DIGITS`.
        colour: a key of `COLOURS`. Light colours get a black outline, dark ones a white one.
        height: of the glyph without its outline, in pixels.
        halo: lets the background fade around the glyph, to a distance of half its height.
    """
    pad = round((0.5 if halo else 2 * OUTLINE) * height)
    canvas = SUPERSAMPLE * (height + 2 * pad)
    fill = Image.new("L", (canvas, canvas))
    mask = _shape_mask(value, SUPERSAMPLE * height) if value in SHAPES else _digit_mask(value, SUPERSAMPLE * height)
    fill.paste(mask, ((canvas - mask.width) // 2, (canvas - mask.height) // 2))
    # A blurred edge cut low lies outside the edge by about 1.4 blur radii: an outline with round corners.
    blur = ImageFilter.GaussianBlur(OUTLINE * SUPERSAMPLE * height / 1.4)
    outline = fill.filter(blur).point(lambda level: 255 * (level > 20))
    rgb = COLOURS[colour]
    light = 0.3 * rgb[0] + 0.59 * rgb[1] + 0.11 * rgb[2] > 130
    glyph = Image.new("RGBA", (height + 2 * pad,) * 2, (0, 0, 0, 0) if light else (255, 255, 255, 0))
    fill, alpha = (mask.resize(glyph.size, Image.Resampling.BOX) for mask in (fill, outline))
    if halo:
        fade = alpha.filter(ImageFilter.GaussianBlur(pad / 2.5)).point(lambda level: int(0.8 * level))
        alpha = Image.fromarray(np.maximum(np.asarray(alpha), np.asarray(fade)))
    glyph.paste(rgb, mask=fill)
    glyph.putalpha(alpha)
    return glyph


class _Pen:
    """Draws white figures on a black square, in coordinates from 0 to 1."""

    def __init__(self, side: int):
        self.mask = Image.new("L", (side, side))
        self._draw = ImageDraw.Draw(self.mask)

    def polygon(self, *points: tuple[float, float]) -> None:
        self._draw.polygon([(self._pixel(x), self._pixel(y)) for x, y in points], fill=255)

    def ellipse(self, left: float, top: float, right: float, bottom: float, fill: int = 255) -> None:
        self._draw.ellipse([self._pixel(edge) for edge in (left, top, right, bottom)], fill=fill)

    def _pixel(self, coordinate: float) -> float:
        return coordinate * (self.mask.width - 1)


def _circle(pen: _Pen) -> None:
    pen.ellipse(0, 0, 1, 1)


def _square(pen: _Pen) -> None:
    pen.polygon((0.06, 0.06), (0.94, 0.06), (0.94, 0.94), (0.06, 0.94))


def _triangle(pen: _Pen) -> None:
    pen.polygon((0.5, 0.04), (1, 0.96), (0, 0.96))


def _star(pen: _Pen) -> None:
    corners = [(0.54 if k % 2 == 0 else 0.23, math.pi * k / 5) for k in range(10)]
    pen.polygon(*((0.5 + radius * math.sin(turn), 0.54 - radius * math.cos(turn)) for radius, turn in corners))


def _cross(pen: _Pen) -> None:
    a, b = 0.34, 0.66
    pen.polygon((a, 0), (b, 0), (b, a), (1, a), (1, b), (b, b), (b, 1), (a, 1), (a, b), (0, b), (0, a), (a, a))


def _heart(pen: _Pen) -> None:
    turns = np.linspace(0, 2 * math.pi, 60)
    xs = 16 * np.sin(turns) ** 3
    ys = 13 * np.cos(turns) - 5 * np.cos(2 * turns) - 2 * np.cos(3 * turns) - np.cos(4 * turns)
    pen.polygon(*((0.5 + x / 33, 0.42 - y / 31) for x, y in zip(xs, ys, strict=True)))


def _diamond(pen: _Pen) -> None:
    pen.polygon((0.5, 0), (0.9, 0.5), (0.5, 1), (0.1, 0.5))


def _ring(pen: _Pen) -> None:
    pen.ellipse(0, 0, 1, 1)
    pen.ellipse(0.25, 0.25, 0.75, 0.75, fill=0)


_DRAW_SHAPE: dict[str, Callable[[_Pen], None]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
    "heart": _heart,
    "diamond": _diamond,
    "ring": _ring,
}
SHAPES = tuple(_DRAW_SHAPE)


def _shape_mask(shape: str, side: int) -> Image.Image:
    """A shape in white on black, `side` pixels high and wide."""
    pen = _Pen(side)
    _DRAW_SHAPE[shape](pen)
    return pen.mask


def _digit_mask(digit: str, height: int) -> Image.Image:
    """A digit in white on black, `height` pixels high, in a bold cut of Pillow's own font."""
    large = 200
    font = ImageFont.load_default(large)
    mask = Image.new("L", (2 * large, 2 * large))
    ImageDraw.Draw(mask).text((large // 2, large // 2), digit, fill=255, font=font, stroke_width=large // 40)
    mask = mask.crop(mask.getbbox())
    return mask.resize((round(mask.width * height / mask.height), height), Image.Resampling.BILINEAR)
