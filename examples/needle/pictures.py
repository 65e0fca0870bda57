"""Pictures as three planes, as video files hold them, and images with transparency that are pasted onto them.

The planes are those of YUV 4:2:0: brightness (height, width), then two of colour at half the height and width. Nothing
needs to be converted on the way from a decoder or to an encoder.
"""

import math
from functools import cache

import av
import numpy as np
from PIL import Image


Planes = list[Image.Image]

LEVELS = np.arange(256)


def rgb_to_yuv(colours: np.ndarray) -> np.ndarray:
    """Converts colours `(..., 3)` from RGB to YUV (BT.601, limited range, as in most files), both 0 to 255."""
    matrix = np.array([[65.738, 129.057, 25.064], [-37.945, -74.494, 112.439], [112.439, -94.154, -18.285]]) / 256
    return colours @ matrix.T + (16, 128, 128)


def to_frame(planes: Planes) -> av.VideoFrame:
    """The picture as PyAV's encoders take it."""
    width, height = planes[0].size
    samples = np.frombuffer(b"".join(plane.tobytes() for plane in planes), np.uint8)
    return av.VideoFrame.from_ndarray(samples.reshape(height * 3 // 2, width), "yuv420p")


def from_samples(samples: np.ndarray) -> Planes:
    """The picture of an array `(1.5 * height, width)`, PyAV's layout of "yuv420p"."""
    height, width = samples.shape[0] * 2 // 3, samples.shape[1]
    brightness, colours = samples[:height], samples[height:]
    return [Image.fromarray(plane) for plane in (brightness, *colours.reshape(2, height // 2, width // 2))]


def to_image(planes: Planes) -> Image.Image:
    """The picture in RGB."""
    bands = (
        plane.resize(planes[0].size, Image.Resampling.NEAREST).point(levels)
        for plane, levels in zip(planes, _full_range(), strict=True)
    )
    return Image.merge("YCbCr", list(bands)).convert("RGB")


@cache
def _full_range() -> list[list[int]]:
    """For each plane, the level in Pillow's YCbCr (full range) of each level in video files (limited range)."""
    brightness, colour = np.clip([(LEVELS - 16) * 255 / 219, (LEVELS - 128) * 255 / 224 + 128], 0, 255).round()
    return [brightness.astype(int).tolist(), *2 * [colour.astype(int).tolist()]]


class Stamp:
    """An RGBA image to paste onto pictures.

    Args:
        image: the image.
        left: column of its left edge in the picture, in pixels.
        top: row of its upper edge.
    """

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
