"""What the page shows, as HTML and Markdown."""

import pytest
import torch

from mambamia_hf.web.render import (
    MAX_THUMBNAILS,
    THUMBNAIL_PIXELS,
    answer_markdown,
    clock,
    evidence_markdown,
    notice,
    shrink,
    thumbnail_frames,
    timeline,
)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (59.96, "1:00"), (61.5, "1:01.5"), (754, "12:34"), (3599.99, "1:00:00"), (3661, "1:01:01")],
)
def test_times_as_people_write_them(seconds, text):
    assert clock(seconds) == text


@pytest.mark.parametrize(
    ("answer", "markdown"),
    [
        ("12:34", "[12:34](#t=754)"),
        ("At 0:05, then at 00:12.", "At [0:05](#t=5), then at [00:12](#t=12)\\."),
        ("1:02:03 and 00:07.5", "[1:02:03](#t=3723) and [00:07.5](#t=7.5)"),
        ("90:00", "[90:00](#t=5400)"),
        ("from 0:05-0:10", "from [0:05](#t=5)\\-[0:10](#t=10)"),
    ],
)
def test_times_within_the_video_are_links(answer, markdown):
    assert answer_markdown(answer, duration=7200) == markdown


@pytest.mark.parametrize("answer", ["12:34", "1:75", "2:1", "1:00:00:00", "10:10:10:10", "3:00:00", "1.2:30"])
def test_what_is_no_time_of_the_video_is_no_link(answer):
    assert "](" not in answer_markdown(answer, duration=600)


def test_an_answer_shows_its_very_characters():
    text = answer_markdown("<img src=x> **a** [b](c) `d` & #e", duration=60)
    assert text == r"&lt;img src=x&gt; \*\*a\*\* \[b\]\(c\) \`d\` &amp; \#e"


def test_evidence_is_links():
    rows = [{"time": 15.5, "delta": 0.1, "attention": 0.3}, {"time": 3700.0, "delta": 0.1, "attention": 0.2}]
    assert evidence_markdown(rows) == "*Looked most at* [0:15.5](#t=15.5) · [1:01:40](#t=3700)"
    assert evidence_markdown([{**row, "attention": None} for row in rows]).startswith("*Δ is largest at*")
    assert evidence_markdown([]) == ""


def test_a_notice_is_one_escaped_sentence():
    assert "No &lt;b&gt;." in notice("no <b>.", is_error=True)
    assert 'role="alert"' in notice("no.", is_error=True)
    assert notice("") == ""


@pytest.mark.parametrize("num_frames", [1, 5, MAX_THUMBNAILS, 384, 1000])
def test_the_most_important_frame_of_each_part_is_shown(num_frames):
    importance = torch.rand(num_frames, generator=torch.Generator().manual_seed(0)).tolist()
    shown = thumbnail_frames(num_frames, importance)
    assert len(shown) == min(num_frames, MAX_THUMBNAILS)
    assert shown == sorted(set(shown)) and 0 <= shown[0] and shown[-1] < num_frames
    assert importance.index(max(importance)) in shown
    assert len(thumbnail_frames(num_frames, None)) == len(shown)


def test_thumbnails_are_small_and_keep_their_shape():
    image = shrink(torch.full((3, 720, 1280), 200, dtype=torch.uint8))
    assert (image.shape, image.dtype) == ((3, 90, THUMBNAIL_PIXELS), torch.uint8)
    assert image.unique().tolist() == [200]
    assert shrink(torch.zeros(3, 48, 64, dtype=torch.uint8)).shape == (3, 48, 64)


@pytest.mark.parametrize("deltas", [None, [0.0, 0.0, 0.0], [0.1, 0.5, 0.2]])
def test_a_timeline_leads_to_the_very_frames(deltas):
    times = [0.0, 100 / 3, 200 / 3]
    page = timeline(times, deltas, kept=[1], thumbnails={1: "data:image/jpeg;base64,abc"})
    assert [f'href="#t={time}"' in page for time in ("0", "33.333333", "66.666667")] == [True] * 3
    assert page.count("<img") == 1
    assert ("mm-curve" in page) == (deltas is not None)
    assert "nan" not in page
    assert "3 frames, 1 " in page


def test_a_single_frame_has_a_timeline():
    assert 'href="#t=4"' in timeline([4.0], [0.3], kept=[0], thumbnails={})
