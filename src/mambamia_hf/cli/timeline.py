"""A picture of what the frame selection did: Δ over time, the frames that were kept, and what some of them show."""

import os
import textwrap
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.parse import urlparse

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import ConnectionPatch
from matplotlib.text import Text
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, MultipleLocator

from ..files import atomic_write
from ..inference import EncodedVideo
from ..inputs import is_url
from .console import format_time


MAX_THUMBNAILS = 8
THUMBNAIL_PIXELS = 480
MAX_QUESTIONS = 3

# A wide slide, and where on it things stand, in inches from the left and the bottom.
_WIDTH, _HEIGHT, _DPI = 13.333, 7.5, 150
_LEFT, _RIGHT = 0.95, 0.55
_TITLE_TOP, _LEGEND_MIDDLE, _AXES_TOP, _STRIP_BOTTOM, _NOTE_BOTTOM = 7.3, 5.68, 5.15, 0.95, 0.3
_TITLE_WIDTH = 8.5  # of the axes, beside the legend
_AXES_GAP, _THUMBNAIL_GAP, _THUMBNAIL_HEIGHT = 0.55, 0.12, 1.65

_INK, _MUTED, _FAINT, _KEPT = "#1b2333", "#727b8c", "#e7eaf0", "#d9480f"
_TICK_SECONDS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200)


def draw_timeline(
    path: str | os.PathLike[str], encoded: EncodedVideo, answers: Sequence[tuple[str, str]] = ()
) -> None:
    """Draw what was kept of a video; thumbnails are decoded again, larger and in their own shape.

    Args:
        path: see [`plot_timeline`].
        encoded: the video, seen by a model with a temporal layer; of a memory there are no thumbnails.
        answers: questions and answers, for the title.
    """
    reader = encoded.reader

    def thumbnails(frames: list[int]) -> Sequence[np.ndarray] | np.ndarray:
        if reader is None:
            return []
        wanted = np.array([encoded.frame_indices[frame] for frame in frames])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what there is to say of the file has been said
            images = reader.frames_at(wanted, _thumbnail).data
        return images.permute(0, 2, 3, 1).numpy()

    video = encoded.video if reader is not None else encoded.memory.name
    plot_timeline(
        path,
        encoded.timestamps,
        encoded.frame_deltas or (),
        encoded.kept_frames,
        thumbnails,
        name=Path(urlparse(video).path if is_url(video) else video).name,
        answers=answers,
    )


def _thumbnail(frame: torch.Tensor) -> torch.Tensor:
    scale = min(1.0, THUMBNAIL_PIXELS / max(frame.shape[1:]))
    size = [max(1, round(scale * side)) for side in frame.shape[1:]]
    frame = torch.nn.functional.interpolate(frame[None].float(), size, mode="bilinear", antialias=True)[0]
    return frame.round().clamp(0, 255).to(torch.uint8)


def thumbnail_frames(frame_deltas: Sequence[float], kept_frames: Sequence[int]) -> list[int]:
    """Which kept frames to show, in order of time: those of the largest Δ, at most `MAX_THUMBNAILS`."""
    by_delta = sorted(kept_frames, key=lambda frame: frame_deltas[frame], reverse=True)
    return sorted(map(int, by_delta[:MAX_THUMBNAILS]))


