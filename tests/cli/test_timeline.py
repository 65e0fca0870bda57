"""The timeline picture: what it shows, which files it accepts, and what it leaves behind when something goes wrong."""

import numpy as np
import pytest
from PIL import Image

from mambamia_hf.cli.opening import PLOT_FORMATS
from mambamia_hf.cli.timeline import MAX_THUMBNAILS, format_time, plot_timeline, thumbnail_frames


# Found nowhere else in the picture; the hue rises with the number.
COLOURS = [(0, 90, 60), (20, 120, 30), (60, 160, 20), (120, 200, 10), (180, 230, 40), (90, 20, 160), (140, 0, 200)]
COLOURS.append((200, 0, 220))


def draw(path, num_frames, kept_frames, height=60, width=80, seconds=1.0, **kwargs):
    """Draws a video whose kept frames each have one of `COLOURS`, and returns the numbers of the frames shown."""
    rng = np.random.default_rng(0)
    loaded = []

    def load_thumbnails(numbers):
        loaded.append(numbers)
        images = np.empty((len(numbers), height, width, 3), dtype=np.uint8)
        images[:] = np.array(COLOURS[: len(numbers)], dtype=np.uint8)[:, None, None]
        return images

    plot_timeline(
        path, seconds * np.arange(num_frames), rng.uniform(0, 1, num_frames), kept_frames, load_thumbnails, **kwargs
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
    ("num_frames", "kept_frames", "height", "width"),
    [
        (1, [0], 60, 80),
        (6, [1, 4], 100, 50),
        (64, list(range(0, 64, 2)), 36, 64),
        (384, list(range(384)), 90, 60),
        (384, list(range(370, 384)), 60, 80),
    ],
)
def test_thumbnails_stand_side_by_side_in_their_own_shape(tmp_path, num_frames, kept_frames, height, width):
    path = tmp_path / "timeline.png"
    shown = draw(path, num_frames, kept_frames, height, width, name="video.mp4", answers=[("What?", "This.")])
    assert set(shown) <= set(kept_frames)
    assert len(shown) == min(len(kept_frames), MAX_THUMBNAILS)
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


@pytest.mark.parametrize(
    "answers",
    [
        [("Is it $5, $\\frac or $x_{?" + 40 * " WORDS", 300 * "w")],
        [("Is it $5, $\\frac or $x_{?" + 40 * " WORDS", 300 * "w"), ("Who?", "me")],
        [("W" * 30 * number, "w" * 30 * number) for number in range(1, 9)],
    ],
)
def test_titles_are_plain_text_and_stay_inside(tmp_path, answers):
    path = tmp_path / "timeline.png"
    draw(path, 5, [2], name="$" + 300 * "w", answers=answers)
    image = np.asarray(Image.open(path).convert("L"))
    assert (image[:200] < 128).any()
    assert (image[:, -40:] > 250).all(), "the title runs out of the picture"
    # Titles end above the line with name and legend, which is 1.82 inches from the top; there the name ends in time.
    assert (image[255:260] > 250).all()
    assert (image[260:290, 1440:1470] > 250).all()


def test_lines_from_the_thumbnails_end_at_the_axis(tmp_path):
    path = tmp_path / "timeline.png"
    draw(path, 9, [0, 4, 8])
    image = np.asarray(Image.open(path).convert("RGB")).astype(int)
    reddish = (image[..., 0] - image[..., 2] > 60) & (image[..., 1] < 215)
    boxes = coloured_boxes(path, 3)
    axis = max(row for row in range(boxes[0][1]) if (image[row, 200:1900] < 215).all(axis=1).mean() > 0.8)
    # Where each line leaves the axis: at 0, a half and all of the time, which fills 1 / 1.02 of the axis.
    left, width = 150 * 0.95, 150 * (13.333 - 0.95 - 0.55)
    for share in (0, 0.5, 1):
        column = round(left + width * (0.01 + share) / 1.02)
        assert reddish[axis + 2, column - 8 : column + 9].any()


def test_thumbnails_are_the_frames_of_the_largest_delta():
    deltas = np.full(100, 0.1)
    deltas[[7, 8, 50, 93, 94]] = 0.9
    kept = [7, *range(0, 100, 2)]  # 93 is not among them
    shown = thumbnail_frames(deltas, sorted(kept))
    assert len(shown) == MAX_THUMBNAILS and shown == sorted(shown)
    assert {7, 8, 50, 94} <= set(shown) <= set(kept)
    assert thumbnail_frames(deltas, [3, 4]) == [3, 4]


@pytest.mark.parametrize(
    ("seconds", "decimals", "text"),
    [(0, 0, "0:00"), (59.6, 0, "1:00"), (61.25, 1, "1:01.2"), (3599.96, 1, "1:00:00.0"), (5025, 0, "1:23:45")],
)
def test_times(seconds, decimals, text):
    assert format_time(seconds, decimals) == text


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
    with pytest.raises(ValueError, match="timestamps|kept_frames"):
        plot_timeline(tmp_path / "timeline.png", timestamps, deltas, selected, load_thumbnails=None)
    assert not list(tmp_path.iterdir())
