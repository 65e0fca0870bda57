"""Pictures of H.264 that are missing without a trace but their number: noticed, and nothing else is taken for that."""

import random
import warnings
from pathlib import Path

import av
import numpy as np
import pytest
from video_files import draw_number, write_video

from mambamia_hf.video_decoding import decode_video
from mambamia_hf.video_gaps import FrameNumbers


TELLS_OF_NEW_PARAMETERS = hasattr(av.Packet, "has_sidedata")

STREAMS = {
    "one reference": "bframes=0:ref=1",
    "B-frames": "bframes=3:b-adapt=0:b-pyramid=none",
    "B-frames that are references": "bframes=5:b-adapt=0:b-pyramid=normal:ref=16",
    "open groups": "bframes=3:b-adapt=0:open-gop=1",
    "refreshed bit by bit": "bframes=0:intra-refresh=1",
    "slices": "bframes=2:slices=4",
    "macroblocks of fields": "bframes=2:tff=1",
    "weights": "bframes=3:weightp=2:weightb=1:ref=4",
    "scaling and delimiters": "bframes=2:cqm=jvt:aud=1:repeat-headers=1:nal-hrd=vbr:vbv-maxrate=900:vbv-bufsize=900",
}


def write_stream(path: Path, parameters: str = "bframes=0", **kwargs) -> Path:
    options = {"preset": "veryfast", "x264-params": f"scenecut=0:threads=1:{parameters}"}
    return write_video(path, codec_options=options, **kwargs)


def write_without(path: Path, missing: set[int]) -> Path:
    """Writes a video of 40 frames without some of its packets, and closes the gap in time."""
    options = {"g": "10", "bf": "0", "preset": "veryfast", "sc_threshold": "0"}
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10, options=options)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        packets = []
        for number in range(40):
            frame = av.VideoFrame.from_ndarray(draw_number(number), format="rgb24")
            frame.pts = number
            packets.extend(stream.encode(frame))
        packets.extend(stream.encode())
        times = [(packet.pts, packet.dts) for packet in packets]
        left = [packet for number, packet in enumerate(packets) if number not in missing]
        for packet, (packet.pts, packet.dts) in zip(left, times, strict=False):
            container.mux(packet)
    return path


def read_stream(path: Path) -> tuple[list[av.Packet], bytes | None, str]:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        packets = [packet for packet in container.demux(stream) if packet.size]
        return packets, stream.codec_context.extradata, container.format.name


def gaps(packets: list[av.Packet], parameters: bytes | None, container_format: str) -> list[int]:
    numbers = FrameNumbers(parameters, container_format)
    return [number for number, packet in enumerate(packets) if numbers.shows_a_gap(packet)]


def is_reference(packet: av.Packet) -> bool:
    """Of a packet whose units have marked starts."""
    heads = [unit[0] for unit in bytes(packet).split(b"\0\0\1")[1:]]
    return next(head & 0x60 > 0 for head in heads if head & 0x1F in (1, 5))


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts", "avi", "h264", "flv"])
def test_frames_after_a_lost_one_are_named(tmp_path, suffix):
    if suffix in ("mp4", "flv") and not TELLS_OF_NEW_PARAMETERS:
        pytest.skip("this PyAV does not tell of new parameters")
    path = write_without(tmp_path / f"v.{suffix}", {13})
    # Where packets have no times, what is still in a thread of FFmpeg counts as coming after the gap.
    named = r"of the sampled frames, (12 \(1\.2 s\), )?15 \(\d\.\d s\), 18 \(\d\.\d s\) may show wrong"
    with pytest.warns(UserWarning, match=named):
        decode_video(path, lambda metadata: np.array([5, 12, 15, 18, 19, 25]))


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts", "avi", "h264", "flv"])
def test_nothing_is_told_of_whole_files(tmp_path, suffix):
    path = write_without(tmp_path / f"v.{suffix}", set())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decode_video(path, lambda metadata: np.array([5, 12, 15, 18, 19, 25]))