def plot_timeline(
    path: str | os.PathLike[str],
    timestamps: Sequence[float],
    frame_deltas: Sequence[float],
    kept_frames: Sequence[int],
    load_thumbnails: Callable[[list[int]], Sequence[np.ndarray] | np.ndarray],
    name: str = "",
    answers: Sequence[tuple[str, str]] = (),
) -> None:
    """Draw the timeline of a video and write it, whole or not at all.

    Args:
        path: the file to write; its suffix says as what.
        timestamps: seconds at which the sampled frames are shown, ascending.
        frame_deltas: Δ of each of these frames.
        kept_frames: numbers of the frames that were kept, ascending, counted among the sampled ones.
        load_thumbnails: called once with the numbers of the frames to show, gives each as an array
            `(height, width, 3)`, or none at all.
        name: of the video.
        answers: questions and answers, for the title.

    Raises:
        ValueError: for lists that do not fit each other, or a suffix that no picture has.
    """
    path = Path(path)
    if not len(timestamps) == len(frame_deltas) > 0:
        raise ValueError(
            f"there are {len(timestamps)} timestamps and {len(frame_deltas)} Δ; give both for each frame."
        )
    if not (len(kept_frames) and 0 <= min(kept_frames) <= max(kept_frames) < len(timestamps)):
        raise ValueError(f"kept_frames must name one frame at least, of 0 to {len(timestamps) - 1}.")
    times, deltas = np.asarray(timestamps, dtype=float), np.asarray(frame_deltas, dtype=float)
    kept = np.isin(np.arange(len(times)), kept_frames)

    shown = thumbnail_frames(frame_deltas, kept_frames)
    images = load_thumbnails(shown)
    aspect, height = 1.0, 0.0
    if len(images):
        aspect = images[0].shape[1] / images[0].shape[0]
        height = min(_THUMBNAIL_HEIGHT, _thumbnail_width(len(shown)) / aspect)

    with warnings.catch_warnings():
        # A character that the font lacks is drawn as a box: seen at once, no need to warn of each.
        warnings.filterwarnings("ignore", "Glyph .* missing")
        figure = Figure(figsize=(_WIDTH, _HEIGHT), dpi=_DPI, facecolor="white")
        _draw_title(figure, answers)
        axes = figure.add_axes(_box(_LEFT, _STRIP_BOTTOM + height + _AXES_GAP, _WIDTH - _RIGHT, _AXES_TOP))
        _draw_deltas(figure, axes, times, deltas, kept, name)
        note = "Δ peaks one frame after what the model saw."
        if len(images):
            _draw_strip(figure, axes, times, shown, images, height * aspect, height)
        if len(images) and len(shown) < kept.sum():
            note += f" Shown are {len(shown)} of the {kept.sum()} kept frames: those of the largest Δ."
        figure.text(_LEFT / _WIDTH, _NOTE_BOTTOM / _HEIGHT, note, size=11, color=_MUTED)
        with atomic_write(path) as partial:
            figure.savefig(partial, format=path.suffix[1:].lower())


def _box(left: float, bottom: float, right: float, top: float) -> tuple[float, float, float, float]:
    """Inches to what `add_axes` takes."""
    return left / _WIDTH, bottom / _HEIGHT, (right - left) / _WIDTH, (top - bottom) / _HEIGHT


