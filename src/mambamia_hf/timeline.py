"""A picture of what the frame selection did: Δ over time, the frames that were kept, and what some of them show."""

import os
import tempfile
import textwrap
import unicodedata
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import ConnectionPatch
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, MultipleLocator
from matplotlib.transforms import ScaledTranslation


PLOT_FORMATS = ("png", "svg", "pdf", "jpg", "webp")
MAX_THUMBNAILS = 8

# A wide slide, and where on it things stand, in inches from the left and the bottom.
_WIDTH, _HEIGHT, _DPI = 13.333, 7.5, 150
_LEFT, _RIGHT = 0.95, 0.55
_TITLE_TOP, _AXES_TOP, _STRIP_BOTTOM, _NOTE_BOTTOM = 7.3, 5.5, 0.95, 0.3
_AXES_GAP, _THUMBNAIL_GAP, _THUMBNAIL_HEIGHT = 0.8, 0.12, 1.65

_INK, _MUTED, _FAINT, _KEPT, _CUT = "#1b2333", "#727b8c", "#e7eaf0", "#d9480f", "#3b6fb6"
_TICK_SECONDS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200)
# Matplotlib's own font has no glyphs for Chinese, Japanese and Korean; of these the installed ones help out.
_FONTS = ("DejaVu Sans", "Noto Sans CJK KR", "Noto Sans CJK SC", "Noto Sans CJK JP", "Malgun Gothic")
_FONTS += ("Microsoft YaHei", "Yu Gothic", "Apple SD Gothic Neo", "PingFang SC", "Hiragino Sans")


def check_plot_path(path: str | os.PathLike) -> Path:
    """The path of a plot, checked before any work is done for it.

    Raises:
        ValueError: if the suffix is not one of `PLOT_FORMATS`, or the file cannot be written there.
    """
    path = Path(path)
    if path.suffix[1:].lower() not in PLOT_FORMATS:
        raise ValueError(
            f"the plot '{path}' has no suffix of a picture that can be written; give it one of "
            f"{', '.join('.' + name for name in PLOT_FORMATS)}."
        )
    if not path.parent.is_dir():
        raise ValueError(f"there is no folder '{path.parent}' for the plot '{path}'; make it, or name another.")
    if path.is_dir():
        raise ValueError(f"there is a folder in the place of the plot '{path}'; name another file.")
    try:
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise ValueError(f"the plot '{path}' cannot be written ({error.strerror}); name another place.") from error
    return path


def find_cuts(frames: torch.Tensor) -> list[int]:
    """Where consecutive frames differ strongly: the numbers of the frames that a cut comes before.

    A cut changes a coarse picture (8 x 8) by a tenth of the range of its values, and twice as much as it changes
    between the frames around: where a camera moves fast, or frames are far apart, that alone is no cut.

    Args:
        frames: `(num_frames, channels, height, width)`, values from 0 to 1.
    """
    coarse = torch.nn.functional.adaptive_avg_pool2d(frames.float(), 8)
    change = (coarse[1:] - coarse[:-1]).abs().mean(dim=(1, 2, 3)).tolist()
    cuts = []
    for i, value in enumerate(change):
        around = change[max(0, i - 4) : i] + change[i + 1 : i + 5]
        if value > 0.1 and value > 2 * (np.median(around) if around else 0):
            cuts.append(i + 1)
    return cuts


def format_time(seconds: float, decimals: int = 0) -> str:
    """Seconds as m:ss, from an hour on as h:mm:ss, with so many decimals."""
    ticks = round(seconds * 10**decimals)
    whole, rest = divmod(ticks, 10**decimals)
    minutes, second = divmod(whole, 60)
    hours, minute = divmod(minutes, 60)
    text = f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
    return f"{text}.{rest:0{decimals}d}" if decimals else text


