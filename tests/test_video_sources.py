"""Every form in which people hold a video or an image gives what its file gives: processors, chats and training."""

import base64
import datetime
import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_model import tiny_processor
from video_files import draw_number, read_numbers, write_video

from mambamia_hf.training import MediaReader
from mambamia_hf.video_sources import VideoPart


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    """40 frames, 10 per second; there is a space in its name."""
    return write_video(tmp_path_factory.mktemp("sources") / "a video.mp4", num_frames=40)


@pytest.fixture(scope="module")
def processor():
    return tiny_processor()


def data_address(path: Path, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def from_tar(path: Path) -> bytes:
    """A file as webdataset reads it: bytes from the middle of an archive."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        tar.add(path, arcname="0001.mp4")
    archive.seek(0)
    with tarfile.open(fileobj=archive) as tar:
        return tar.extractfile("0001.mp4").read()


def undecoded(path: Path) -> dict:
    """An item of `datasets`, which leaves decoding to us."""
    datasets = pytest.importorskip("datasets")
    feature = datasets.Video(decode=False)
    return datasets.Dataset.from_dict({"video": [str(path)]}).cast_column("video", feature)[0]["video"]


def decoded(path: Path):
    """An item of `datasets`, decoded as it does by default: a decoder of torchcodec."""
    datasets = pytest.importorskip("datasets")
    torchcodec_decoder(path)  # skips
    return datasets.Dataset.from_dict({"video": [str(path)]}).cast_column("video", datasets.Video())[0]["video"]


def torchcodec_decoder(path: Path):
    try:
        from torchcodec.decoders import VideoDecoder
    except (ImportError, RuntimeError):
        pytest.skip("torchcodec and the libraries of FFmpeg are not installed")
    return VideoDecoder(str(path))


FORMS = {
    "path": Path,
    "text": str,
    "file address": Path.as_uri,
    "data address": lambda path: data_address(path, "video/mp4"),
    "bytes": Path.read_bytes,
    "bytearray": lambda path: bytearray(path.read_bytes()),
    "memoryview": lambda path: memoryview(path.read_bytes()),
    "open file": lambda path: path.open("rb"),
    "file in memory": lambda path: io.BytesIO(path.read_bytes()),
    "from a tar": from_tar,
    "dictionary of bytes": lambda path: {"path": "elsewhere.mp4", "bytes": path.read_bytes()},
    "dictionary of a path": lambda path: {"path": str(path), "bytes": None},
    "datasets, not decoded": undecoded,
    "datasets, decoded": decoded,
    "decoder": torchcodec_decoder,
}


@pytest.mark.parametrize("form", FORMS)
class TestForms:
    @pytest.fixture
    def source(self, form, path):
        return FORMS[form](path)

    def test_processor(self, processor, path, source):
        expected = processor(text="<|video_pad|>", videos=str(path), return_tensors="pt")
        got = processor(text="<|video_pad|>", videos=[source], return_tensors="pt")
        assert read_numbers(got["pixel_values_videos"][0] * 127.5 + 127.5) == [2, 7, 12, 17, 22, 27, 32, 37]
        assert got.keys() == expected.keys()
        for name in expected:
            torch.testing.assert_close(got[name], expected[name])

    def test_chat(self, processor, path, source):
        entry = {"type": "video", "video": source, "video_start": 1.0, "video_end": 3.0}
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": [entry, {"type": "text", "text": "What?"}]}],
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        assert read_numbers(inputs["pixel_values_videos"][0] * 127.5 + 127.5) == [12, 17, 22, 27]
        assert inputs["video_timestamps"][0].tolist() == pytest.approx([1.2, 1.7, 2.2, 2.7])

    def test_training(self, processor, path, source, form):
        if form in ("path", "text", "dictionary of a path"):  # relative to the media folder
            source = {"path": path.name} if isinstance(source, dict) else path.name
        expected = MediaReader(processor).read("video", str(path))
        got = MediaReader(processor, path.parent).read("video", source)
        assert got.kind == "video"
        torch.testing.assert_close((got.tensor, got.times), (expected.tensor, expected.times))


class TestParts:
    def numbers(self, processor, videos, **kwargs) -> list[int]:
        pixels = processor.video_processor(videos, return_tensors="pt", **kwargs)["pixel_values_videos"]
        return read_numbers(pixels[0] * 127.5 + 127.5)

    def test_times_of_a_call(self, processor, path):
        assert self.numbers(processor, path, video_start=2.0) == [22, 27, 32, 37]
        assert self.numbers(processor, path, video_end=1.0) == [2, 7]
        assert self.numbers(processor, path, video_start=1, video_end=2, num_frames=5) == [11, 13, 15, 17, 19]
        assert self.numbers(processor, path, video_start=3.55, max_frames=100) == [35, 36, 37, 38, 39]
        assert self.numbers(processor, path, video_start=3.0, do_sample_frames=False) == list(range(30, 40))
        starts = {"sample_at": "start", "num_frames": 4}  # as processors of converted checkpoints
        assert self.numbers(processor, path, video_start=2.0, **starts) == [20, 25, 30, 35]
        assert self.numbers(processor, path, video_start=1, video_end=2, **starts) == [10, 12, 15, 18]

    def test_times_of_a_video_go_before_those_of_a_call(self, processor, path):
        videos = [VideoPart(str(path), 2.0), {"path": str(path), "video_end": 1.0}, str(path)]
        batch = processor.video_processor(videos, video_start=3.0, return_tensors="pt")
        numbers = [
            read_numbers(video[mask] * 127.5 + 127.5)
            for video, mask in zip(batch["pixel_values_videos"], batch["frame_mask"], strict=True)
        ]
        assert numbers == [[22, 27, 32, 37], [2, 7], [32, 37]]

    def test_a_variable_frame_rate(self, processor, tmp_path):
        times = [0.0, 0.1, 0.2, 2.0, 2.1, 4.0]
        path = write_video(tmp_path / "variable.mp4", num_frames=6, times=times)
        # The third frame is on display until 2 seconds.
        assert self.numbers(processor, path, video_start=1.0, video_end=2.05, do_sample_frames=False) == [2, 3]

    def test_frames_at_hand(self, processor):
        frames = np.stack([draw_number(number) for number in range(20)])
        known = [{"fps": 10, "total_num_frames": 20, "duration": 2.0}]
        assert self.numbers(processor, frames, video_metadata=known, video_start=1.0, fps=5) == [11, 13, 15, 17, 19]
        with pytest.raises(ValueError, match="frame rate of this video is unknown"):
            processor.video_processor(frames, video_start=1.0)

    @pytest.mark.parametrize(
        ("start", "end", "message"),
        [(-1, None, "nothing from"), (2, 2, "nothing from"), (3, 2, "nothing from"), (4.0, None, "ends after 4 sec")],
    )
    def test_impossible(self, processor, path, start, end, message):
        with pytest.raises(ValueError, match=message):
            processor.video_processor(path, video_start=start, video_end=end)


class TestAtMost:
    def count(self, processor, path, **kwargs) -> int:
        return processor.video_processor(str(path), return_tensors="pt", **kwargs)["frame_mask"].shape[1]

    def test_processor(self, processor, path):
        assert self.count(processor, path, max_frames=7) == 7
        assert self.count(processor, path, max_frames=32) == 32
        assert self.count(processor, path, max_frames=100) == 40
        assert self.count(processor, path, max_frames=100, fps=1) == 4
        assert self.count(processor, path, max_frames=3, fps=1) == 3
        with pytest.raises(ValueError, match="`num_frames=4` and `max_frames=4` are mutually exclusive"):
            self.count(processor, path, num_frames=4, max_frames=4)
        with pytest.raises(ValueError, match="`max_frames=0` leaves no frame"):
            self.count(processor, path, max_frames=0)

    def test_chat(self, processor, path):
        def count(**kwargs) -> int:
            content = [{"type": "video", "path": str(path)}]
            inputs = processor.apply_chat_template(
                [{"role": "user", "content": content}], tokenize=True, return_dict=True, return_tensors="pt", **kwargs
            )
            return inputs["frame_mask"].shape[1]

        assert count(num_frames=32) == 32 and count(num_frames=100) == 40 and count(num_frames=None) == 8
        assert count(processor_kwargs={"max_frames": 100}) == 40
        assert count(processor_kwargs={"num_frames": 12}) == 12
        with pytest.raises(ValueError, match="`num_frames=100` cannot be sampled from a video of 40 frames"):
            count(processor_kwargs={"num_frames": 100})


class TestImages:
    @pytest.fixture
    def picture(self, tmp_path) -> Path:
        path = tmp_path / "a picture.png"
        Image.fromarray(draw_number(7)).save(path)
        return path

    @pytest.mark.parametrize(
        "form",
        [
            str,
            Path,
            Path.as_uri,
            lambda path: data_address(path, "image/png"),
            Path.read_bytes,
            lambda path: {"path": None, "bytes": path.read_bytes()},
            lambda path: {"path": str(path), "bytes": None},
            lambda path: path.open("rb"),
            Image.open,
        ],
    )
    def test_forms(self, processor, picture, form):
        expected = processor(text="<|image_pad|>", images=Image.open(picture), return_tensors="pt")
        got = processor(text="<|image_pad|>", images=[form(picture)], return_tensors="pt")
        assert torch.equal(got["pixel_values"], expected["pixel_values"])
        trained = MediaReader(processor, picture.parent).read("image", form(picture)).tensor
        assert torch.equal(trained, expected["pixel_values"][0])

    def test_empty_lists_are_none(self, processor):
        assert "pixel_values" not in processor(text=["Hello"], images=[[]], return_tensors="pt")
        assert "pixel_values" not in processor(text="Hello", images=[], return_tensors="pt")


@pytest.mark.parametrize(
    ("video", "message"),
    [
        ({"path": None, "bytes": None}, "give it `bytes` or a `path`"),
        ({}, "a dictionary with nothing in it"),
        ("data:video/mp4;base64,@@@", "is no base64"),
        ("data:video/mp4;base64,", "is empty"),
        ("data:,no%20video", "cannot be read as a video"),
        ("file:///nowhere/none.mp4", "There is no video file at '/nowhere/none.mp4'"),
        (io.StringIO("text"), "open it in binary mode"),
        (datetime.date(2026, 1, 1), "holds datetime.date"),
    ],
)
def test_what_is_no_video(processor, video, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        processor.video_processor([video])
