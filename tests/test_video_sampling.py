"""Frames of real files, batch by batch, decoded ahead of whoever uses them."""

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_model import tiny_checkpoint, tiny_processor
from video_files import blank_frames, draw_number, read_numbers, write_video

from mambamia_hf.video_decoding import VideoReader
from mambamia_hf.video_sampling import FrameFolder, SampledVideo


def collect(reader, indices, batch_size):
    """Places, numbers read off the pictures, and times."""
    taken = []
    for places, batch in reader.batches_at(indices, batch_size):
        assert len(batch) == len(places) <= batch_size
        times = [round(time, 6) for time in batch.timestamps]
        taken += zip(places.tolist(), read_numbers(batch.data), times, strict=True)
    return taken


def no_threads_are_left(before):
    for _ in range(100):
        if set(threading.enumerate()) <= before:
            return True
        time.sleep(0.05)
    return False


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("video") / "video.mp4", num_frames=300, fps=10, key_every=10)


@pytest.mark.parametrize("batch_size", [1, 7, 16, 1000])
@pytest.mark.parametrize("threads", [1, 4])
def test_batches_in_order(video, batch_size, threads, monkeypatch):
    monkeypatch.setattr("mambamia_hf.video_decoding._num_threads", lambda: threads)
    before = set(threading.enumerate())
    indices = np.arange(0, 300, 2)
    expected = [(place, number, number / 10) for place, number in enumerate(indices.tolist())]
    assert collect(VideoReader(video), indices, batch_size) == expected
    assert no_threads_are_left(before)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("one key frame.mp4", {"key_every": 1000}),
        ("in order.mpg", {"codec": "mpeg1video", "fps": 25}),
        ("transport.ts", {}),
    ],
)
def test_other_files(tmp_path, name, options):
    """Also those that have to be decoded from the start."""
    path = write_video(tmp_path / name, num_frames=120, **options)
    reader = VideoReader(path)
    indices = np.arange(len(reader))
    whole = reader.frames_at(indices)
    taken = collect(reader, indices, 8)
    assert [place for place, _, _ in taken] == indices.tolist()
    assert [number for _, number, _ in taken] == read_numbers(whole.data)
    assert [time for _, _, time in taken] == pytest.approx(whole.timestamps)


def test_key_frames_repeat(video):
    with pytest.warns(UserWarning, match="too few key frames"):
        taken = collect(VideoReader(video, "keyframe"), np.arange(0, 60, 4), 4)
    assert [place for place, _, _ in taken] == list(range(15))
    assert {number for _, number, _ in taken} <= set(range(0, 70, 10))


@pytest.mark.parametrize("key_every", [10, 1000])
@pytest.mark.parametrize("threads", [1, 3])
def test_few_frames_are_held(tmp_path, key_every, threads, monkeypatch):
    """However long the video, and however slow its use."""
    monkeypatch.setattr("mambamia_hf.video_decoding._num_threads", lambda: threads)
    monkeypatch.setattr("mambamia_hf.video_decoding._FRAMES_AHEAD", 8)
    path = write_video(tmp_path / "video.mp4", num_frames=200, key_every=key_every)
    decoded = [0]

    def count(picture):
        decoded[0] += 1
        return picture

    taken = 0
    for _, batch in VideoReader(path).batches_at(range(200), 4, count):
        taken += len(batch)
        time.sleep(0.01)
        assert decoded[0] <= taken + 8 + 8 + threads
    assert taken == 200


@pytest.mark.parametrize("threads", [1, 4])
def test_damaged_frames_are_left_out(tmp_path, threads, monkeypatch):
    monkeypatch.setattr("mambamia_hf.video_decoding._num_threads", lambda: threads)
    monkeypatch.setattr("mambamia_hf.video_decoding._FRAMES_AHEAD", 0)
    path = write_video(tmp_path / "video.mp4", num_frames=80, key_every=20)
    blank_frames(path, range(20, 60))
    reader = VideoReader(path)
    with pytest.warns(UserWarning, match="is damaged"):
        whole = reader.frames_at(range(80))
    with pytest.warns(UserWarning, match="is damaged"):
        taken = collect(reader, range(80), 4)
    assert len(whole) < 80
    assert [number for _, number, _ in taken] == read_numbers(whole.data)


