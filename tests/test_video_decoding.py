import functools
import http.server
import io
import threading
import tracemalloc
import warnings

import av
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as tvF
from video_files import (
    HEIGHT,
    WIDTH,
    blank_frames,
    draw_number,
    read_numbers,
    write_cut_video,
    write_rotated_video,
    write_sound,
    write_video,
)

from mambamia_hf import video_decoding
from mambamia_hf.video_decoding import decode_video


class RecordingHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        self.server.requests.append(self.path)


@pytest.fixture
def server(tmp_path):
    """Serves the files of `tmp_path` at `server.address` and records in `server.requests` what was asked for."""
    handler = functools.partial(RecordingHandler, directory=tmp_path)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.address = f"http://127.0.0.1:{server.server_port}"
    server.requests = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def pick(*indices):
    return lambda metadata: np.array(indices)


def every(step):
    return lambda metadata: np.arange(0, metadata.total_num_frames, step)


CONTAINERS = {
    "mp4": {"name": "v.mp4"},
    "mp4 with sound": {"name": "v.mp4", "with_sound": True},
    "mp4 in fragments": {"name": "v.mp4", "container_options": {"movflags": "frag_keyframe+empty_moov"}},
    "mp4 without B-frames": {"name": "v.mp4", "codec_options": {"bf": "0"}},
    "mp4 with open groups": {"name": "v.mp4", "codec_options": {"bf": "3", "x264-params": "open-gop=1:scenecut=0"}},
    "mp4 of H.265": {"name": "v.mp4", "codec": "libx265", "codec_options": {"x265-params": "log-level=none"}},
    "mp4 that starts late": {"name": "v.mp4", "start": 7.5},
    "mkv": {"name": "v.mkv"},
    "mkv that starts late": {"name": "v.mkv", "start": 7.5},
    "mkv without duration or index": {"name": "v.mkv", "container_options": {"live": "1"}},
    "webm of VP8": {"name": "v.webm", "codec": "libvpx", "codec_options": {"deadline": "realtime"}},
    "webm of VP9": {"name": "v.webm", "codec": "libvpx-vp9", "codec_options": {"deadline": "realtime"}},
    "webm without duration or index": {
        "name": "v.webm",
        "codec": "libvpx-vp9",
        "codec_options": {"deadline": "realtime"},
        "container_options": {"live": "1"},
    },
    "mpeg-ts": {"name": "v.ts"},
    "flv": {"name": "v.flv"},
    "avi of MPEG-4": {"name": "v.avi", "codec": "mpeg4"},
    "avi of H.264": {"name": "v.avi"},
    "raw H.264": {"name": "v.h264"},
    "raw MPEG-4": {"name": "v.m4v", "codec": "mpeg4"},
}


@pytest.fixture(params=CONTAINERS)
def container_file(request, tmp_path):
    arguments = dict(CONTAINERS[request.param])
    return write_video(tmp_path / arguments.pop("name"), **arguments)


class TestContainers:
    def test_all_frames(self, container_file):
        frames, metadata = decode_video(container_file)
        assert frames.shape == (40, 3, HEIGHT, WIDTH) and frames.dtype == torch.uint8
        assert read_numbers(frames) == list(range(40))
        assert (metadata.total_num_frames, metadata.height, metadata.width) == (40, HEIGHT, WIDTH)
        assert metadata.duration == pytest.approx(4.0, abs=2e-3)
        assert metadata.fps == pytest.approx(10, abs=1e-2)
        assert metadata.timestamps == pytest.approx([number / 10 for number in range(40)], abs=1e-3)

    @pytest.mark.parametrize("indices", [[0], [39], [3, 25], [5, 6, 7, 19, 38], [9, 10, 11]])
    def test_some_frames(self, container_file, indices):
        frames, metadata = decode_video(container_file, pick(*indices))
        assert read_numbers(frames) == indices
        assert metadata.frames_indices == indices
        assert metadata.timestamps == pytest.approx([number / 10 for number in indices], abs=1e-3)


def test_order_and_repetitions_are_kept(tmp_path):
    frames, metadata = decode_video(write_video(tmp_path / "v.mp4"), pick(30, 2, 2, 17))
    assert read_numbers(frames) == [30, 2, 2, 17]
    assert metadata.timestamps == pytest.approx([3.0, 0.2, 0.2, 1.7])


