"""What the page shows, as HTML: player, timeline, times as links. What leads to a moment is a link `#t=SECONDS`."""

import base64
import html
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..cli.console import format_time


MAX_THUMBNAILS = 24
THUMBNAIL_PIXELS = 160  # the longer side

_TIME = re.compile(r"(?<![\d:.])(?:(\d{1,2}):([0-5]\d)|(\d{1,3})):([0-5]\d(?:\.\d+)?)(?![\d:]|\.\d)", re.ASCII)
_MARKDOWN = re.compile(r"([\\`*_{}\[\]()#+\-.!|~$])")
_NUM_TICKS = 5
_CURVE_WIDTH, _CURVE_HEIGHT = 1000, 100


def clock(seconds: float) -> str:
    """`m:ss`, or `h:mm:ss` from an hour on; with a tenth of a second where there is one."""
    return format_time(seconds, decimals=int(round(10 * seconds) % 10 > 0))


def time_link(seconds: float, text: str | None = None) -> str:
    """A link, in Markdown, that takes the player to a moment."""
    return f"[{text or clock(seconds)}](#t={_fragment(seconds)})"


def _fragment(seconds: float) -> str:
    """Seconds as a number that leads to the very frame, to a microsecond."""
    return f"{seconds:.6f}".rstrip("0").rstrip(".")


def answer_markdown(text: str, duration: float) -> str:
    """An answer as Markdown that shows its very characters, with the times within the video as links.

    Args:
        text: what the model wrote.
        duration: of the video in seconds; later times are no links.
    """
    parts, end = [], 0
    for match in _TIME.finditer(text):
        hours, minutes_of_hour, minutes, seconds = match.groups()
        moment = 3600 * int(hours or 0) + 60 * int(minutes_of_hour or minutes) + float(seconds)
        if moment <= duration:
            parts += [plain_markdown(text[end : match.start()]), time_link(moment, match[0])]
            end = match.end()
    return "".join([*parts, plain_markdown(text[end:])])


def plain_markdown(text: str) -> str:
    """Markdown that shows these very characters."""
    return html.escape(_MARKDOWN.sub(r"\\\1", text), quote=False)


def evidence_markdown(evidence: Sequence[Mapping[str, Any]]) -> str:
    """A line with links to the frames of [`VideoChat.evidence`]; nothing if there are none."""
    if not evidence:
        return ""
    what = "Δ is largest at" if evidence[0]["attention"] is None else "Looked most at"
    return f"*{what}* {' · '.join(time_link(row['time']) for row in evidence)}"


def notice(text: str, is_error: bool = False) -> str:
    """One line to the user, which a screen reader says aloud."""
    if not text:
        return ""
    role, kind = ("alert", "mm-error") if is_error else ("status", "mm-info")
    return f'<p role="{role}" class="mm-notice {kind}">{html.escape(text[0].upper() + text[1:])}</p>'


def player(source: str | None, name: str) -> str:
    """The video itself, if there is one.

    Args:
        source: address of the video.
        name: what to call it.
    """
    if source is None:
        return ""
    return (
        f'<video src="{html.escape(source)}" controls playsinline preload="metadata" '
        f'aria-label="{html.escape(name)}"></video>'
        '<p class="mm-notice mm-info mm-unplayable" hidden>This browser cannot play the file. Questions, times and '
        "thumbnails work all the same.</p>"
    )


def saved_link(address: str, name: str) -> str:
    """A link that saves the memory of the video of this name."""
    return f'<a href="{html.escape(address)}" download>Save the memory of {html.escape(name)}</a>'


def thumbnail_frames(num_frames: int, importance: Sequence[float] | None) -> list[int]:
    """Which frames to show: of as many equal parts as there is room for, the most important frame of each.

    Args:
        num_frames: how many there are.
        importance: Δ of each; without it, the first frame of each part.

    Returns:
        Their numbers, ascending, at most `MAX_THUMBNAILS`.
    """
    parts = [part.tolist() for part in np.array_split(np.arange(num_frames), min(num_frames, MAX_THUMBNAILS))]
    return [part[0] if importance is None else max(part, key=importance.__getitem__) for part in parts]


