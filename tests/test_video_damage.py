"""What files themselves tell of lost and changed data: told for damage of each kind, and for no whole file."""

import warnings

import av
import numpy as np
import pytest
from video_files import blank_frames, draw_number, read_numbers, write_video

from mambamia_hf.video_damage import damaged_places
from mambamia_hf.video_decoding import VideoReader, decode_video


# Without B-frames, so that packets and frames have one order.
PLAIN = {"bf": "0", "preset": "veryfast", "sc_threshold": "0"}


def places_in(path) -> list[int]:
    with av.open(str(path)) as container:
        return damaged_places(str(path), container.format.name, container.streams.video[0].id)


def change(path, position, new=b"", length=0):
    """Puts `new` in the place of `length` bytes."""
    content = path.read_bytes()
    path.write_bytes(content[:position] + new + content[position + length :])
    return path


def packets_of(path) -> list[av.Packet]:
    with av.open(str(path)) as container:
        return [packet for packet in container.demux(video=0) if packet.size]


@pytest.mark.parametrize("suffix", ["ts", "mkv", "webm", "flv", "mp4", "avi", "m2ts"])
@pytest.mark.parametrize("with_sound", [False, True])
def test_whole_files_have_none(tmp_path, suffix, with_sound):
    codec = "libvpx" if suffix == "webm" else "libx264"
    if with_sound and suffix == "webm":
        pytest.skip("no AAC in WebM")
    path = tmp_path / f"v.{suffix}"
    options = {"mpegts_m2ts_mode": "1"} if suffix == "m2ts" else {}
    write_video(path, codec=codec, with_sound=with_sound, container_options=options)
    assert places_in(path) == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_numbers(decode_video(path)[0])[:3] == [0, 1, 2]


class TestTransportStream:
    """Of packets of 188 bytes; a picture here takes two to four of them, others are tables."""

    @pytest.fixture
    def path(self, tmp_path):
        return write_video(tmp_path / "v.ts", codec_options=PLAIN)

    @staticmethod
    def video_packets(path) -> list[int]:
        content = path.read_bytes()
        ids = [int.from_bytes(content[at + 1 : at + 3], "big") & 0x1FFF for at in range(0, len(content), 188)]
        with av.open(str(path)) as container:
            return [188 * row for row, number in enumerate(ids) if number == container.streams.video[0].id]

    def test_a_lost_packet(self, path):
        place, _, after = self.video_packets(path)[30:33]
        change(path, place, length=188)
        (found,) = places_in(path)
        assert place <= found < after
        with pytest.warns(UserWarning, match=r"data is lost or changed, at about \d\.\d s first"):
            VideoReader(path)

    @pytest.mark.parametrize("length", [1, 100, 188, 1000])
    def test_lost_bytes(self, path, length):
        change(path, self.video_packets(path)[30] + 50, length=length)
        assert places_in(path)

    def test_a_packet_that_is_marked_as_wrong(self, path):
        place = self.video_packets(path)[30]
        change(path, place + 1, bytes([path.read_bytes()[place + 1] | 0x80]), 1)
        assert places_in(path) == [place]

    def test_a_packet_may_come_twice(self, path):
        place = self.video_packets(path)[30]
        change(path, place, path.read_bytes()[place : place + 188])
        assert places_in(path) == []

    def test_another_packet_with_the_same_count(self, path):
        place = self.video_packets(path)[30]
        packet = bytearray(path.read_bytes()[place : place + 188])
        packet[100] ^= 1
        change(path, place, bytes(packet))
        assert places_in(path) == [place + 188]

    def test_recordings_that_were_joined(self, path):
        path.write_bytes(2 * path.read_bytes())
        assert places_in(path) == []

    def test_what_is_before_the_first_packet_does_not_count(self, path):
        change(path, 0, b"something else")
        assert places_in(path) == []