@pytest.fixture
def decoded(monkeypatch):
    """What the decoder gets and gives while the test runs: pairs of a packet and the frames that come out with it."""
    pairs = []
    decode_packet = video_decoding._decode_packet

    def record(stream, packet):
        pairs.append((packet, decode_packet(stream, packet)))
        return pairs[-1][1]

    monkeypatch.setattr(video_decoding, "_decode_packet", record)
    return pairs


@pytest.mark.parametrize("name", ["v.mp4", "v.mkv", "v.ts", "v.flv"])
def test_only_what_is_needed_is_decoded(tmp_path, decoded, name):
    path = write_video(tmp_path / name, num_frames=100, codec_options={"bf": "0"})
    frames, _ = decode_video(path, pick(3, 22, 25, 91))
    assert read_numbers(frames) == [3, 22, 25, 91]
    # From the key frame before each wanted frame up to it: 0 to 3, 20 to 25 and 90 to 91.
    assert len([packet for packet, _ in decoded if packet is not None]) == 4 + 6 + 2


def test_frames_that_no_other_needs_are_left_out(tmp_path, decoded):
    path = write_video(tmp_path / "v.mp4", codec_options={"bf": "2", "x264-params": "b-pyramid=none:b-adapt=0"})
    # From the key frame 10 on, the B-frames are 11, 12, 14, 15, 17 and 18.
    frames, _ = decode_video(path, pick(18))
    assert read_numbers(frames) == [18]
    # The frame before a wanted one is decoded too, in case that the packet of the wanted one shows nothing of its own.
    came_out = [frame.to_ndarray(format="rgb24").transpose(2, 0, 1) for _, frames in decoded for frame in frames]
    assert read_numbers(came_out) == [10, 13, 16, 17, 18, 19]


@pytest.mark.parametrize("indices", [[0], [39], [3, 25], [5, 6, 7, 19, 38], range(40)])
def test_timestamps_in_the_order_of_the_file(tmp_path, indices):
    # MXF numbers the frames as they follow each other in the file, although B-frames are shown before what they need.
    path = write_video(tmp_path / "v.mxf", fps=25)
    with av.open(str(path)) as container:
        times = [frame.pts for frame in container.decode(video=0)]
    assert times != sorted(times)
    frames, metadata = decode_video(path, pick(*indices))
    assert metadata.timestamps == pytest.approx([index / 25 for index in indices])
    # A frame or two away where only few are asked for: nothing then tells that the order is wrong.
    assert np.abs(np.array(read_numbers(frames)) - indices).max() <= (0 if len(indices) == 40 else 2)


def test_a_file_that_cannot_be_entered_in_the_middle(tmp_path):
    path = write_video(tmp_path / "v.mjpeg", codec="mjpeg", codec_options={"strict": "unofficial"})
    frames, metadata = decode_video(path, pick(3, 25))
    assert read_numbers(frames) == [3, 25]
    assert metadata.total_num_frames == 40


def test_variable_frame_rate(tmp_path):
    times = [0.0, 0.1, 0.2, 1.7, 1.75, 1.8, 4.0, 4.5, 4.6]
    frames, metadata = decode_video(write_video(tmp_path / "v.mp4", num_frames=9, times=times), every(2))
    assert read_numbers(frames) == [0, 2, 4, 6, 8]
    assert metadata.timestamps == pytest.approx(times[::2])
    assert metadata.frame_timestamps == pytest.approx(times)
    assert metadata.fps == pytest.approx(9 / metadata.duration)


def test_frames_before_the_start_are_not_shown(tmp_path):
    # An MP4 that was cut without coding it anew keeps the frames from the last key frame on, and says which to hide.
    path = write_video(tmp_path / "v.mp4", start=-0.5)
    frames, metadata = decode_video(path)
    assert read_numbers(frames) == list(range(5, 40))
    assert metadata.timestamps == pytest.approx([number / 10 for number in range(35)])
    assert read_numbers(decode_video(path, pick(0, 11))[0]) == [5, 16]


def test_repeated_frames(tmp_path):
    # AVI has an empty place for every time at which there is no new frame.
    times = [0.0, 0.1, 0.5, 0.6, 1.4, 1.5]
    path = write_video(tmp_path / "v.avi", codec="mpeg4", num_frames=6, times=times, key_every=3)
    frames, metadata = decode_video(path)
    assert read_numbers(frames) == list(range(6))
    assert metadata.timestamps == pytest.approx(times)
    assert read_numbers(decode_video(path, pick(2, 5))[0]) == [2, 5]