def _thumbnail_width(count: int) -> float:
    """The width in inches that each of so many thumbnails has, where the height leaves it that."""
    count = max(count, MAX_THUMBNAILS // 2)
    return (_WIDTH - _LEFT - _RIGHT + _THUMBNAIL_GAP) / count - _THUMBNAIL_GAP


def _draw_title(figure: Figure, answers: Sequence[tuple[str, str]]) -> None:
    """One question and its answer on some lines of their own; several on a line each."""
    if len(answers) == 1:
        ((question, answer),) = answers
        lines = [(line, _INK) for line in _wrapped(question)] + [(line, _KEPT) for line in _wrapped(f"→ {answer}")]
    else:
        lines = [(f"{question} → {answer}", _INK) for question, answer in answers[:MAX_QUESTIONS]]
        if len(answers) > MAX_QUESTIONS:
            lines.append((f"and {len(answers) - MAX_QUESTIONS} more", _MUTED))
    size = 21 if len(lines) <= 2 else 15
    for number, (line, colour) in enumerate(lines, start=1):
        height = (_TITLE_TOP - 1.45 * number * size / 72) / _HEIGHT
        line = _shortened(line, 110)
        text = figure.text(_LEFT / _WIDTH, height, line, color=colour, parse_math=False, size=size, weight="bold")
        _shrink(text, size, _WIDTH - _LEFT - _RIGHT)


def _shrink(text: Text, size: float, width: float) -> None:
    """Make a text of a font size fit into a width in inches; in steps, as these are not quite in proportion."""
    for _ in range(3):
        size *= min(1.0, width * _DPI / text.get_window_extent().width)
        text.set_fontsize(size)


def _wrapped(text: str) -> list[str]:
    """At most two lines."""
    return textwrap.wrap(text, 68, max_lines=2, placeholder=" …")


def _draw_deltas(
    figure: Figure, axes: Axes, times: np.ndarray, deltas: np.ndarray, kept: np.ndarray, name: str
) -> None:
    axes.fill_between(times, deltas, color=_FAINT, linewidth=0)
    axes.plot(times, deltas, color=_MUTED, linewidth=0.8, zorder=2)
    axes.vlines(
        times[kept], 0, deltas[kept], color=_KEPT, linewidth=float(np.clip(100 / len(times), 0.5, 1)), alpha=0.6
    )
    size = float(np.clip(2500 / len(times), 7, 36))
    for label, which, colour, edge in (("kept", kept, _KEPT, _KEPT), ("dropped", ~kept, "white", _MUTED)):
        if which.any():
            axes.scatter(
                times[which],
                deltas[which],
                s=size,
                color=colour,
                edgecolors=edge,
                linewidths=0.8,
                zorder=4,
                clip_on=False,
                label=f"{label} ({which.sum()})",
            )

    span = times[-1] - times[0]
    margin = 0.01 * span or 0.5
    axes.set_xlim(times[0] - margin, times[-1] + margin)
    axes.set_ylim(0, 1.08 * deltas.max() or 1)
    step = next((step for step in _TICK_SECONDS if span / step <= 12), _TICK_SECONDS[-1])
    decimals = int(step < 1)
    axes.xaxis.set_major_locator(MultipleLocator(step) if span else FixedLocator(times.tolist()))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda seconds, _: format_time(max(seconds, 0), decimals)))
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.tick_top()  # as a ruler, out of the way of the lines from the axis to the thumbnails
    axes.grid(axis="y", color=_FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(_MUTED)
    axes.tick_params(colors=_MUTED, labelsize=12, length=0, pad=6)
    title = "Importance Δ of each frame" + (f" of {_shortened(name, 45)}" if name else "")
    middle = _LEGEND_MIDDLE / _HEIGHT
    text = figure.text(_LEFT / _WIDTH, middle, title, size=13, color=_INK, va="center", parse_math=False)
    _shrink(text, 13, _TITLE_WIDTH)
    axes.legend(
        loc="center right",
        bbox_to_anchor=(1 - _RIGHT / _WIDTH, middle),
        bbox_transform=figure.transFigure,
        borderaxespad=0,
        ncols=2,
        frameon=False,
        fontsize=12,
        labelcolor=_INK,
        handlelength=1.4,
        markerscale=(36 / size) ** 0.5,
    )


def _shortened(text: str, length: int) -> str:
    """A long text without its middle."""
    return text if len(text) <= length else f"{text[: length // 2]}…{text[-length // 2 :]}"


def _decimals(times: np.ndarray) -> int:
    """Decimals of a second that tell the frames apart, one at most."""
    return int(len(times) > 1 and np.diff(times).min() < 0.95)


def _draw_strip(
    figure: Figure,
    axes: Axes,
    times: np.ndarray,
    shown: list[int],
    images: Sequence[np.ndarray] | np.ndarray,
    width: float,
    height: float,
) -> None:
    """The thumbnails with their times, each under its place on the axis as far as there is room, and a line to it."""
    low, high = axes.get_xlim()
    centres = _LEFT + (_WIDTH - _LEFT - _RIGHT) * (times[shown] - low) / (high - low)
    lefts = _without_overlap(centres - width / 2, width + _THUMBNAIL_GAP, _LEFT, _WIDTH - _RIGHT - width)
    for frame, image, left in zip(shown, images, lefts, strict=True):
        box = _box(left, _STRIP_BOTTOM, left + width, _STRIP_BOTTOM + height)
        picture = figure.add_axes(box, xticks=[], yticks=[])
        picture.imshow(image, aspect="auto", interpolation="lanczos")
        picture.spines[:].set(color=_KEPT, linewidth=1.5)
        picture.set_xlabel(format_time(times[frame], _decimals(times)), size=12, color=_INK, labelpad=5)
        line = ConnectionPatch(
            xyA=(0.5, 1),
            coordsA=picture.transAxes,
            xyB=(times[frame], 0),
            coordsB=axes.get_xaxis_transform(),
            color=_KEPT,
            linewidth=0.8,
            alpha=0.6,
        )
        figure.add_artist(line)


def _without_overlap(wanted: np.ndarray, step: float, low: float, high: float) -> np.ndarray:
    """Ascending places within `low` and `high`, `step` apart at least, near those wanted."""
    places = np.clip(wanted, low, high)
    for i in range(1, len(places)):
        places[i] = max(places[i], places[i - 1] + step)
    places[-1] = min(places[-1], high)
    for i in range(len(places) - 2, -1, -1):
        places[i] = min(places[i], places[i + 1] - step)
    return places