class TestMatroska:
    @pytest.mark.parametrize("place", [0.3, 0.6, 0.9])
    def test_a_changed_bit(self, tmp_path, place):
        path = write_video(tmp_path / "v.mkv")
        position = int(place * path.stat().st_size)
        change(path, position, bytes([path.read_bytes()[position] ^ 4]), 1)
        assert places_in(path)
        with pytest.warns(UserWarning, match="data is lost or changed"):
            VideoReader(path)

    def test_sizes_that_lead_nowhere(self, tmp_path):
        path = write_video(tmp_path / "v.webm", codec="libvpx")
        cluster = path.read_bytes().index(b"\x1f\x43\xb6\x75")
        change(path, cluster + 5, bytes([path.read_bytes()[cluster + 5] ^ 0x10]), 1)
        assert places_in(path)


def test_lost_bytes_in_flv(tmp_path):
    path = write_video(tmp_path / "v.flv", codec_options=PLAIN)
    packet = packets_of(path)[20]
    change(path, packet.pos, length=10)
    assert len(places_in(path)) == 1
    with pytest.warns(UserWarning, match=r"data is lost or changed, at about 1\.9 s first"):
        VideoReader(path)


def test_a_lost_frame_in_avi(tmp_path):
    path = write_video(tmp_path / "v.avi", codec="mpeg4", codec_options={"bf": "0"})
    packet = packets_of(path)[20]
    change(path, packet.pos, length=4)
    with pytest.warns(UserWarning, match="it announces 40 frames and has 39"):
        VideoReader(path)


class TestFramesThatReferToDamage:
    def noise(self, number: int) -> np.ndarray:
        return np.random.default_rng(number).integers(0, 255, (96, 128, 3), np.uint8)

    def test_those_shown_before_it(self, tmp_path):
        """B-frames 1 and 2 come out before frame 3, which they refer to."""
        path = write_video(tmp_path / "v.mp4", images=[self.noise(number) for number in range(20)])
        packet = sorted(packets_of(path), key=lambda packet: packet.pts)[3]
        change(path, packet.pos + packet.size // 3, bytes(packet.size // 6), packet.size // 6)
        for wanted in ([1], [2], [1, 2, 3]):
            with pytest.warns(
                UserWarning, match=rf"frames, {wanted[0]} \(0\.{wanted[0]} s\).* may show wrong pictures"
            ):
                decode_video(path, lambda metadata, wanted=wanted: np.array(wanted))

    def test_those_after_a_key_frame_that_came_out_later_than_the_damage_was_met(self, tmp_path):
        """The packet of frame 13 cannot be decoded; frame 10, a key frame, comes out after that was known."""
        path = write_video(tmp_path / "v.mp4")
        blank_frames(path, [13])
        with pytest.warns(UserWarning) as caught:
            decode_video(path, lambda metadata: np.array([5, 9, 16, 25]))
        told = [str(warning.message) for warning in caught]
        assert any("of the sampled frames, 16 (1.6 s) may show" in message for message in told), told


def test_a_time_that_strays_within_a_group(tmp_path):
    """Frame 13 says 1.55 s: the numbers are those of decoding from the start, whatever is asked for."""
    path = tmp_path / "v.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=20, options={"g": "10", "bf": "2", "sc_threshold": "0"})
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        for number in [*range(30), None]:
            frame = None if number is None else av.VideoFrame.from_ndarray(draw_number(number), format="rgb24")
            if frame is not None:
                frame.pts = 2 * number
            for packet in stream.encode(frame):
                packet.pts += 5 if packet.pts == 26 else 0
                container.mux(packet)
    for wanted in ([13], [14], [15], [12, 14]):
        with pytest.warns(UserWarning, match="cannot be trusted"):
            frames, metadata = decode_video(path, lambda metadata, wanted=wanted: np.array(wanted))
        assert read_numbers(frames) == wanted
        assert metadata.timestamps == pytest.approx([number / 10 for number in wanted])