@pytest.mark.parametrize("turns", [0, 1, 2, 3])
def test_rotation(tmp_path, turns):
    frames, metadata = decode_video(write_rotated_video(tmp_path / "v.mp4", turns))
    assert frames.shape == (10, 3, HEIGHT, WIDTH)
    assert (metadata.height, metadata.width) == (HEIGHT, WIDTH)
    assert read_numbers(frames) == list(range(10))


def test_colours(tmp_path):
    colours = [(200, 30, 40), (20, 180, 60), (30, 40, 220)]
    images = [np.full((HEIGHT, WIDTH, 3), colour, dtype=np.uint8) for colour in colours]
    frames, _ = decode_video(write_video(tmp_path / "v.mp4", images=images))
    assert np.abs(frames.float().mean((2, 3)).numpy() - np.array(colours)).max() < 6


def test_transform_equals_resizing_afterwards(tmp_path):
    path = write_video(tmp_path / "v.mp4")
    resize = functools.partial(tvF.resize, size=[20, 30], interpolation=tvF.InterpolationMode.BICUBIC, antialias=True)
    small, metadata = decode_video(path, every(3), transform=resize)
    large, _ = decode_video(path, every(3))
    assert torch.equal(small, resize(large))
    assert (metadata.height, metadata.width) == (HEIGHT, WIDTH)


def test_memory_is_that_of_the_transformed_frames(tmp_path):
    images = [draw_number(number, height=240, width=320) for number in range(30)]
    path = write_video(tmp_path / "v.mp4", images=images)
    decode_video(path, pick(0))
    tracemalloc.start()
    frames, _ = decode_video(path, transform=lambda frame: frame[:, ::8, ::8])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert read_numbers(frames) == list(range(30))
    assert peak < frames.numel() + 4 * images[0].size


def test_frames_of_changing_size(tmp_path):
    # Two streams of H.264 one after the other are a valid stream that changes its size.
    first = write_video(tmp_path / "a.h264", num_frames=5)
    images = [draw_number(number, height=96, width=128) for number in range(5, 10)]
    second = write_video(tmp_path / "b.h264", images=images)
    path = tmp_path / "v.h264"
    path.write_bytes(first.read_bytes() + second.read_bytes())
    frames, _ = decode_video(path)
    assert frames.shape == (10, 3, HEIGHT, WIDTH)
    assert read_numbers(frames) == list(range(10))


class TestSources:
    def test_path_bytes_and_file_object(self, tmp_path):
        path = write_video(tmp_path / "v.mp4")
        content = path.read_bytes()
        for source in (path, str(path), content, io.BytesIO(content)):
            frames, _ = decode_video(source, pick(3, 30))
            assert read_numbers(frames) == [3, 30]
        with open(path, "rb") as file:
            assert read_numbers(decode_video(file, pick(3, 30))[0]) == [3, 30]

    def test_url(self, tmp_path, server):
        write_video(tmp_path / "v.mp4")
        frames, metadata = decode_video(f"{server.address}/v.mp4", pick(3, 30))
        assert read_numbers(frames) == [3, 30]
        assert metadata.total_num_frames == 40
        with pytest.raises(ValueError, match=r"nothing.mp4' could not be downloaded .*404"):
            decode_video(f"{server.address}/nothing.mp4")

    def test_progress_bar_only_when_asked(self, tmp_path, capsys):
        path = write_video(tmp_path / "v.mp4")
        decode_video(path, pick(3, 30))
        assert capsys.readouterr().err == ""
        decode_video(path, pick(3, 30), progress=True)
        assert "2/2" in capsys.readouterr().err


