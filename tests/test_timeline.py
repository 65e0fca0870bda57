"""The timeline picture: what it shows, which files it accepts, and what it leaves behind when something goes wrong."""

import numpy as np
import pytest
import torch
from PIL import Image

from mambamia_hf.timeline import (
    MAX_THUMBNAILS,
    PLOT_FORMATS,
    check_plot_path,
    find_cuts,
    format_time,
    plot_timeline,
    thumbnail_frames,
)


# Found nowhere else in the picture; the hue rises with the number.
COLOURS = [(0, 90, 60), (20, 120, 30), (60, 160, 20), (120, 200, 10), (180, 230, 40), (90, 20, 160), (140, 0, 200)]
COLOURS.append((200, 0, 220))


def draw(path, num_frames, selected_frames, height=60, width=80, seconds=1.0, **kwargs):
    """Draws a video whose kept frames each have one of `COLOURS`, and returns the numbers of the frames shown."""
    rng = np.random.default_rng(0)
    loaded = []

    def load_frames(numbers):
        loaded.append(numbers)
        images = np.empty((len(numbers), height, width, 3), dtype=np.uint8)
        images[:] = np.array(COLOURS[: len(numbers)], dtype=np.uint8)[:, None, None]
        return images

    plot_timeline(
        path, seconds * np.arange(num_frames), rng.uniform(0, 1, num_frames), selected_frames, load_frames, **kwargs
    )
    assert len(loaded) == 1
    return loaded[0]


def coloured_boxes(path, count):
    """(left, top, width, height) in pixels of each of the first `COLOURS` in a picture."""
    image = np.asarray(Image.open(path).convert("RGB")).astype(int)
    boxes = []
    for colour in COLOURS[:count]:
        rows, columns = np.nonzero((abs(image - colour) <= 2).all(axis=2))
        boxes.append((columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1))
    return boxes


@pytest.mark.parametrize(
    ("num_frames", "selected_frames", "height", "width"),
    [
        (1, [0], 60, 80),
        (6, [1, 4], 100, 50),
        (64, list(range(0, 64, 2)), 36, 64),
        (384, list(range(384)), 90, 60),
        (384, list(range(370, 384)), 60, 80),
    ],
)
def test_thumbnails_stand_side_by_side_in_their_own_shape(tmp_path, num_frames, selected_frames, height, width):
    path = tmp_path / "timeline.png"
    shown = draw(path, num_frames, selected_frames, height, width, question="What?", answer="This.")
    assert set(shown) <= set(selected_frames)
    assert len(shown) == min(len(selected_frames), MAX_THUMBNAILS)
    boxes = coloured_boxes(path, len(shown))
    picture_width, picture_height = Image.open(path).size
    right = 0
    for left, top, box_width, box_height in boxes:
        assert left > right and top + box_height < picture_height
        assert box_width / box_height == pytest.approx(width / height, rel=0.08)  # the frame line covers some pixels
        right = left + box_width
    assert right < picture_width
    assert [entry.name for entry in tmp_path.iterdir()] == ["timeline.png"]


def test_every_format_is_written(tmp_path):
    for suffix in PLOT_FORMATS:
        draw(tmp_path / f"timeline.{suffix}", 4, [0, 3])
    for suffix in ("png", "jpg", "webp"):
        assert Image.open(tmp_path / f"timeline.{suffix}").size == (1999, 1125)
    assert (tmp_path / "timeline.svg").read_text().count("<image") == 2
    assert (tmp_path / "timeline.pdf").read_bytes().startswith(b"%PDF")
    assert len(list(tmp_path.iterdir())) == len(PLOT_FORMATS)


def test_titles_are_plain_text_and_stay_inside(tmp_path):
    path = tmp_path / "timeline.png"
    draw(path, 5, [2], question="Is it $5, $\\frac or $x_{?" + 40 * " WORDS", answer=300 * "w")
    image = np.asarray(Image.open(path).convert("L"))
    assert (image[:200] < 128).any()
    assert (image[:, -40:] > 250).all(), "the title runs out of the picture"