class TestStreams:
    @pytest.mark.parametrize("parameters", STREAMS.values(), ids=STREAMS)
    @pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts", "h264"])
    def test_whole_ones_have_none(self, tmp_path, suffix, parameters):
        path = write_stream(tmp_path / f"v.{suffix}", parameters)
        assert gaps(*read_stream(path)) == []
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            decode_video(path)

    @pytest.mark.parametrize("parameters", STREAMS.values(), ids=STREAMS)
    def test_each_reference_that_is_missing(self, tmp_path, parameters):
        packets, *stream = read_stream(write_stream(tmp_path / "v.ts", parameters))
        for number in range(1, len(packets) - 1):
            is_noticed = is_reference(packets[number])
            if packets[number + 1].is_keyframe:  # with which a new recording may begin, unless it is none
                is_noticed = "intra-refresh" in parameters
            expected = [number] if is_noticed else []
            assert gaps(packets[:number] + packets[number + 1 :], *stream) == expected

    def test_one_that_begins_anywhere(self, tmp_path):
        packets, *stream = read_stream(write_stream(tmp_path / "v.ts", "bframes=2"))
        for number in range(len(packets)):
            assert gaps(packets[number:], *stream) == []

    def test_a_jump_is_no_gap(self, tmp_path):
        packets, *stream = read_stream(write_stream(tmp_path / "v.ts"))
        numbers = FrameNumbers(*stream)
        assert not numbers.shows_a_gap(packets[2])
        numbers.begin_anew()
        assert not numbers.shows_a_gap(packets[7])
        assert numbers.shows_a_gap(packets[5])

    def test_recordings_with_other_parameters_that_were_joined(self, tmp_path):
        first = write_stream(tmp_path / "a.ts", "ref=1:bframes=0")
        second = write_stream(tmp_path / "b.ts", "ref=16:bframes=5:b-pyramid=normal:keyint=40")
        path = tmp_path / "v.ts"
        for whole in (first.read_bytes() + second.read_bytes(), second.read_bytes() + first.read_bytes()):
            path.write_bytes(whole)
            assert gaps(*read_stream(path)) == []

    def test_parameters_that_change_beside_the_packets(self, tmp_path):
        parts = []
        for name, parameters, start in (("a.flv", "ref=1:bframes=0", 0), ("b.flv", "ref=16:keyint=40:bframes=0", 4)):
            parts.append(write_stream(tmp_path / name, parameters, start=start).read_bytes())
        path = tmp_path / "v.flv"
        path.write_bytes(parts[0] + parts[1][13:])
        packets, *stream = read_stream(path)
        assert len(packets) == 80
        assert gaps(packets, *stream) == []
        assert gaps(packets[:60] + packets[61:], *stream) == ([60] if TELLS_OF_NEW_PARAMETERS else [])

    def test_damaged_packets_raise_nothing(self, tmp_path):
        packets, parameters, container_format = read_stream(write_stream(tmp_path / "v.mkv", "bframes=3:weightp=2"))
        chance = random.Random(0)
        for _ in range(300):
            damaged = bytearray(parameters)
            damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
            numbers = FrameNumbers(bytes(damaged[: chance.randrange(len(damaged) + 1)]), container_format)
            for packet in packets[:20]:
                content = bytearray(bytes(packet)[: chance.randrange(40)])
                for _ in range(min(len(content), 2)):
                    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
                numbers.shows_a_gap(av.Packet(bytes(content)))


def code(number: int) -> str:
    """An Exp-Golomb code, in bits."""
    bits = f"{number + 1:b}"
    return "0" * (len(bits) - 1) + bits


def unit(head: int, *bits: str) -> bytes:
    whole = "".join(bits) + "1"
    whole += "0" * (-len(whole) % 8)
    content = int(whole, 2).to_bytes(len(whole) // 8, "big")
    for last in range(4):
        content = content.replace(b"\0\0" + bytes([last]), b"\0\0\3" + bytes([last]))
    return b"\0\0\1" + bytes([head]) + content


class TestPicturesThatAreCountedAnew:
    """Of units made by hand: no encoder at hand makes pictures count from 0 again without a key frame."""

    @staticmethod
    def packets(
        head_of_p: str, last_number: int, order: str, weights: str, may_have_gaps: str = "0"
    ) -> list[av.Packet]:
        """Pictures 0, 1, 2, which ends with `head_of_p`, `last_number` and one that none refers to."""
        sequence = unit(
            0x67, f"{66:08b}", f"{0:08b}", f"{30:08b}", code(0), code(0), order, code(4), may_have_gaps, code(3),
            code(2), "1", "1", "0", "0",
        )  # fmt: skip
        picture = unit(
            0x68, code(0), code(0), "0", "0", code(0), code(0), code(0), weights, code(0), code(0), code(0), "100"
        )
        order_of_slice = f"{2:04b}" if order == code(0) + code(0) else ""
        begin = unit(0x65, code(0), code(7), code(0), "0000", code(0), order_of_slice, "00", "0" * 40)
        first = unit(0x41, code(0), code(5), code(0), "0001", order_of_slice, "0" * 40)
        second = unit(0x41, code(0), code(5), code(0), "0010", order_of_slice, head_of_p, "0" * 40)
        last = unit(0x41, code(0), code(5), code(0), f"{last_number:04b}", order_of_slice, "0" * 40)
        after = unit(0x01, code(0), code(5), code(0), f"{last_number + 1:04b}", order_of_slice, "0" * 40)
        return [av.Packet(content) for content in (sequence + picture + begin, first, second, last, after)]

    ORDERS = (code(0) + code(0), code(1) + "1" + code(0) + code(0) + code(1) + code(3), code(2))
    # Ways to refer to pictures, and weights of two of them, before the operations.
    REFERENCES = ("0" + "0", "1" + code(1) + "1" + code(0) + code(4) + code(3))
    WEIGHTS = code(5) + code(5) + "1" + code(9) + code(0) + "1" + 4 * code(2) + "00"

    @pytest.mark.parametrize("order", ORDERS)
    @pytest.mark.parametrize("is_weighted", [False, True])
    def test_after_the_operation(self, order, is_weighted):
        references = self.REFERENCES[1 if is_weighted else 0] + (self.WEIGHTS if is_weighted else "")
        weights = "100" if is_weighted else "000"
        again = references + "1" + code(1) + code(8) + code(5) + code(0)
        other = references + "1" + code(1) + code(8) + code(3) + code(5) + code(5) + code(0)
        assert gaps(self.packets(again, 1, order, weights), None, "h264") == []
        assert gaps(self.packets(again, 5, order, weights), None, "h264") == [3]
        assert gaps(self.packets(other, 1, order, weights), None, "h264") == [3]
        assert gaps(self.packets(references + "0", 1, order, weights), None, "h264") == [3]
        assert gaps(self.packets(references + "0", 3, order, weights), None, "h264") == []

    def test_where_pictures_may_be_left_out(self):
        order = self.ORDERS[0]
        assert gaps(self.packets("000", 7, order, "000"), None, "h264") == [3]
        assert gaps(self.packets("000", 7, order, "000", may_have_gaps="1"), None, "h264") == []