class TestBadFiles:
    def test_missing(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"no video file at .*nothing\.mp4"):
            decode_video(tmp_path / "nothing.mp4")

    def test_folder(self, tmp_path):
        with pytest.raises(ValueError, match="is a folder"):
            decode_video(tmp_path)

    @pytest.mark.parametrize("source", ["file", "bytes"])
    def test_empty(self, tmp_path, source):
        path = tmp_path / "v.mp4"
        path.touch()
        with pytest.raises(ValueError, match="empty"):
            decode_video(path if source == "file" else b"")

    def test_text(self, tmp_path):
        path = tmp_path / "v.mp4"
        path.write_text("This is not a video.\n" * 100)
        with pytest.raises(ValueError, match=r"v\.mp4' cannot be read as a video"):
            decode_video(path)

    @pytest.mark.parametrize("name", ["v.m3u8", "v.mp4"])
    def test_playlist_does_not_reach_the_network(self, tmp_path, server, name):
        write_video(tmp_path / "v.ts")
        path = tmp_path / name
        playlist = ["#EXTM3U", "#EXT-X-TARGETDURATION:4", "#EXTINF:4,", f"{server.address}/v.ts", "#EXT-X-ENDLIST"]
        path.write_text("\n".join(playlist))
        with pytest.raises(ValueError, match=name):
            decode_video(path)
        assert server.requests == []

    @pytest.mark.parametrize("name", ["v.jpg", "v.png", "v.mp4"])
    def test_image(self, tmp_path, name):
        Image.fromarray(draw_number(1)).save(tmp_path / name, format="JPEG" if name == "v.jpg" else "PNG")
        with pytest.raises(ValueError, match="is an image where a video is meant"):
            decode_video(tmp_path / name)

    def test_sound_only(self, tmp_path):
        with pytest.raises(ValueError, match="no video stream but audio"):
            decode_video(write_sound(tmp_path / "v.mp4"))

    def test_without_frames(self, tmp_path):
        path = write_cut_video(tmp_path / "v.mp4", 1.0, container_options={"movflags": "frag_keyframe+empty_moov"})
        content = path.read_bytes()
        path.write_bytes(content[: content.index(b"moof") - 4])
        with pytest.raises(ValueError, match="without any frame"):
            decode_video(path)

    def test_index_missing(self, tmp_path):
        # MP4 keeps the index at the end of the file unless told otherwise.
        with pytest.raises(ValueError, match="a part of it is missing"):
            decode_video(write_cut_video(tmp_path / "v.mp4", 0.6))

    @pytest.mark.parametrize("name", ["v.mp4", "v.mkv", "v.flv"])
    def test_cut_off(self, tmp_path, name):
        options = {"movflags": "faststart"} if name == "v.mp4" else {}
        path = write_cut_video(tmp_path / name, 0.6, num_frames=200, container_options=options)
        with pytest.warns(UserWarning, match=r"is cut off: the \d+ frames that can be read") as caught:
            frames, metadata = decode_video(path)
        assert 20 < len(frames) < 180
        assert f"the {len(frames)} frames" in str(caught[0].message)
        assert "of 20.0 seconds" in str(caught[0].message)
        assert read_numbers(frames) == metadata.frames_indices == list(range(len(frames)))
        assert metadata.total_num_frames == len(frames)
        assert metadata.duration == pytest.approx(len(frames) / 10, abs=2e-3)

    def test_whole_files_give_no_warning(self, container_file):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            decode_video(container_file, pick(0))

    def test_damaged(self, tmp_path):
        path = blank_frames(write_video(tmp_path / "v.mp4"), range(10, 20))
        with pytest.warns(UserWarning, match="only 3 of the 4 sampled frames can be decoded"):
            frames, metadata = decode_video(path, pick(5, 15, 25, 35))
        assert read_numbers(frames) == metadata.frames_indices == [5, 25, 35]
        assert metadata.timestamps == pytest.approx([0.5, 2.5, 3.5])

    def test_destroyed(self, tmp_path):
        path = blank_frames(write_video(tmp_path / "v.mp4"), range(40))
        with pytest.raises(ValueError, match="None of the 2 sampled frames"):
            decode_video(path, pick(5, 15))

    @pytest.mark.parametrize("indices", [[40], [-1, 3]])
    def test_frames_that_do_not_exist(self, tmp_path, indices):
        with pytest.raises(ValueError, match="ask for frames from 0 to 39"):
            decode_video(write_video(tmp_path / "v.mp4"), pick(*indices))

    def test_no_frames(self, tmp_path):
        with pytest.raises(ValueError, match="ask for at least one"):
            decode_video(write_video(tmp_path / "v.mp4"), pick())

    def test_not_a_source(self):
        with pytest.raises(ValueError, match="None is not a video"):
            decode_video(None)
