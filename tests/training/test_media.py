"""Images and videos of records as pixels, from every kind of source."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from video_files import draw_number, read_numbers

from mambamia_hf.training import MediaReader


@pytest.fixture
def reader(processor, media_folder) -> MediaReader:
    return MediaReader(processor, media_folder)


@pytest.mark.parametrize("how", ["bytes", "dict of bytes", "dict of a path"])
def test_sources_of_videos(reader, media_folder, how):
    source = {
        "bytes": (media_folder / "a.mp4").read_bytes(),
        "dict of bytes": {"bytes": (media_folder / "a.mp4").read_bytes(), "path": "a.mp4"},
        "dict of a path": {"bytes": None, "path": "a.mp4"},
    }[how]
    assert torch.equal(reader.read("video", source).tensor, reader.read("video", "a.mp4").tensor)


def test_a_video_of_frames(reader):
    video = reader.read("video", np.stack([draw_number(number) for number in range(3)])).tensor
    assert read_numbers(video * 127.5 + 127.5) == [0, 1, 2]


def test_a_folder_of_frames(processor, tmp_path):
    """As those of LLaVA-Hound in LLaVA-Video-178K, which are 2 per second; the order is that of the numbers."""
    (tmp_path / "frames").mkdir()
    for number in range(12):
        Image.fromarray(draw_number(number)).save(tmp_path / "frames" / f"c01_{number}.png")
    reader = MediaReader(processor, tmp_path)
    video = reader.read("video", "frames")
    assert read_numbers(video.tensor * 127.5 + 127.5) == list(range(12))
    assert video.times.tolist() == [number / 2 for number in range(12)] and video.duration == 6
    part = reader.read("video", {"path": "frames", "video_start": 1.0, "video_end": 3.0})
    assert read_numbers(part.tensor * 127.5 + 127.5) == [2, 3, 4, 5]
    fewer = MediaReader(processor, tmp_path, num_frames=3).read("video", "frames")
    assert read_numbers(fewer.tensor * 127.5 + 127.5) == [2, 6, 10]
    slower = MediaReader(processor, tmp_path, fps=1).read("video", "frames")
    assert len(slower.tensor) == 12 and slower.duration == 12
    with pytest.raises(ValueError, match="has no images"):
        reader.read("video", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="no video file"):
        MediaReader(processor, tmp_path / "frames").read("video", "gone")


@pytest.mark.parametrize("how", ["bytes", "dict of bytes", "PIL"])
def test_sources_of_images(reader, media_folder, how):
    content = (media_folder / "a.png").read_bytes()
    source = {"bytes": content, "dict of bytes": {"bytes": content}, "PIL": Image.open(io.BytesIO(content))}[how]
    assert torch.equal(reader.read("image", source).tensor, reader.read("image", "a.png").tensor)


def test_pixels_are_those_of_the_processor(reader, processor, media_folder):
    expected = processor.video_processor(str(media_folder / "a.mp4"), return_tensors="pt")["pixel_values_videos"]
    assert torch.equal(reader.read("video", "a.mp4").tensor, expected[0])
    expected = processor.image_processor(Image.open(media_folder / "a.png"), return_tensors="pt")["pixel_values"]
    assert torch.equal(reader.read("image", "a.png").tensor, expected[0])


def test_frames_at_most(processor, media_folder):
    few = MediaReader(processor, media_folder, num_frames=6)
    assert len(few.read("video", "a.mp4").tensor) == 6 and len(few.read("video", "b.mp4").tensor) == 4
    assert len(MediaReader(processor, media_folder, fps=5).read("video", "a.mp4").tensor) == 20
    assert processor.video_processor.num_frames == 384 and processor.video_processor.fps == 2


def test_addresses_are_not_relative_to_the_folder(reader, media_folder):
    assert reader.locate("https://host/a.mp4") == "https://host/a.mp4"
    assert reader.locate("a.mp4") == str(media_folder / "a.mp4")
