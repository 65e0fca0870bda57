"""Names of videos and checkpoints, judged without loading anything."""

import pytest

from mambamia_hf.inputs import check_checkpoint, check_part, check_video, frame_files


def test_frames_are_in_the_order_of_their_numbers(tmp_path):
    names = ["2.png", "10.png", "a1b2.JPG", "a1b10.jpg", "a2.jpeg", "b.webp"]
    for name in [*reversed(names), "notes.txt", "._2.png", "²"]:
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    assert [path.name for path in frame_files(tmp_path)] == names


def test_superscripts_are_no_numbers(tmp_path):
    for name in ("x².png", "x2.png", "x٣.png"):
        (tmp_path / name).touch()
    assert [path.name for path in frame_files(tmp_path)] == ["x2.png", "x٣.png", "x².png"]


@pytest.mark.parametrize("video", ["http://example.com/video.mp4", "https://example.com/video"])
def test_urls_are_left_to_the_download(video):
    check_video(video)


@pytest.mark.parametrize("video", ["file:///video.mp4", "ftp://example.com/video.mp4", "video.mp4"])
def test_a_video_that_is_nowhere(video):
    with pytest.raises(FileNotFoundError, match="check the path"):
        check_video(video)


@pytest.mark.parametrize(("start", "end"), [(-1.0, None), (2.0, 2.0), (2.0, 1.0), (0.0, 0.0)])
def test_empty_parts(start, end):
    with pytest.raises(ValueError, match="nothing from"):
        check_part(start, end)


def test_parts():
    check_part(0.0, None)
    check_part(5.0, 5.5)


@pytest.mark.parametrize("name", ["name", "some-body/model_1.5", "o/m"])
def test_hub_ids_are_left_to_the_hub(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    check_checkpoint(name)


@pytest.mark.parametrize("name", ["./model", "/models/mine", "a/b/c", "model/", "~/model", "my model", ""])
def test_what_is_neither_a_folder_nor_a_hub_id(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="no folder"):
        check_checkpoint(name)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"model_type": "llava"}'])
def test_folders_of_something_else(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match="MambaMia checkpoint"):
        check_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "mambamia"}')
    check_checkpoint(tmp_path)