def test_nothing_goes_on_where_the_use_ends(video):
    before = set(threading.enumerate())
    batches = VideoReader(video).batches_at(range(300), 4)
    next(batches)
    assert set(threading.enumerate()) > before
    batches.close()
    assert no_threads_are_left(before)


def test_errors_of_the_decoder_and_of_the_user(video):
    before = set(threading.enumerate())

    def fail(picture):
        raise RuntimeError("no picture today")

    with pytest.raises(RuntimeError, match="no picture today"):
        list(VideoReader(video).batches_at(range(300), 4, fail))
    with pytest.raises(ValueError, match="Frames 0 to 300 were asked"):
        next(VideoReader(video).batches_at(range(301), 4))
    assert no_threads_are_left(before)


def test_a_video_that_turns_out_otherwise_begins_again(video, monkeypatch):
    """What was given before is replaced."""
    from mambamia_hf import video_decoding

    decode_group = video_decoding._decode_group

    def fail_late(decoder, packets, start, wanted, images):
        if wanted[0] >= 100:
            raise video_decoding._SeekError
        decode_group(decoder, packets, start, wanted, images)

    monkeypatch.setattr(video_decoding, "_decode_group", fail_late)
    processor = tiny_processor().video_processor
    sampled = SampledVideo(VideoReader(video), processor, num_frames=150)
    places = [int(place) for some, _ in sampled.batches(8) for place in some]
    assert len(places) > 150 and places[-150:] == list(range(150))
    assert sampled.numbers.tolist() == sampled.indices.tolist()


def test_sampled_as_the_processor_samples(video):
    processor = tiny_processor()
    expected = processor(videos=[video], num_frames=40, return_tensors="pt")
    sampled = SampledVideo(VideoReader(video), processor.video_processor, num_frames=40)
    pixels = torch.cat([pixels for _, pixels in sampled.batches(16)])
    torch.testing.assert_close(pixels, expected["pixel_values_videos"][0])
    assert sampled.timestamps == pytest.approx(expected["video_timestamps"][0].tolist())
    assert sampled.seconds_waited > 0


def test_folders(tmp_path):
    for number in range(30):
        Image.fromarray(draw_number(number)).save(tmp_path / f"{number}.png")
    before = set(threading.enumerate())
    taken = collect(FrameFolder(tmp_path, 2.0), range(1, 30, 2), 4)
    assert taken == [(place, number, number / 2) for place, number in enumerate(range(1, 30, 2))]
    Image.fromarray(draw_number(9, 60, 80)).save(tmp_path / "9.png")
    with pytest.raises(ValueError, match=r"1.png of 64 x 48, 9.png of 80 x 60"):
        collect(FrameFolder(tmp_path, 2.0), range(1, 30, 2), 4)
    assert no_threads_are_left(before)


def test_ctrl_c_ends_all_threads(video, tmp_path):
    tiny_checkpoint(tmp_path)
    program = f"""
import signal, sys, threading, time
sys.path[:0] = {[str(Path(__file__).parent / "helpers")]!r}
from tiny_model import tiny_processor
from mambamia_hf import MambaMiaForConditionalGeneration
model = MambaMiaForConditionalGeneration.from_pretrained({str(tmp_path)!r}).eval()
def look(*_):
    print("looking", flush=True)
    time.sleep(0.2)
model.model.vision_tower.register_forward_hook(look)
signal.signal(signal.SIGINT, signal.default_int_handler)
others = [thread.name for thread in threading.enumerate()]
try:
    model.encode_video({str(video)!r}, tiny_processor(), num_frames=300)
except KeyboardInterrupt:
    print("left:", [thread.name for thread in threading.enumerate() if thread.name not in others])
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "looking\n"
    process.send_signal(signal.SIGINT)
    rest = process.communicate(timeout=300)[0]
    assert rest.splitlines()[-1] == "left: []"
    assert process.returncode == 0