def thumbnail_frames(frame_deltas: Sequence[float], selected_frames: Sequence[int]) -> list[int]:
    """Which kept frames to show, in order of time: those of the largest Δ, at most `MAX_THUMBNAILS`."""
    by_delta = sorted(selected_frames, key=lambda frame: frame_deltas[frame], reverse=True)
    return sorted(map(int, by_delta[:MAX_THUMBNAILS]))


def plot_timeline(
    path: str | os.PathLike,
    timestamps: Sequence[float],
    frame_deltas: Sequence[float],
    selected_frames: Sequence[int],
    load_frames: Callable[[list[int]], Sequence[np.ndarray]],
    cuts: Sequence[int] = (),
    question: str | None = None,
    answer: str | None = None,
) -> None:
    """Draw the timeline of a video and write it; the file appears under its name only when it is complete.

    Args:
        path: the file to write; its suffix, one of `PLOT_FORMATS`, says as what.
        timestamps: seconds at which the sampled frames are shown, ascending.
        frame_deltas: Δ of each of these frames.
        selected_frames: numbers of the frames that were kept, ascending, counted among the sampled ones.
        load_frames: called once with the numbers of the frames to show, gives each as an array `(height, width, 3)`.
        cuts: numbers of the frames that a cut comes before, as from [`find_cuts`].
        question, answer: for the title.

    Raises:
        ValueError: for a path that [`check_plot_path`] refuses, or lists that do not fit each other.
    """
    path = check_plot_path(path)
    if not len(timestamps) == len(frame_deltas) > 0:
        raise ValueError(
            f"there are {len(timestamps)} timestamps and {len(frame_deltas)} Δ; give both for each frame."
        )
    if not (len(selected_frames) and 0 <= min(selected_frames) <= max(selected_frames) < len(timestamps)):
        raise ValueError(f"selected_frames must name one frame at least, of 0 to {len(timestamps) - 1}.")
    times, deltas = np.asarray(timestamps, dtype=float), np.asarray(frame_deltas, dtype=float)
    kept = np.isin(np.arange(len(times)), selected_frames)

    shown = thumbnail_frames(deltas, selected_frames)
    images = load_frames(shown)
    aspect = images[0].shape[1] / images[0].shape[0]
    height = min(_THUMBNAIL_HEIGHT, _thumbnail_width(len(shown)) / aspect)

    with warnings.catch_warnings():
        # A character that no font has is drawn as a box: seen at once, no need to warn of each.
        warnings.filterwarnings("ignore", "Glyph .* missing")
        figure = Figure(figsize=(_WIDTH, _HEIGHT), dpi=_DPI, facecolor="white")
        _draw_title(figure, question, answer)
        axes = figure.add_axes(_box(_LEFT, _STRIP_BOTTOM + height + _AXES_GAP, _WIDTH - _RIGHT, _AXES_TOP))
        _draw_deltas(axes, times, deltas, kept, cuts)
        _draw_strip(figure, axes, times, shown, images, height * aspect, height)
        if len(shown) < kept.sum():
            note = f"{len(shown)} of the {kept.sum()} kept frames shown: those of the largest Δ"
            figure.text(_LEFT / _WIDTH, _NOTE_BOTTOM / _HEIGHT, note, size=11, color=_MUTED)
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            figure.savefig(partial, format=path.suffix[1:].lower())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


def _box(left: float, bottom: float, right: float, top: float) -> tuple[float, float, float, float]:
    """Inches to what `add_axes` takes."""
    return left / _WIDTH, bottom / _HEIGHT, (right - left) / _WIDTH, (top - bottom) / _HEIGHT