def test_cuts_change_the_picture(tmp_path):
    for cuts in ([], [3]):
        draw(tmp_path / f"{len(cuts)}.png", 8, [2], cuts=cuts)
    images = [np.asarray(Image.open(tmp_path / f"{count}.png").convert("RGB")).astype(int) for count in (0, 1)]
    changed = np.nonzero(abs(images[0] - images[1]).sum(axis=2).any(axis=0))[0]
    # Frames 2 and 3 of 0 to 7 stand at 2/7 and 3/7 of the axis, the cut between them; the legend is far to the right.
    left, right = (round(150 * inches) for inches in (0.95, 13.333 - 0.55))
    assert abs(changed.min() - (left + (right - left) * (0.01 + 2.5 / 7) / 1.02)) < 4


def test_thumbnails_are_the_frames_of_the_largest_delta():
    deltas = np.full(100, 0.1)
    deltas[[7, 8, 50, 93, 94]] = 0.9
    kept = [7, *range(0, 100, 2)]  # 93 is not among them
    shown = thumbnail_frames(deltas, sorted(kept))
    assert len(shown) == MAX_THUMBNAILS and shown == sorted(shown)
    assert {7, 8, 50, 94} <= set(shown) <= set(kept)
    assert thumbnail_frames(deltas, [3, 4]) == [3, 4]


def test_cuts_are_where_the_picture_changes_at_once():
    rng = torch.Generator().manual_seed(0)
    first, second = torch.rand(2, 1, 3, 8, 8, generator=rng).repeat_interleave(4, dim=-1).repeat_interleave(4, dim=-2)
    shots = torch.cat([first.repeat(6, 1, 1, 1), second.repeat(6, 1, 1, 1)])
    assert find_cuts(shots) == [6]
    fading = torch.lerp(first, second, torch.linspace(0, 1, 40).view(-1, 1, 1, 1))
    assert find_cuts(fading) == []
    restless = torch.rand(20, 3, 8, 8, generator=rng)
    assert find_cuts(restless) == []
    assert find_cuts(first) == []


@pytest.mark.parametrize(
    ("seconds", "decimals", "text"),
    [(0, 0, "0:00"), (59.6, 0, "1:00"), (61.25, 1, "1:01.2"), (3599.96, 1, "1:00:00.0"), (5025, 0, "1:23:45")],
)
def test_times(seconds, decimals, text):
    assert format_time(seconds, decimals) == text


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("plot.gif", "suffix"),
        ("plot", "suffix"),
        ("missing/plot.png", "no folder"),
        ("taken.png", "a folder in the place"),
        ("text.txt/plot.png", "no folder"),
    ],
)
def test_impossible_paths_are_refused_before_any_work(tmp_path, name, message):
    (tmp_path / "taken.png").mkdir()
    (tmp_path / "text.txt").write_text("")
    with pytest.raises(ValueError, match=message):
        check_plot_path(tmp_path / name)
    with pytest.raises(ValueError, match=message):
        plot_timeline(tmp_path / name, [0.0], [1.0], [0], load_frames=None)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["taken.png", "text.txt"]


def test_a_good_path_is_left_untouched(tmp_path):
    path = tmp_path / "timeline.PNG"
    assert check_plot_path(path) == path
    assert not list(tmp_path.iterdir())
    path.write_text("of before")
    assert check_plot_path(path).read_text() == "of before"


@pytest.mark.parametrize("images", [np.zeros((1, 4, 4, 7)), np.full((1, 4, 4, 3), "text")])
def test_a_failure_leaves_the_old_picture(tmp_path, images):
    path = tmp_path / "timeline.png"
    path.write_text("of before")
    with pytest.raises(TypeError):
        plot_timeline(path, [0.0, 1.0], [0.5, 0.1], [0], lambda numbers: images)
    assert path.read_text() == "of before"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("timestamps", "deltas", "selected"), [([0.0], [0.1, 0.2], [0]), ([], [], []), ([0.0], [0.1], []), ([0], [1], [1])]
)
def test_lists_that_do_not_fit_are_refused(tmp_path, timestamps, deltas, selected):
    with pytest.raises(ValueError, match="timestamps|selected_frames"):
        plot_timeline(tmp_path / "timeline.png", timestamps, deltas, selected, load_frames=None)
    assert not list(tmp_path.iterdir())
