import contextlib
import functools
import gc
import http.server
import io
import multiprocessing
import os
import signal
import threading
import time
import traceback
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

from mambamia_hf import video_decoder, video_decoding
from mambamia_hf.video_decoding import VideoReader, decode_video
from mambamia_hf.video_sources import VideoLimits


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


def each(stride):
    return lambda metadata: np.arange(0, metadata.total_num_frames, stride)


@pytest.fixture
def set_threads():
    """Sets how many threads PyTorch uses, until the end of the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


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

    def test_key_frames(self, container_file):
        with av.open(str(container_file)) as container:
            keys = [number for number, frame in enumerate(container.decode(video=0)) if frame.key_frame]
        assert len(keys) >= 4
        frames, metadata = decode_video(container_file, pick(3, 12, 24, 39), seek_mode="keyframe")
        nearest = [min(keys, key=lambda key: abs(key - index)) for index in (3, 12, 24, 39)]
        assert read_numbers(frames) == metadata.frames_indices == nearest
        assert metadata.timestamps == pytest.approx([number / 10 for number in nearest], abs=1e-3)

    def test_threads_change_nothing(self, container_file, set_threads):
        set_threads(1)
        expected, expected_metadata = decode_video(container_file, pick(1, 8, 13, 13, 24, 25, 38))
        for threads in (2, 3, 8):
            set_threads(threads)
            frames, metadata = decode_video(container_file, pick(1, 8, 13, 13, 24, 25, 38))
            assert torch.equal(frames, expected)
            assert metadata.frames_indices == expected_metadata.frames_indices


def test_order_and_repetitions_are_kept(tmp_path):
    frames, metadata = decode_video(write_video(tmp_path / "v.mp4"), pick(30, 2, 2, 17))
    assert read_numbers(frames) == [30, 2, 2, 17]
    assert metadata.timestamps == pytest.approx([3.0, 0.2, 0.2, 1.7])


@pytest.fixture
def decoded(monkeypatch):
    """What the decoder gets and gives while the test runs: pairs of a packet and the frames that come out with it."""
    pairs = []
    decode_packet = video_decoder.Decoder._decode_packet

    def record(decoder, packet):
        pairs.append((packet, decode_packet(decoder, packet)))
        return pairs[-1][1]

    monkeypatch.setattr(video_decoder.Decoder, "_decode_packet", record)
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
    frames, metadata = decode_video(write_video(tmp_path / "v.mp4", num_frames=9, times=times), each(2))
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


def test_refresh_bit_by_bit(tmp_path):
    # There is one whole key frame at the start. Later ones are places from which pictures become whole in time.
    options = {"bf": "0", "x264-params": "intra-refresh=1"}
    path = write_video(tmp_path / "v.mp4", codec_options=options)
    with av.open(str(path)) as container:
        assert [n for n, packet in enumerate(container.demux(video=0)) if packet.is_keyframe] == [0, 10, 20, 30]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_numbers(decode_video(path, pick(10, 11, 22, 39))[0]) == [10, 11, 22, 39]
        assert read_numbers(decode_video(path, pick(12, 22, 32), seek_mode="keyframe")[0]) == [10, 20, 30]


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
    small, metadata = decode_video(path, each(3), transform=resize)
    large, _ = decode_video(path, each(3))
    assert torch.equal(small, resize(large))
    assert (metadata.height, metadata.width) == (HEIGHT, WIDTH)


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize(("seek_mode", "wanted"), [("exact", range(30)), ("keyframe", [0, 0, 10, 10, 10, 20] * 5)])
def test_memory_is_that_of_the_transformed_frames(tmp_path, set_threads, threads, seek_mode, wanted):
    images = [draw_number(number, height=240, width=320) for number in range(30)]
    path = write_video(tmp_path / "v.mp4", images=images)
    set_threads(threads)
    decode_video(path, pick(0))
    tracemalloc.start()
    frames, _ = decode_video(path, pick(*wanted), transform=lambda frame: frame[:, ::4, ::4], seek_mode=seek_mode)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert read_numbers(frames) == list(wanted)
    assert peak < frames.numel() + (3 + threads) * images[0].size


@pytest.mark.parametrize("suffix", [".h264", ".ts"])
@pytest.mark.filterwarnings("ignore:The times in:UserWarning")
def test_frames_of_changing_size(tmp_path, set_threads, suffix):
    # Two streams one after the other are a valid stream that changes its size.
    first = write_video(tmp_path / f"a{suffix}", num_frames=20)
    images = [draw_number(number, height=96, width=128) for number in range(20, 40)]
    second = write_video(tmp_path / f"b{suffix}", images=images, start=2.0)
    path = tmp_path / f"v{suffix}"
    path.write_bytes(first.read_bytes() + second.read_bytes())
    for threads in (1, 4):
        set_threads(threads)
        frames, _ = decode_video(path, pick(0, 12, 25, 36))
        assert frames.shape == (4, 3, HEIGHT, WIDTH)
        numbers = np.array(read_numbers(frames))
        assert np.abs(numbers - [0, 12, 25, 36]).max() <= 1  # the joint of two MPEG transport streams costs a frame


def test_times_that_start_again(tmp_path):
    # Then the order in the file counts, and the frame rate.
    first = write_video(tmp_path / "a.ts", num_frames=20)
    second = write_video(tmp_path / "b.ts", images=[draw_number(number) for number in range(20, 40)])
    path = tmp_path / "v.ts"
    path.write_bytes(first.read_bytes() + second.read_bytes())
    with pytest.warns(UserWarning, match="start again at frame 20, once in all"):
        frames, metadata = decode_video(path, pick(7, 12, 25, 36))
    assert read_numbers(frames) == [7, 12, 25, 36]
    assert metadata.timestamps == pytest.approx([0.7, 1.2, 2.5, 3.6])
    with pytest.warns(UserWarning, match="start again"):
        assert read_numbers(decode_video(path, pick(2, 7), seek_mode="keyframe")[0]) == [0, 10]


class TestReader:
    def test_frames_at(self, tmp_path):
        with VideoReader(write_video(tmp_path / "v.mp4")) as reader:
            assert len(reader) == reader.metadata.total_num_frames == 40
            for indices in ([3, 25], [39], [30, 2, 2, 17]):
                batch = reader.frames_at(indices)
                assert read_numbers(batch.data) == batch.indices == indices
                assert batch.timestamps == pytest.approx([index / 10 for index in indices])
                assert len(batch) == len(indices)

    def test_frames_shown_at(self, tmp_path):
        times = [0.0, 0.1, 0.2, 1.7, 1.75, 1.8, 4.0, 4.5, 4.6]
        with VideoReader(write_video(tmp_path / "v.mp4", num_frames=9, times=times)) as reader:
            batch = reader.frames_shown_at([4.4, 0.0, 0.15, 1.69, 1.7])
            assert read_numbers(batch.data) == batch.indices == [6, 0, 1, 2, 3]
            assert batch.timestamps == pytest.approx([4.0, 0.0, 0.1, 0.2, 1.7])
            assert reader.frames_shown_at(1.76).indices == [4]
            for outside in (-0.1, reader.metadata.duration, float("nan")):
                with pytest.raises(ValueError, match=r"v\.mp4' shows nothing at .* ask for times from 0 to below \d"):
                    reader.frames_shown_at([0.0, outside])

    def test_transform_and_progress(self, tmp_path, capsys, monkeypatch):
        monkeypatch.setenv("COLUMNS", "300")  # room for a long path
        with VideoReader(write_video(tmp_path / "v.mp4")) as reader:
            batch = reader.frames_shown_at([0.3], transform=lambda frame: frame[:, ::2, ::2], progress=True)
        assert batch.data.shape == (1, 3, HEIGHT // 2, WIDTH // 2) and read_numbers(batch.data) == [3]
        assert "1/1" in capsys.readouterr().err

    def test_key_frames(self, tmp_path):
        with VideoReader(write_video(tmp_path / "v.mp4"), seek_mode="keyframe") as reader:
            assert read_numbers(reader.frames_at([3, 12]).data) == [0, 10]
            assert reader.frames_shown_at([2.4, 3.9]).indices == [20, 30]

    def test_the_file_is_indexed_once(self, tmp_path, monkeypatch):
        scanned = []
        read_index = video_decoding.read_index
        monkeypatch.setattr(video_decoding, "read_index", lambda *args: scanned.append(args) or read_index(*args))
        with VideoReader(write_video(tmp_path / "v.mp4")) as reader:
            reader.frames_at([3])
            reader.frames_shown_at([2.0])
        assert len(scanned) == 1

    def test_size_is_that_of_upright_frames(self, tmp_path):
        with VideoReader(write_rotated_video(tmp_path / "v.mp4", 1)) as reader:
            reader.frames_at([0])
            assert (reader.metadata.height, reader.metadata.width) == (HEIGHT, WIDTH)

    @pytest.mark.parametrize("is_readable", [True, False])
    def test_temporary_files_are_gone(self, tmp_path, monkeypatch, server, is_readable):
        path = write_video(tmp_path / "v.mp4")
        if not is_readable:
            path.write_bytes(b"no video" * 1000)
        temporary = tmp_path / "temporary"
        temporary.mkdir()
        monkeypatch.setattr("tempfile.tempdir", str(temporary))
        for source in (path.read_bytes(), io.BytesIO(path.read_bytes()), f"{server.address}/v.mp4"):
            with contextlib.nullcontext() if is_readable else pytest.raises(ValueError, match="cannot be read"):
                with VideoReader(source) as reader:
                    assert len(list(temporary.iterdir())) == 1
                    assert read_numbers(reader.frames_at([3]).data) == [3]
            assert list(temporary.iterdir()) == []


def fail(frame):
    raise ZeroDivisionError


def interrupt_once():
    """A transform that does what Ctrl-C does, at the first frame."""
    first = iter([True])

    def interrupt(frame):
        if next(first, False):
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)
        return frame

    return interrupt


def num_threads():
    """Those of FFmpeg included, where the system tells (Linux)."""
    tasks = "/proc/self/task"
    return len(os.listdir(tasks)) if os.path.exists(tasks) else threading.active_count()


def decode_and_collect(path):
    """What a worker of a data loader does first; it ends with 0 if the frames are right."""
    gc.collect()
    frames, _ = decode_video(path, pick(3, 25))
    raise SystemExit(read_numbers(frames) != [3, 25])


class TestNothingOutlivesACall:
    """A thread of a decoder or scaler does not exist in a forked child, which waits for its end for ever."""

    @pytest.fixture(params=["success", "raises", "Ctrl-C", "container that cannot be entered", "damaged"])
    def decoded_before(self, request, tmp_path, set_threads):
        set_threads(4)
        gc.collect()  # encoders of other tests
        before = num_threads()
        error = None
        if request.param == "success":
            decode_video(write_video(tmp_path / "a.mp4"), pick(5, 25))
        elif request.param == "raises":
            with pytest.raises(ZeroDivisionError) as error:
                decode_video(write_video(tmp_path / "a.mp4"), transform=fail)
        elif request.param == "Ctrl-C":
            with pytest.raises(KeyboardInterrupt) as error:
                decode_video(write_video(tmp_path / "a.mp4"), transform=interrupt_once())
        elif request.param == "container that cannot be entered":
            decode_video(write_video(tmp_path / "a.avi"), pick(5, 25))
            decode_video(write_video(tmp_path / "a.mjpeg", codec="mjpeg", codec_options={"strict": "-1"}), pick(5))
        else:
            path = blank_frames(write_video(tmp_path / "a.mp4"), range(10, 20))
            with pytest.warns(UserWarning):
                decode_video(path, pick(5, 15))
        yield before
        del error  # a notebook keeps it, too

    def test_threads(self, decoded_before):
        # The system may list a thread for a moment after it has ended.
        deadline = time.monotonic() + 10
        while num_threads() > decoded_before and time.monotonic() < deadline:
            time.sleep(0.01)
        assert num_threads() <= decoded_before

    @pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="there is no fork here")
    @pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # that forking with threads may hang
    def test_forked_children(self, tmp_path, decoded_before):
        assert self.ends_well("fork", write_video(tmp_path / "v.mp4"))

    @pytest.mark.parametrize("method", sorted({*multiprocessing.get_all_start_methods()} - {"fork"}))
    def test_fresh_children(self, tmp_path, method):
        path = write_video(tmp_path / "v.mp4")
        decode_video(path, pick(5))
        assert self.ends_well(method, path)

    def ends_well(self, method, path):
        child = multiprocessing.get_context(method).Process(target=decode_and_collect, args=(path,))
        child.start()
        child.join(120)
        child.kill()
        return child.exitcode == 0

    @pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="only Linux lists open files there")
    def test_files_are_closed(self, decoded_before):
        open_files = [os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")]
        assert not [name for name in open_files if os.path.basename(name).startswith("a.")]


class TestKeyFrames:
    def test_only_they_are_decoded(self, tmp_path, decoded):
        path = write_video(tmp_path / "v.mp4")
        frames, metadata = decode_video(path, pick(3, 8, 16, 39), seek_mode="keyframe")
        assert read_numbers(frames) == metadata.frames_indices == [0, 10, 20, 30]
        assert metadata.total_num_frames == 40
        assert len([packet for packet, _ in decoded if packet is not None]) == 4

    def test_too_few_are_repeated(self, tmp_path):
        path = write_video(tmp_path / "v.mp4", key_every=20)
        with pytest.warns(UserWarning, match="2 of them stand for the 8 sampled frames"):
            frames, metadata = decode_video(path, each(5), seek_mode="keyframe")
        assert read_numbers(frames) == metadata.frames_indices == [0, 0, 0, 20, 20, 20, 20, 20]
        assert metadata.timestamps == pytest.approx([0, 0, 0, 2, 2, 2, 2, 2])

    def test_repetitions_that_are_asked_for_give_no_warning(self, tmp_path):
        path = write_video(tmp_path / "v.mp4")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            frames, _ = decode_video(path, pick(33, 2, 2, 11), seek_mode="keyframe")
        assert read_numbers(frames) == [30, 0, 0, 10]

    def test_nearest_in_time_at_a_variable_frame_rate(self, tmp_path):
        times = [0.0, 0.1, 0.2, 0.3, 4.0, 4.1, 4.2, 9.0, 9.1, 9.2]
        path = write_video(tmp_path / "v.mp4", num_frames=10, times=times, key_every=4, codec_options={"bf": "0"})
        # Key frames are 0, 4 and 8, at 0, 4 and 9.1 seconds.
        frames, metadata = decode_video(path, pick(3, 6, 7), seek_mode="keyframe")
        assert read_numbers(frames) == [0, 4, 8]
        assert metadata.timestamps == pytest.approx([0.0, 4.0, 9.1])

    def test_hidden_ones_are_not_taken(self, tmp_path):
        path = write_video(tmp_path / "v.mp4", start=-0.5)
        frames, metadata = decode_video(path, pick(0, 20), seek_mode="keyframe")
        assert read_numbers(frames) == [10, 20]
        assert metadata.timestamps == pytest.approx([0.5, 1.5])

    def test_one_frame(self, tmp_path):
        path = write_video(tmp_path / "v.mp4", num_frames=1)
        for seek_mode in ("exact", "keyframe"):
            frames, metadata = decode_video(path, seek_mode=seek_mode)
            assert read_numbers(frames) == [0] and metadata.timestamps == [0.0]

    def test_none(self, tmp_path):
        content = write_video(tmp_path / "v.ts", num_frames=80, key_every=80).read_bytes()
        (tmp_path / "v.ts").write_bytes(content[len(content) // 2 // 188 * 188 :])
        with pytest.raises(ValueError, match=r"No frame of .*v\.ts' can be decoded"):
            decode_video(tmp_path / "v.ts", pick(5), seek_mode="keyframe")

    @pytest.mark.parametrize("seek_mode", ["nearest", "", None])
    def test_unknown_mode(self, tmp_path, seek_mode):
        with pytest.raises(
            ValueError, match=rf"`seek_mode={seek_mode!r}` is no way to find frames: use 'exact' or 'keyframe'"
        ):
            decode_video(write_video(tmp_path / "v.mp4"), seek_mode=seek_mode)


class TestThreads:
    @pytest.mark.parametrize(
        ("threads", "indices", "decoders"),
        [
            (1, [5, 15, 25, 35], [1]),
            (2, [5, 15, 25, 35], [1, 1]),
            (8, [5, 15, 25, 35], [2, 2, 2, 2]),  # more than there are key frames to start from
            (8, [5, 6], [8]),
            (64, range(40), [2, 2, 2, 2]),
        ],
    )
    def test_as_many_as_pytorch_uses(self, tmp_path, monkeypatch, set_threads, threads, indices, decoders):
        path = write_video(tmp_path / "v.mp4")
        decoder, opened = video_decoding.Decoder, []

        def record(path, name, limits, threads, stop):
            opened.append(threads)
            return decoder(path, name, limits, threads, stop)

        monkeypatch.setattr(video_decoding, "Decoder", record)
        set_threads(threads)
        assert read_numbers(decode_video(path, pick(*indices))[0]) == list(indices)
        assert opened == decoders

    def test_they_end_with_an_error(self, tmp_path, set_threads):
        path = write_video(tmp_path / "v.mp4")
        set_threads(4)
        before = set(threading.enumerate())

        with pytest.raises(ZeroDivisionError):
            decode_video(path, transform=fail)
        assert set(threading.enumerate()) <= before


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

    @pytest.mark.parametrize("what", ["nothing.mp4", "v.txt"])
    def test_secrets_in_addresses_are_not_told(self, tmp_path, server, what):
        (tmp_path / "v.txt").write_text("no video\n" * 100)
        address = server.address.replace("http://", "HTTP://user:hunter2@")
        with pytest.raises(ValueError) as caught:
            decode_video(f"{address}/{what}?token=swordfish#abc")
        assert f"{server.address.replace('http', 'HTTP')}/{what}'" in str(caught.value)
        for secret in ("hunter2", "swordfish"):
            assert secret not in "".join(traceback.format_exception_only(caught.value))

    @pytest.mark.parametrize("limits", [VideoLimits(download_seconds=0), VideoLimits(copied_bytes=100)])
    def test_downloads_have_limits(self, tmp_path, server, limits):
        write_video(tmp_path / "v.mp4")
        with pytest.raises(ValueError, match="more than (0 seconds|100 bytes)"):
            decode_video(f"{server.address}/v.mp4", limits=limits)

    @pytest.mark.parametrize("address", ["http://[::1", "http://127.0.0.1:1/v.mp4", "https://"])
    def test_addresses_of_nothing(self, address):
        with pytest.raises(ValueError, match="could not be downloaded"):
            decode_video(address)

    def test_progress_bar_only_when_asked(self, tmp_path, capsys, monkeypatch):
        monkeypatch.setenv("COLUMNS", "300")  # room for a long path
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
        with pytest.raises(ValueError, match="No frame of .* can be decoded"):
            decode_video(path, pick(5, 15))

    @pytest.mark.parametrize("indices", [[40], [-1, 3]])
    def test_frames_that_do_not_exist(self, tmp_path, indices):
        with pytest.raises(ValueError, match="ask for frames from 0 to 39"):
            decode_video(write_video(tmp_path / "v.mp4"), pick(*indices))

    def test_no_frames(self, tmp_path):
        with pytest.raises(ValueError, match="ask for at least one"):
            decode_video(write_video(tmp_path / "v.mp4"), pick())

    def test_not_a_source(self):
        with pytest.raises(ValueError, match="type NoneType is not a video"):
            decode_video(None)
