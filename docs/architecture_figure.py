"""Draws docs/architecture.png: how many tokens there are where, and what turns them into fewer.

python docs/architecture_figure.py
"""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle


INK, GREY, PALE, ORANGE = "#1a2233", "#6b7385", "#dde1ea", "#d9480f"
FRAMES = 4  # drawn, from top to bottom
ROWS, PATCHES = 3, 4  # of each drawn frame
CELL = 0.17
FRAME_HEIGHT = 0.78
TOP = 3.6
MIDDLE = 2.33
ARROWS = (
    (1.45, 1.74),
    (2.92, 3.06),
    (4.48, 4.94),
    (5.16, 5.62),
    (7.04, 7.33),
    (8.2, 8.36),
    (9.78, 10.1),
    (10.36, 10.68),
    (12.1, 12.46),
)
DELTAS = (0.1, 0.9, 0.7, 0.2)
KEPT = (False, True, True, False)
OPERATIONS = {  # centre of the box: name, explanation
    0.73: ("Vision tower", "SigLIP2, frozen\n576 patches\nper frame"),
    3.78: ("Stage 1", "3 × bidirectional\nMamba-2, each with\ngated patch\naggregation"),
    6.33: ("Stage 2", "1 × causal\nMamba-2 along\ntime, for every\nrow position"),
    9.07: ("Selection", "by accumulated Δ:\nthreshold or\nexact budget"),
    11.4: ("Language model", "Qwen2 reads the\nkept frames and\nthe question"),
}
CAPTIONS = {
    2.25: "384 × 24 rows of\n24 patches and an anchor\n230,400 tokens",
    5.05: "384 × 24 anchors\n9,216 tokens",
    7.65: "the same, and\nΔ of every frame",
    10.22: "192 × 24 anchors\n4,608 tokens",
}


def cell(axes: Axes, x: float, y: float, colour: str, is_dropped: bool = False) -> None:
    face = "white" if is_dropped else colour
    axes.add_patch(Rectangle((x, y), CELL * 0.82, CELL * 0.82, facecolor=face, edgecolor=colour, linewidth=0.8))


def row_tops() -> list[tuple[int, float]]:
    """Frame and y of every row."""
    return [(frame, TOP - frame * FRAME_HEIGHT - row * CELL) for frame in range(FRAMES) for row in range(ROWS)]


def draw() -> Figure:
    figure = Figure(figsize=(13.3, 5.2), dpi=150)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(-0.1, 13.2), ylim=(-0.35, 4.85))
    axes.axis("off")

    for _, y in row_tops():
        for patch in range(PATCHES):
            cell(axes, 1.8 + patch * CELL, y, PALE)
        cell(axes, 1.8 + PATCHES * CELL, y, ORANGE)
        cell(axes, 4.98, y, ORANGE)
        cell(axes, 7.38, y, ORANGE)
    for frame, y in row_tops():
        cell(axes, 10.15, y, ORANGE if KEPT[frame] else GREY, is_dropped=not KEPT[frame])
    for frame, delta in enumerate(DELTAS):
        y = TOP - frame * FRAME_HEIGHT - (ROWS - 1) * CELL
        axes.add_patch(Rectangle((7.66, y + 0.1), 0.5 * delta, 0.24, facecolor=GREY, edgecolor="none"))
    axes.text(7.66, TOP + 0.3, "Δ", color=GREY, fontsize=13)

    for x, (name, explanation) in OPERATIONS.items():
        box = FancyBboxPatch((x - 0.68, MIDDLE - 0.8), 1.36, 1.6, boxstyle="round,pad=0,rounding_size=0.08")
        box.set(facecolor="white", edgecolor=INK)
        axes.add_patch(box)
        axes.text(x, MIDDLE + 0.66, name, ha="center", va="top", fontsize=9.8, fontweight="bold", color=INK)
        axes.text(x, MIDDLE - 0.12, explanation, ha="center", va="center", fontsize=8.6, color=INK, linespacing=1.35)
    for start, end in ARROWS:
        axes.annotate("", (end, MIDDLE), (start, MIDDLE), arrowprops={"arrowstyle": "-|>", "color": INK, "lw": 1.2})
    axes.text(12.5, MIDDLE, "answer", va="center", fontsize=10.5, color=INK)

    axes.annotate("", (2.83, 0.85), (2.83, 3.8), arrowprops={"arrowstyle": "-|>", "color": GREY, "lw": 1})
    axes.text(2.83, 3.85, "time", ha="center", va="bottom", fontsize=9, color=GREY)
    for x, caption in CAPTIONS.items():
        axes.text(x, 0.45, caption, ha="center", va="top", fontsize=9, color=INK, linespacing=1.35)
    cell(axes, 0.1, 4.5, PALE)
    axes.text(0.33, 4.57, "patch", va="center", fontsize=9.5, color=INK)
    cell(axes, 1.0, 4.5, ORANGE)
    axes.text(1.23, 4.57, "anchor: one learned token per row of patches", va="center", fontsize=9.5, color=INK)
    cell(axes, 4.8, 4.5, GREY, is_dropped=True)
    axes.text(5.03, 4.57, "dropped", va="center", fontsize=9.5, color=INK)
    return figure


if __name__ == "__main__":
    draw().savefig(Path(__file__).with_name("architecture.png"))
