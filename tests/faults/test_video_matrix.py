"""Every frame is the one that decoding from the start gives: codec x container x kind of group x lie of the file.

The files are made here and show numbers, so that no frame can be taken for another.
"""

import warnings
from pathlib import Path

import av
import numpy as np
import pytest
from video_files import draw_number, read_numbers

from mambamia_hf.video_decoding import VideoReader


NUM_FRAMES, FPS = 30, 25

X264 = {"preset": "ultrafast", "sc_threshold": "0", "bf": "0"}
X264_B = {"preset": "veryfast", "sc_threshold": "0", "bf": "3"}
X265 = {"preset": "ultrafast"}
ALT_REF = {"deadline": "good", "cpu-used": "5", "auto-alt-ref": "1", "lag-in-frames": "16"}

# Codec and its options for each kind of group of pictures.
KINDS = {
    "H.264": ("libx264", X264),
    "H.264 with B-frames": ("libx264", X264_B),
    "H.264 with open groups": ("libx264", {**X264_B, "x264-params": "open-gop=1"}),
    "H.264 refreshed bit by bit": ("libx264", {**X264, "x264-params": "intra-refresh=1"}),
    "H.265": ("libx265", {**X265, "x265-params": "log-level=none:pools=1:bframes=3"}),
    "H.265 with open groups": ("libx265", {**X265, "x265-params": "log-level=none:pools=1:bframes=3:open-gop=1"}),
    "VP8 with hidden frames": ("libvpx", ALT_REF),
    "VP9 with hidden frames": ("libvpx-vp9", ALT_REF),
    "MPEG-2 with B-frames": ("mpeg2video", {"bf": "2"}),
    "MPEG-4": ("mpeg4", {"bf": "0"}),
    "MPEG-4 with B-frames": ("mpeg4", {"bf": "2"}),
    "Motion JPEG": ("mjpeg", {"strict": "-1"}),
    "QuickTime RLE": ("qtrle", {}),
    "GIF": ("gif", {}),
    "APNG": ("apng", {}),
}

CONTAINERS = ["mp4", "mov", "mkv", "ts", "flv", "avi", "mxf", "mpg", "nut", "asf", "gif", "apng"]


def all_are_keys(number, packet):
    packet.is_keyframe = True


def none_are_keys(number, packet):
    packet.is_keyframe = False


def some_are_keys(number, packet):
    packet.is_keyframe = number % 4 == 0


def two_stray(number, packet):
    if number in (13, 14):
        packet.pts += 2500


def one_strays_a_little(number, packet):
    if number == 13:
        packet.pts += 5


def the_last_strays(number, packet):
    if number == NUM_FRAMES - 1:
        packet.pts += 50000


def pairs(number, packet):
    packet.pts = packet.dts = number // 2 * 2


def constant(number, packet):
    packet.pts = packet.dts = 0


LIES = {
    "nothing": None,
    "all are key frames": all_are_keys,
    "none is a key frame": none_are_keys,
    "others are key frames": some_are_keys,
    "two stray": two_stray,
    "one strays a little": one_strays_a_little,
    "the last strays": the_last_strays,
    "times in pairs": pairs,
    "one time": constant,
}
TIME_LIES = ("two stray", "the last strays", "times in pairs", "one time")


def write_lie(path: Path, kind: str, lie: str = "nothing", first_packet: int = 0) -> Path:
    """Writes a video whose packets are changed by `lie`, without those before `first_packet`.

    Skips the test where the container does not take the codec, or refuses the lie.
    """
    codec, options = KINDS[kind]
    change, number = LIES[lie], 0

    def write(container, packets):
        nonlocal number
        for packet in packets:
            if change is not None:
                change(number, packet)
            if number >= first_packet:
                container.mux(packet)
            number += 1

    try:
        with av.open(str(path), "w") as container:
            stream = container.add_stream(codec, rate=FPS, options={"g": "8", **options})
            stream.height, stream.width = 48, 64
            formats = [layout.name for layout in stream.codec_context.codec.video_formats or []]
            wanted = ("yuv420p", "yuvj420p", "rgb24", "rgb8")
            stream.pix_fmt = next((name for name in wanted if name in formats), "yuv420p")
            for shown in range(NUM_FRAMES):
                frame = av.VideoFrame.from_ndarray(draw_number(shown), format="rgb24")
                frame = frame.reformat(format=stream.pix_fmt)
                frame.pts = shown
                write(container, stream.encode(frame))
            write(container, stream.encode())
    except (av.FFmpegError, ValueError, OverflowError) as error:
        pytest.skip(f"cannot be made: {error}")
    return path


