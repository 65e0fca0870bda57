"""The pictures behind the needles: moving textures made from a seed, or those of a video file."""

import math
import os
from collections.abc import Callable, Iterator
from functools import cache, lru_cache
from string import ascii_lowercase

import av
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from mambamia_hf.video_decoding import TimedVideoMetadata, decode_video

from .pictures import LEVELS, Planes, Stamp, from_samples
from .textures import Texture


MAX_TEXTURES = 24

# A longer clip is shown in part: at most this much of it, and no more of it is held in memory.
MAX_CLIP_SECONDS = 600.0
MAX_CLIP_BYTES = 400e6


def render_scenes(seeds: np.random.SeedSequence, size: tuple[int, int], times: np.ndarray) -> Iterator[Planes]:
    """Renders moving textures: shots that return to a few places.

    Args:
        seeds: decides everything.
        size: (height, width) in pixels.
        times: when to render a picture, in seconds, ascending.
    """

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
    """One shot: a texture under a moving camera, sometimes with a second one in front of it, in changing light."""

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
    """Words of random letters at the top or the bottom of a frame of `size`, far smaller than a needle."""
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
    """For each plane, the level that each level from 0 to 255 becomes under `gain` times the light."""
    brightness = np.clip(16 + gain * (LEVELS - 16), 16, 235).astype(np.uint8).tobytes()
    colour = np.clip(128 + gain * (LEVELS - 128), 16, 240).astype(np.uint8).tobytes()
    return [brightness, colour, colour]


class Layer:
    """A texture seen through a window that pans, zooms and sways over it."""

    def __init__(self, texture: Texture, rng: np.random.Generator, size: tuple[int, int]):
        self.texture, self.size = texture, size
        reach = math.hypot(*size) / 2
        self.scale = rng.uniform(0.65, 1.0)  # texture pixels per frame pixel; the zoom below adds at most a fifth
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
        """For each plane, the opacity of the layer over the one behind it."""
        window = self._window(time)
        whole, half = (self._look_at(self.texture.mask, window, step) for step in (1, 2))
        return [whole, half, half]

    def _window(self, time: float) -> tuple[float, ...]:
        """(a, b, c, d, e, f) from frame to texture coordinates: x = a·u + b·v + c, y = d·u + e·v + f."""
        scale, angle = self.scale * (1 + self.zoom(time)), self.angle + self.sway(time)
        cos, sin = scale * math.cos(angle), scale * math.sin(angle)
        (height, width), middle = self.size, self.texture.side / 2
        left = middle + self.pan_x(time) - cos * width / 2 + sin * height / 2
        top = middle + self.pan_y(time) - sin * width / 2 - cos * height / 2
        return cos, -sin, left, sin, cos, top

    def _look_at(self, image: Image.Image, window: tuple[float, ...], step: int) -> Image.Image:
        """What every `step`-th pixel of the frame shows of an image of the texture."""
        fine = image.width / self.texture.side
        a, b, c, d, e, f = (fine * value for value in window)
        height, width = self.size
        coefficients = (step * a, step * b, c, step * d, step * e, f)
        return image.transform((width // step, height // step), Image.Transform.AFFINE, coefficients)


class Wave:
    """A sine in time with a random phase and a random period within `seconds` (low, high)."""

    def __init__(self, rng: np.random.Generator, amplitude: float, seconds: tuple[float, float]):
        self.amplitude = amplitude
        self.rate = 2 * math.pi / rng.uniform(*seconds)
        self.phase = rng.uniform(0, 2 * math.pi)

    def __call__(self, time: float) -> float:
        return self.amplitude * math.sin(self.rate * time + self.phase)


def render_clip(
    path: str | os.PathLike[str], rng: np.random.Generator, size: tuple[int, int], times: np.ndarray
) -> Iterator[Planes]:
    """The pictures of a video file from a random point on, cropped to the frame's shape and resized.

    The clip, or a random part of a long one, is shown in a loop.

    Args:
        path: the video file.
        rng: decides where to begin.
        size: (height, width) in pixels.
        times: when to render a picture, in seconds, ascending.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it cannot be read as a video.
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
        yield from_samples(frames[index].numpy())
