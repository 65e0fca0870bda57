from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from needle.glyphs import COLOURS, DIGITS, SHAPES
from needle.plan import SPLITS, NeedleVideo
from needle.video import needle_image, write_needle_video
from needle_pixels import changed_area, decode, render
from video_files import draw_number, read_number, write_video


def numbered_clip(path, num_frames=20, fps=4):
    images = [draw_number(number, 120, 160) for number in range(num_frames)]
    return write_video(path, num_frames=num_frames, fps=fps, images=images)


def test_a_video_as_background(tmp_path):
    clip = numbered_clip(tmp_path / "clip.mp4")
    starts = set()
    for seed in range(4):
        video = write_needle_video(tmp_path / "video.mp4", seed, duration=20.0, size=(96, 128), background=clip)
        assert video.background == clip
        frames, times = decode(video.path)
        (needle,) = video.needles
        numbers = np.array([read_number(frame.transpose(2, 0, 1)) for frame in frames])
        hidden = (times > needle.start - 0.1) & (times < needle.start + needle.duration - 0.1)
        # Two of the four frames per second of the clip, which starts again after 5 s.
        expected = (numbers[0 if not hidden[0] else -10] + 2 * np.arange(len(times))) % 20
        assert (numbers == expected)[~hidden].all()
        area = changed_area(frames, render(replace(video, needles=[])))
        assert area[hidden].min() > 0.008 and area[~hidden].max() < 0.004
        starts.add(numbers[0])
    assert len(starts) > 1


def test_a_background_is_cropped_to_the_middle(tmp_path):
    white = np.zeros((48, 160, 3), np.uint8)
    white[:, 56:104] = 255
    clip = write_video(tmp_path / "clip.mp4", num_frames=3, images=[white] * 3)
    video = NeedleVideo(0, 2, 1.0, (64, 64), [], background=clip)
    assert render(video).min() > 230


def test_no_background_at_that_path(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.mp4"):
        write_needle_video(tmp_path / "video.mp4", 0, background=tmp_path / "nowhere.mp4")
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(ValueError, match="text.mp4' cannot be read as a video"):
        write_needle_video(tmp_path / "video.mp4", 0, background=tmp_path / "text.mp4")
    assert [path.name for path in tmp_path.iterdir()] == ["text.mp4"]


def test_seeds_give_different_backgrounds_and_needles():
    videos = [NeedleVideo(seed, 1, 1.0, (64, 64), []) for seed in (*range(20), 2**32)]
    for one, other in combinations([render(video) for video in videos], 2):
        assert np.abs(one - other).mean() > 4
    needles = [needle_image(seed, (64, 64))[1] for seed in range(200)]
    assert {needle.value for needle in needles} == {*SHAPES, *DIGITS}
    assert {needle.colour for needle in needles} == {*COLOURS}
    assert len({(needle.x, needle.y, needle.size) for needle in needles}) == 200


def test_splits_share_no_backgrounds():
    for seed in range(60):
        one, other = (render(NeedleVideo(seed, 1, 1.0, (64, 96), [], split=split)) for split in SPLITS)
        assert np.abs(one - other).mean() > 4


def test_the_picture_moves_and_cuts():
    frames = render(NeedleVideo(2, 64, 2.0, (64, 64), []))
    change = np.abs(np.diff(frames, axis=0)).mean(axis=(1, 2, 3))
    assert change.min() > 0
    assert change.max() > 4 * np.median(change)