def shrink(frame: torch.Tensor) -> torch.Tensor:
    """A frame `(3, height, width)` of uint8 as a thumbnail."""
    height, width = frame.shape[-2:]
    scale = min(1.0, THUMBNAIL_PIXELS / max(height, width))
    size = (max(1, round(scale * height)), max(1, round(scale * width)))
    image = torch.nn.functional.interpolate(frame[None].float(), size, mode="bilinear", antialias=True)
    return image[0].round().clamp(0, 255).to(torch.uint8)


def jpeg_address(frame: torch.Tensor) -> str:
    """A frame `(3, height, width)` of uint8 as an address that holds the picture itself."""
    file = io.BytesIO()
    Image.fromarray(frame.permute(1, 2, 0).contiguous().numpy()).save(file, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode('ascii')}"


def timeline(
    times: Sequence[float],
    deltas: Sequence[float] | None,
    kept: Sequence[int],
    thumbnails: Mapping[int, str],
) -> str:
    """The frames of a video over time: Δ as a curve to click on, and some of the frames as links.

    Args:
        times: of the sampled frames in seconds, ascending.
        deltas: Δ of each; None for a model without a temporal layer.
        kept: numbers of the frames that the language model reads.
        thumbnails: addresses of pictures by the number of the frame.
    """
    marks, peak = set(kept), max(deltas or (), default=0.0) or 1.0
    items = []
    for frame in thumbnail_frames(len(times), deltas):
        time, delta = times[frame], None if deltas is None else deltas[frame]
        picture = f'<img src="{thumbnails[frame]}" alt="" loading="lazy">' if frame in thumbnails else ""
        bar = "" if delta is None else f'<span class="mm-bar"><i style="width:{100 * delta / peak:.0f}%"></i></span>'
        told = f"Go to {clock(time)}" + ("" if delta is None else f", Δ {delta:.3g}")
        items.append(
            f'<li><a href="#t={_fragment(time)}" class="{"mm-kept" if frame in marks else ""}" aria-label="{told}" '
            f'title="{told}">{picture}{bar}<time>{clock(time)}</time></a></li>'
        )
    read = "all" if len(marks) == len(times) else f"{len(marks)}"
    curve = "" if deltas is None else _curve(times, deltas, marks, peak)
    heading = "" if deltas is None else "<b>Importance Δ</b>, one frame late · "
    return (
        f'<section class="mm-timeline" aria-label="Timeline"><p>{heading}{len(times)} frames, {read} '
        f'<span class="mm-legend">read</span> · click to jump</p>{curve}<ol class="mm-strip">{"".join(items)}</ol>'
        "</section>"
    )


def _curve(times: Sequence[float], deltas: Sequence[float], marks: set[int], peak: float) -> str:
    first, span = times[0], (times[-1] - times[0]) or 1.0
    xs = [_CURVE_WIDTH * (time - first) / span for time in times]
    ys = [_CURVE_HEIGHT * (1 - delta / (1.05 * peak)) for delta in deltas]
    outline = " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(xs, ys, strict=True))
    read = "".join(
        f"M{xs[frame]:.1f} {_CURVE_HEIGHT}V{ys[frame]:.1f}M{xs[frame]:.1f} {_CURVE_HEIGHT + 4}v8"
        for frame in sorted(marks)
    )
    moments = [first + span * tick / (_NUM_TICKS - 1) for tick in range(_NUM_TICKS)]
    ticks = "".join(f"<time>{clock(round(moment, 1 if span < 10 else 0))}</time>" for moment in moments)
    points = " ".join(f"{_fragment(time)},{delta:.3g}" for time, delta in zip(times, deltas, strict=True))
    return (
        f'<div class="mm-curve" data-points="{points}"><svg viewBox="0 0 {_CURVE_WIDTH} {_CURVE_HEIGHT + 12}" '
        f'preserveAspectRatio="none" role="img" aria-label="Importance of each frame over time">'
        f'<polygon points="0,{_CURVE_HEIGHT} {outline} {_CURVE_WIDTH},{_CURVE_HEIGHT}"/>'
        f'<path class="mm-read" d="{read}"/></svg>'
        f'<i class="mm-playhead" hidden></i><output class="mm-tip" hidden></output></div>'
        f'<div class="mm-ticks">{ticks}</div>'
    )


def asset(name: str) -> str:
    """The text of a file beside this one."""
    return Path(__file__).with_name(name).read_text(encoding="utf-8")