def _thumbnail_width(count: int) -> float:
    """The width in inches that each of so many thumbnails has, where the height leaves it that."""
    count = max(count, MAX_THUMBNAILS // 2)
    return (_WIDTH - _LEFT - _RIGHT + _THUMBNAIL_GAP) / count - _THUMBNAIL_GAP


def _draw_title(figure: Figure, question: str | None, answer: str | None) -> None:
    installed = set(font_manager.get_font_names())
    texts = [(question, _INK), (answer and f"→ {answer}", _KEPT)]
    size, width = 21, 68
    if sum(len(_wrapped(text, width)) for text, _ in texts) > 2:
        size, width = 15, 94
    style = {"size": size, "weight": "bold", "family": [name for name in _FONTS if name in installed]}
    lines = [(line, colour) for text, colour in texts for line in _wrapped(text, width)]
    for number, (line, colour) in enumerate(lines, start=1):
        height = (_TITLE_TOP - 1.45 * number * size / 72) / _HEIGHT
        text = figure.text(_LEFT / _WIDTH, height, line, color=colour, parse_math=False, **style)
        room = (_WIDTH - _LEFT - _RIGHT) * _DPI / text.get_window_extent().width
        text.set_size(size * min(1.0, room))


def _wrapped(text: str | None, width: int) -> list[str]:
    """At most two lines of so many letters, or half as many characters of the wide scripts."""
    text = text or ""
    if any(unicodedata.east_asian_width(character) in "WF" for character in text):
        width //= 2
    return textwrap.wrap(text, width, max_lines=2, placeholder=" …")


def _draw_deltas(axes: Axes, times: np.ndarray, deltas: np.ndarray, kept: np.ndarray, cuts: Sequence[int]) -> None:
    axes.fill_between(times, deltas, color=_FAINT, linewidth=0)
    axes.plot(times, deltas, color=_MUTED, linewidth=0.8, zorder=2)
    axes.vlines(
        times[kept], 0, deltas[kept], color=_KEPT, linewidth=float(np.clip(100 / len(times), 0.5, 1)), alpha=0.6
    )
    size = float(np.clip(2500 / len(times), 7, 36))
    for name, which, colour, edge in (("kept", kept, _KEPT, _KEPT), ("dropped", ~kept, "white", _MUTED)):
        if which.any():
            style = {"s": size, "color": colour, "edgecolors": edge, "linewidths": 0.8, "zorder": 4, "clip_on": False}
            axes.scatter(times[which], deltas[which], label=f"{name} ({which.sum()})", **style)
    for number, cut in enumerate(cuts):
        label = f"cut ({len(cuts)})" if number == 0 else None
        axes.axvline((times[cut - 1] + times[cut]) / 2, color=_CUT, linewidth=1, dashes=(4, 3), zorder=1, label=label)

    span = times[-1] - times[0]
    margin = 0.01 * span or 0.5
    axes.set_xlim(times[0] - margin, times[-1] + margin)
    axes.set_ylim(0, 1.08 * deltas.max() or 1)
    step = next((step for step in _TICK_SECONDS if span / step <= 12), _TICK_SECONDS[-1])
    decimals = _decimals(times) if step < 1 else 0
    axes.xaxis.set_major_locator(MultipleLocator(step) if span else FixedLocator(times))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda seconds, _: format_time(max(seconds, 0), decimals)))
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.grid(axis="y", color=_FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(_MUTED)
    axes.tick_params(colors=_MUTED, labelsize=12, length=0, pad=6)
    axes.set_title("Importance Δ of each frame", loc="left", size=13, color=_INK, pad=12)
    axes.legend(
        loc="lower right",
        bbox_to_anchor=(1, 1),
        ncols=3,
        frameon=False,
        fontsize=12,
        labelcolor=_INK,
        handlelength=1.4,
        markerscale=(36 / size) ** 0.5,
    )


def _decimals(times: np.ndarray) -> int:
    """Decimals of a second that tell the frames apart, one at most."""
    return int(len(times) > 1 and np.diff(times).min() < 0.95)


def _draw_strip(
    figure: Figure,
    axes: Axes,
    times: np.ndarray,
    shown: list[int],
    images: Sequence[np.ndarray],
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
            coordsB=axes.get_xaxis_transform() + ScaledTranslation(0, -0.38, figure.dpi_scale_trans),
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