def decode_from_the_start(path: Path) -> tuple[np.ndarray, list[int]]:
    """Numbers on the pictures that a decoder gives, and which of these are key frames."""
    try:
        with av.open(str(path)) as container:
            if not container.streams.video or container.streams.video[0].codec_context is None:
                pytest.skip("FFmpeg does not read this")
            frames = list(container.decode(video=0))
    except (av.FFmpegError, IndexError) as error:
        pytest.skip(f"FFmpeg does not read this: {error}")
    if not frames:
        pytest.skip("FFmpeg gives no frame of this")
    pictures = np.stack([frame.to_ndarray(format="rgb24").transpose(2, 0, 1) for frame in frames])
    return np.array(read_numbers(pictures)), [n for n, frame in enumerate(frames) if frame.key_frame]


def check_every_frame(path: Path, expected: np.ndarray) -> list[str]:
    """Asks for frames in several ways; returns the warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with VideoReader(path) as reader:
            assert len(reader) == len(expected)
            last = len(expected) - 1
            for wanted in ([0], [last], [last // 2], [7, 13, 14], range(last + 1)):
                wanted = [min(number, last) for number in wanted]
                batch = reader.frames_at(wanted)
                assert batch.indices == wanted
                assert read_numbers(batch.data) == expected[wanted].tolist()
            times = reader.metadata.frame_timestamps
            assert times[0] == 0 and (np.diff(times) > 0).all()
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("suffix", CONTAINERS)
def test_honest_files(tmp_path, kind, suffix):
    path = write_lie(tmp_path / f"v.{suffix}", kind)
    expected, _ = decode_from_the_start(path)
    messages = check_every_frame(path, expected)
    # MPEG program streams and ASF of B-frames do repeat times.
    if suffix not in ("mpg", "asf"):
        assert messages == []


@pytest.mark.parametrize("lie", [lie for lie in LIES if lie != "nothing"])
@pytest.mark.parametrize("suffix", ["mp4", "mkv", "flv", "avi"])
@pytest.mark.parametrize("kind", list(KINDS)[:-4])
def test_lies(tmp_path, kind, suffix, lie):
    path = write_lie(tmp_path / f"v.{suffix}", kind, lie)
    expected, _ = decode_from_the_start(path)
    messages = check_every_frame(path, expected)
    if lie in TIME_LIES and suffix == "mkv":
        assert any("cannot be trusted" in message for message in messages)


@pytest.mark.parametrize("suffix", ["mp4", "mov"])
@pytest.mark.parametrize("kind", list(KINDS)[:6])
def test_mp4_without_a_list_of_key_frames(tmp_path, kind, suffix):
    path = write_lie(tmp_path / f"v.{suffix}", kind)
    path.write_bytes(path.read_bytes().replace(b"stss", b"free"))
    expected, _ = decode_from_the_start(path)
    assert check_every_frame(path, expected) == []


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts", "flv"])
@pytest.mark.parametrize("kind", [kind for kind in list(KINDS)[:6] if "bit by bit" not in kind])
def test_streams_that_begin_within_a_group(tmp_path, kind, suffix):
    path = write_lie(tmp_path / f"v.{suffix}", kind, first_packet=3)
    expected, keys = decode_from_the_start(path)
    messages = check_every_frame(path, expected[keys[0] :])
    assert not any("cut off" in message for message in messages)
