"""What the header of an MP4 file says twice, and what no player believes."""

import struct
import warnings
from pathlib import Path

import pytest
from video_files import write_video

from mambamia_hf.video_decoding import VideoReader
from mambamia_hf.video_mp4 import contradicting_durations, unreadable_track


FRAGMENTS = {"movflags": "frag_keyframe+empty_moov"}


def change(path: Path, box: bytes, place: int, number: int) -> Path:
    """Writes a number at a place in every box of a kind."""
    content = bytearray(path.read_bytes())
    start = -1
    while (start := content.find(box, start + 1)) >= 0:
        struct.pack_into(">I", content, start + 4 + place, number)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("suffix", ["mp4", "mov", "3gp"])
@pytest.mark.parametrize("options", [{}, FRAGMENTS, {"movflags": "faststart"}, {"use_editlist": "0"}])
def test_whole_files(tmp_path, suffix, options):
    for with_sound, bf in ((False, "2"), (True, "0")):
        path = write_video(
            tmp_path / f"v.{suffix}",
            container_options=options,
            codec_options={"bf": bf, "preset": "veryfast"},
            with_sound=with_sound,
            start=3.0,
        )
        assert contradicting_durations(str(path)) is None and unreadable_track(str(path)) is None


def test_a_part_that_was_cut_out(tmp_path):
    """As editors do it: the track is whole, and the edit list shows some seconds of it."""
    path = write_video(tmp_path / "v.mp4", num_frames=300)
    content = bytearray(path.read_bytes())
    start = content.index(b"elst") + 4
    assert struct.unpack_from(">I", content, start + 8)[0] == 30_000
    for shown in (29_000, 10_000, 600):
        struct.pack_into(">I", content, start + 8, shown)
        path.write_bytes(content)
        assert contradicting_durations(str(path)) is None
    path = write_video(tmp_path / "long.mp4", num_frames=800)
    assert contradicting_durations(str(change(path, b"elst", 8, 30_000))) == (30.0, 80.0)


@pytest.mark.parametrize(
    ("box", "place", "number"),
    [
        (b"mvhd", 12, 0),  # ticks per second
        (b"mvhd", 12, 500),
        (b"mdhd", 12, 0),
        (b"mdhd", 12, 1),
        (b"mdhd", 12, 20_480),
        (b"mdhd", 16, 5),  # the duration
        (b"stts", 12, 4096),  # that of a frame
        (b"stts", 8, 10),  # how many there are
        (b"elst", 8, 72_000),  # how long it is shown
    ],
)
@pytest.mark.parametrize("with_sound", [False, True])
def test_clocks_that_differ(tmp_path, box, place, number, with_sound):
    path = change(write_video(tmp_path / "v.mp4", with_sound=with_sound), box, place, number)
    assert contradicting_durations(str(path)) is not None
    with pytest.warns(UserWarning, match="times in .* cannot be trusted: (by its header, it lasts|they start again)"):
        VideoReader(path)


def test_a_clock_that_no_other_contradicts(tmp_path):
    """Fragments tell a duration once; a frame per quarter of an hour is told all the same."""
    path = change(write_video(tmp_path / "v.mp4", container_options=FRAGMENTS), b"mdhd", 12, 0)
    with pytest.warns(UserWarning, match="frames follow each other every 1.02e\\+03 s; its clock may be damaged"):
        VideoReader(path)


@pytest.mark.parametrize("step", [0.002, 50.0])
def test_fast_cameras_and_slides(tmp_path, step):
    path = write_video(tmp_path / "v.mp4", fps=1000, times=[step * number for number in range(10)], num_frames=10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        VideoReader(path)


@pytest.mark.parametrize("number", [1 << 31, (1 << 32) - 1])
def test_tracks_that_cannot_be_counted(tmp_path, number):
    path = write_video(tmp_path / "v.mp4", container_options=FRAGMENTS)
    for box, place in ((b"tkhd", 12), (b"trex", 4), (b"tfhd", 4)):
        change(path, box, place, number)
    with pytest.raises(ValueError, match=f"numbers a track {number}, more than players count"):
        VideoReader(path)


def test_boxes_that_lead_nowhere(tmp_path):
    """Sizes that are too small, too large or those of the box itself."""
    content = write_video(tmp_path / "v.mp4", container_options={"movflags": "faststart"}).read_bytes()
    path = tmp_path / "damaged.mp4"
    for box in (b"moov", b"mvhd", b"trak", b"mdia", b"stbl", b"stts", b"elst"):
        for size in (0, 1, 7, 8, 9, (1 << 31) - 1, (1 << 32) - 1):
            start = content.index(box) - 4
            path.write_bytes(content[:start] + struct.pack(">I", size) + content[start + 4 :])
            contradicting_durations(str(path))
            assert unreadable_track(str(path)) is None
    for beginning in (b"", b"\0", b"\0\0\0\1moov" + b"\xff" * 8, bytes(100)):
        path.write_bytes(beginning)
        assert contradicting_durations(str(path)) is None and unreadable_track(str(path)) is None
