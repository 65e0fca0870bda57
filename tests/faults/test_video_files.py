"""What files say beside their frames, and what is opened at all: nothing is believed that can be checked."""

import io
import os
import struct
import threading
import warnings
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from video_files import draw_number, read_numbers, write_sound, write_video

from mambamia_hf import MambaMiaVideoProcessor
from mambamia_hf.messages import printable, without_secrets
from mambamia_hf.video_decoding import VideoReader, decode_video
from mambamia_hf.video_sources import VideoLimits


RED, GREEN, BLUE, WHITE = (200, 0, 0), (0, 200, 0), (0, 0, 200), (255, 255, 255)


@pytest.fixture(autouse=True)
def no_unexpected_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


def four_colours() -> np.ndarray:
    image = np.zeros((48, 64, 3), dtype=np.uint8)
    image[:24, :32], image[:24, 32:], image[24:, :32], image[24:, 32:] = RED, GREEN, BLUE, WHITE
    return image


def corners(frame: torch.Tensor) -> str:
    """The colours of the corners, row by row."""
    height, width = frame.shape[1:]
    values = [frame[:, y, x].int() for y in (height // 4, 3 * height // 4) for x in (width // 4, 3 * width // 4)]
    return "".join("W" if value.min() > 150 else "RGB"[int(value.argmax())] for value in values)


def write_turned(path: Path, a: int, b: int, c: int, d: int) -> Path:
    """Writes `four_colours` with a display matrix of these parts, in units of 1 / 65536."""
    content = bytearray(write_video(path, images=[four_colours()] * 5).read_bytes())
    start = content.index(b"tkhd") + 44
    content[start : start + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(content)
    return path


class TestPictures:
    @pytest.mark.parametrize(
        ("matrix", "expected"),
        [
            ((1, 0, 0, 1), "RGBW"),
            ((0, 1, -1, 0), "BRWG"),
            ((-1, 0, 0, -1), "WBGR"),
            ((0, -1, 1, 0), "GWRB"),
            ((-1, 0, 0, 1), "GRWB"),
            ((1, 0, 0, -1), "BWRG"),
            ((0, 1, 1, 0), "RBGW"),
            ((0, -1, -1, 0), "WGBR"),
        ],
    )
    def test_orientation(self, tmp_path, matrix, expected):
        path = write_turned(tmp_path / "v.mp4", *(value << 16 for value in matrix))
        frames, metadata = decode_video(path)
        assert corners(frames[0]) == expected
        assert frames.shape[2:] == ((48, 64) if matrix[0] else (64, 48))
        assert (metadata.height, metadata.width) == frames.shape[2:]

    @pytest.mark.parametrize(
        "matrix", [(2 << 16, 0, 0, 2 << 16), (1 << 15, 3, -3, 1 << 15), (1 << 16, 700, -700, 1 << 16)]
    )
    def test_orientation_in_other_units_and_rounded(self, tmp_path, matrix):
        frames, _ = decode_video(write_turned(tmp_path / "v.mp4", *matrix))
        assert corners(frames[0]) == "RGBW" and frames.shape[2:] == (48, 64)

    @pytest.mark.parametrize(
        "matrix",
        [
            (0, 0, 0, 0),
            (0, 0, 0, 1 << 16),
            (2**31 - 1,) * 4,
            (-(2**31),) * 4,
            (1 << 16, 1 << 16, 0, 1 << 16),
            (1 << 16, 1 << 30, 0, 1 << 16),
            (56756, 32768, -32768, 56756),
            (0, 1 << 16, -(1 << 22), 0),
        ],
    )
    def test_orientation_that_is_none(self, tmp_path, matrix):
        """Zeroed, enormous, sheared by a flipped bit, a twelfth of a turn, and stretched."""
        with pytest.warns(UserWarning, match="display matrix of .*v.mov' is no quarter turn or mirror image"):
            frames, _ = decode_video(write_turned(tmp_path / "v.mov", *matrix))
        assert corners(frames[0]) == "RGBW"

    @pytest.mark.parametrize(("ratio", "size"), [("4/3", (48, 85)), ("1/2", (96, 64)), ("1/1", (48, 64))])
    def test_pixels_that_are_not_square(self, tmp_path, ratio, size):
        path = write_video(tmp_path / "v.mp4", codec_options={"bf": "0", "aspect": ratio})
        frames, metadata = decode_video(path, lambda metadata: np.array([5, 30]))
        assert frames.shape[2:] == size and read_numbers(frames) == [5, 30]
        assert (metadata.height, metadata.width) == size

    def test_transparency_is_white_as_in_arrays(self, tmp_path):
        path = tmp_path / "v.mov"
        image = np.zeros((48, 64, 4), dtype=np.uint8)
        image[..., 1], image[:, 32:, 3], image[24:, :32, 3] = 200, 255, 100
        with av.open(str(path), "w") as container:
            stream = container.add_stream("png", rate=10)
            stream.height, stream.width, stream.pix_fmt = 48, 64, "rgba"
            for _ in range(3):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgba")))
            container.mux(stream.encode())
        kwargs = {"do_resize": False, "do_normalize": False, "do_rescale": False, "do_sample_frames": False}
        processor = MambaMiaVideoProcessor(**kwargs)
        from_file = processor(str(path), return_tensors="pt").pixel_values_videos
        from_array = processor(np.stack([image] * 3), return_tensors="pt").pixel_values_videos
        assert (from_file.float() - from_array.float()).abs().max() <= 1
        assert from_file[0, 0, :, 0, 0].tolist() == [255, 255, 255]

    @pytest.mark.parametrize("pixel_format", ["pal8", "rgb24"])
    def test_palettes(self, tmp_path, pixel_format):
        # The palette comes with the first packet only.
        path = tmp_path / "v.avi"
        with av.open(str(path), "w") as container:
            stream = container.add_stream("rawvideo", rate=10)
            stream.height, stream.width, stream.pix_fmt = 48, 64, pixel_format
            for number in range(20):
                frame = av.VideoFrame.from_ndarray(draw_number(number), format="rgb24")
                if pixel_format == "pal8":
                    indices = (draw_number(number)[..., 0] > 127).astype(np.uint8)
                    palette = np.zeros((256, 4), dtype=np.uint8)
                    palette[:, 0], palette[1] = 255, 255
                    frame = av.VideoFrame.from_ndarray((indices, palette), format="pal8")
                frame.pts = number
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        frames, _ = decode_video(path, lambda metadata: np.array([3, 17]))
        assert read_numbers(frames) == [3, 17]

    def test_the_stream_that_a_player_shows(self, tmp_path):
        path = tmp_path / "v.mkv"
        with av.open(str(path), "w") as container:
            streams = []
            for height, width in ((24, 32), (48, 64), (36, 48)):
                stream = container.add_stream("libx264", rate=10)
                stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
                stream.disposition = 0
                streams.append(stream)
            for number in range(10):
                for stream in streams:
                    image = draw_number(number, stream.height, stream.width)
                    frame = av.VideoFrame.from_ndarray(image, format="rgb24")
                    frame.pts = number
                    container.mux(stream.encode(frame))
            for stream in streams:
                container.mux(stream.encode())
        frames, _ = decode_video(path)
        assert frames.shape == (10, 3, 48, 64) and read_numbers(frames) == list(range(10))


class TestDamage:
    def test_wrong_pictures_are_named(self, tmp_path):
        images = [np.random.default_rng(number).integers(0, 255, (96, 128, 3), np.uint8) for number in range(30)]
        path = write_video(tmp_path / "v.mp4", images=images, codec_options={"bf": "0", "sc_threshold": "0"})
        with av.open(str(path)) as container:
            packets = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
        content = bytearray(path.read_bytes())
        position, size = packets[13]
        for offset in range(size // 3, size // 2):
            content[position + offset] ^= 0x55
        path.write_bytes(content)
        with pytest.warns(UserWarning, match=r"of the sampled frames, 13 \(1\.3 s\), 17 \(1\.7 s\) may show wrong"):
            frames, _ = decode_video(path, lambda metadata: np.array([5, 13, 17, 25]))
        assert len(frames) == 4

    def test_flv_whose_header_changes(self, tmp_path):
        # A recording that went on after a reconnect, with another encoder.
        parts = []
        for name, numbers, parameters in (("a.flv", range(20), "cabac=0"), ("b.flv", range(20, 40), "cabac=1")):
            images = [draw_number(number) for number in numbers]
            options = {"bf": "0", "x264-params": parameters}
            path = write_video(tmp_path / name, images=images, start=numbers[0] / 10, codec_options=options)
            parts.append(path.read_bytes())
        path = tmp_path / "v.flv"
        path.write_bytes(parts[0] + parts[1][13:])
        for wanted in ([5, 15, 25, 35], [33], list(range(40))):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                frames, metadata = decode_video(path, lambda metadata, wanted=wanted: np.array(wanted))
            assert metadata.total_num_frames == 40
            assert read_numbers(frames) == wanted

    def test_announced_frames_are_compared_with_the_size(self, tmp_path):
        path = write_video(tmp_path / "v.mp4")
        content = bytearray(path.read_bytes())
        position = content.index(b"stsz") + 8
        content[position : position + 8] = struct.pack(">II", 10, 300_000)
        position = content.index(b"stts") + 12
        content[position : position + 4] = struct.pack(">I", 300_000)
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"announces 300000 frames in \d+ bytes|cannot be read"):
            decode_video(path, lambda metadata: np.array([0]))


class TestDurations:
    @pytest.mark.parametrize("suffix", ["flv", "mkv", "mp4", "ts"])
    @pytest.mark.parametrize("start", [0.0, 6.0])
    def test_sound_may_be_longer_than_the_picture(self, tmp_path, suffix, start):
        path = tmp_path / f"v.{suffix}"
        with av.open(str(path), "w") as container:
            video = container.add_stream("libx264", rate=10, options={"bf": "0"})
            video.height, video.width, video.pix_fmt = 48, 64, "yuv420p"
            sound = container.add_stream("aac", rate=8000)
            for position in range(0, 8000 * 12, 1024):
                frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
                frame.rate, frame.pts = 8000, position
                container.mux(sound.encode(frame))
            container.mux(sound.encode())
            for number in range(20):
                frame = av.VideoFrame.from_ndarray(draw_number(number), format="rgb24")
                frame.pts = number + round(10 * start)
                container.mux(video.encode(frame))
            container.mux(video.encode())
        frames, metadata = decode_video(path)
        assert read_numbers(frames) == list(range(20))
        assert metadata.duration == pytest.approx(2.0, abs=0.11)


class TestNames:
    @pytest.mark.parametrize(
        "name",
        ["12:30.mp4", "http:a.mp4", "concat:a.mp4", "pipe:0.mp4", "file:a.mp4", "frame%03d.mp4", "-a.mp4", "a\nb.mp4"],
    )
    def test_a_file_is_a_file(self, tmp_path, monkeypatch, name):
        monkeypatch.chdir(tmp_path)
        write_video(tmp_path / "plain.mp4").rename(tmp_path / name)
        for source in (name, str(tmp_path / name), (tmp_path / name).as_uri()):
            assert read_numbers(decode_video(source, lambda metadata: np.array([7]))[0]) == [7]

    def test_names_that_are_not_unicode(self, tmp_path):
        name = os.fsdecode(os.fsencode(tmp_path) + b"/\xff.mp4")
        os.rename(write_video(tmp_path / "plain.mp4"), name)
        assert read_numbers(decode_video(name, lambda metadata: np.array([7]))[0]) == [7]

    def test_control_characters_never_reach_a_terminal(self, tmp_path):
        with pytest.raises(FileNotFoundError) as caught:
            decode_video(str(tmp_path / "\x1b[31m\rv.mp4"))
        assert r"\x1b[31m\rv.mp4" in str(caught.value)
        assert str(caught.value).isprintable()
        assert printable("ä 日本\t\x07") == r"ä 日本\t\x07"

    def test_secrets(self):
        assert without_secrets("https://me:pw@host.org/a/v.mp4?token=x#y") == "https://host.org/a/v.mp4"
        assert without_secrets("https://host.org?token=x") == "https://host.org"
        assert without_secrets("folder/12:30 a@b?.mp4") == "folder/12:30 a@b?.mp4"

    def test_pipes(self, tmp_path):
        content = write_video(tmp_path / "v.mp4").read_bytes()
        reading, writing = os.pipe()

        def feed():
            with open(writing, "wb") as file:
                file.write(content)

        threading.Thread(target=feed).start()
        try:
            frames, _ = decode_video(f"/dev/fd/{reading}", lambda metadata: np.array([7]))
        finally:
            os.close(reading)
        assert read_numbers(frames) == [7]

    def test_standard_input(self, tmp_path, monkeypatch):
        content = write_video(tmp_path / "v.mp4").read_bytes()
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))
        assert read_numbers(decode_video("-", lambda metadata: np.array([7]))[0]) == [7]

    def test_an_open_file_is_read_from_its_start(self, tmp_path):
        file = io.BytesIO(write_video(tmp_path / "v.mp4").read_bytes())
        file.read()
        assert read_numbers(decode_video(file, lambda metadata: np.array([7]))[0]) == [7]

    @pytest.mark.parametrize("kind", ["bytes", "file"])
    def test_processor(self, tmp_path, kind):
        path = write_video(tmp_path / "v.mp4")
        processor = MambaMiaVideoProcessor(size={"height": 48, "width": 64})
        expected = processor(str(path), return_tensors="pt").pixel_values_videos
        source = path.read_bytes() if kind == "bytes" else io.BytesIO(path.read_bytes())
        for videos in (source, [source]):
            assert torch.equal(processor(videos, return_tensors="pt").pixel_values_videos, expected)
        with pytest.raises(ValueError, match="cannot be read as a video") as caught:
            processor(bytes(3_000_000))
        assert len(str(caught.value)) < 300


class TestWhatIsOpened:
    @pytest.mark.parametrize("name", ["v.m3u8", "v.mp4", "v.ffconcat", "v.sdp"])
    @pytest.mark.parametrize(
        "text",
        [
            "ffconcat version 1.0\nfile '{other}'\n",
            "ffconcat version 1.0\nfile '{own}'\n",
            "#EXTM3U\n#EXT-X-TARGETDURATION:4\n#EXTINF:4,\n{other}\n#EXT-X-ENDLIST\n",
            "#EXTM3U\n#EXT-X-TARGETDURATION:4\n#EXTINF:4,\n{own}\n#EXT-X-ENDLIST\n",
        ],
    )
    def test_a_file_never_opens_another(self, tmp_path, name, text):
        other = write_video(tmp_path / "other.ts")
        path = tmp_path / name
        path.write_text(text.format(other=other.name, own=name))
        with pytest.raises(ValueError, match="cannot be read as a video"):
            decode_video(path)

    def test_images(self, tmp_path):
        for name, options in (("v.webp", {}), ("v.gif", {}), ("v.png", {}), ("v.jpg", {})):
            Image.fromarray(draw_number(1)).save(tmp_path / name, **options)
            with pytest.raises(ValueError, match="is an image where a video is meant"):
                decode_video(tmp_path / name)

    def test_animations(self, tmp_path):
        pictures = [Image.fromarray(draw_number(number)) for number in range(6)]
        pictures[0].save(tmp_path / "v.gif", save_all=True, append_images=pictures[1:], duration=100, loop=0)
        assert read_numbers(decode_video(tmp_path / "v.gif")[0]) == list(range(6))

    def test_sound(self, tmp_path):
        with pytest.raises(ValueError, match="no video stream but audio"):
            decode_video(write_sound(tmp_path / "v.mp4"))


class TestLimits:
    def test_pixels(self, tmp_path):
        path = write_video(tmp_path / "v.mp4")
        with pytest.raises(ValueError, match="frames of 64 x 48 pixels, more than 3000"):
            decode_video(path, limits=VideoLimits(pixels=3000))
        with VideoReader(path, limits=VideoLimits(pixels=3072)) as reader:
            assert len(reader) == 40

    def test_pixels_of_later_frames(self, tmp_path):
        first = write_video(tmp_path / "a.h264", num_frames=20, codec_options={"bf": "0"})
        images = [draw_number(number, height=96, width=128) for number in range(20, 40)]
        second = write_video(tmp_path / "b.h264", images=images)
        path = tmp_path / "v.h264"
        path.write_bytes(first.read_bytes() + second.read_bytes())
        message = r"\d+ of its packets cannot be decoded"
        with pytest.warns(UserWarning, match=message), VideoReader(path, limits=VideoLimits(pixels=3072)) as reader:
            batch = reader.frames_at([5, 17])
        assert read_numbers(batch.data) == [5, 17]

    def test_copied_bytes(self, tmp_path):
        content = write_video(tmp_path / "v.mp4").read_bytes()
        limits = VideoLimits(copied_bytes=len(content) - 1)
        for source in (content, io.BytesIO(content)):
            with pytest.raises(ValueError, match=rf"The given video has more than {len(content) - 1} bytes"):
                decode_video(source, limits=limits)
        assert len(decode_video(tmp_path / "v.mp4", limits=limits)[0]) == 40
