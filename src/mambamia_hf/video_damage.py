"""Where a file itself tells that a part of it is lost or changed: by counters, checksums and sizes that it repeats.

FFmpeg marks pictures that do not decode. Data that is missing as a whole, or changed and decodable all the same, only
the container can tell of: MPEG-TS counts its packets, Matroska has checksums where FFmpeg wrote it, FLV repeats the
size of every part. MP4, WebM, ASF and streams without a container have nothing of the kind.
"""

import zlib
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np


# Bytes per packet of MPEG-TS: as such, with a time before it (Blu-ray), with a code for errors after it.
_PACKET_SIZES = (188, 192, 204)

_SYNC = 0x47

# So many packets of MPEG-TS are looked at together, and so many in a row are no accident.
_PACKETS_AT_ONCE, _PACKETS_IN_A_ROW = 1 << 16, 4

_SEGMENT, _CRC = 0x18538067, 0xBF

# What a segment of Matroska consists of: ways to seek, about it, clusters, tracks, cues, attachments, chapters, tags,
# space that is free, and a checksum.
_PARTS = (0x114D9B74, 0x1549A966, 0x1F43B675, 0x1654AE6B, 0x1C53BB6B, 0x1941A469, 0x1043A770, 0x1254C367, 0xEC, _CRC)

_BLOCK_BYTES = 1 << 20


def damaged_places(path: str, container_format: str, stream_id: int) -> list[int]:
    """The positions in a file at which data is lost or changed, as far as the file tells.

    Args:
        path: The path of the file.
        container_format: The name that FFmpeg gives to its format.
        stream_id: The number of the video stream in the file.
    """
    with open(path, "rb") as file:
        if "mpegts" in container_format:
            return list(_lost_packets(file, stream_id))
        if "matroska" in container_format:
            return list(_changed_parts(file))
        if "flv" in container_format:
            return list(_lost_tags(file))
    return []


def flv_tags(file: BinaryIO) -> Iterator[tuple[int, bytes, int]]:
    """The position, the first 16 bytes and the size of each part of an FLV file, without its head of 11 bytes."""
    file.seek(5)
    position = int.from_bytes(file.read(4), "big") + 4
    while True:
        file.seek(position)
        head = file.read(16)
        if len(head) < 11:
            return
        size = int.from_bytes(head[1:4], "big")
        yield position, head, size
        position += 11 + size + 4


def _lost_tags(file: BinaryIO) -> Iterator[int]:
    """The first part of FLV after which its size is not repeated; what comes next may be anything."""
    is_repeated = False
    for position, _, size in flv_tags(file):
        file.seek(position + 11 + size)
        # Some writers leave out a byte or the head, or repeat nothing.
        if file.read(4) in {(size + more).to_bytes(4, "big") for more in (11, 10, 0)}:
            is_repeated = True
        elif is_repeated:
            yield position
            return


def _changed_parts(file: BinaryIO) -> Iterator[int]:
    """Parts of Matroska whose checksum differs, or that are none."""
    file_size = end = file.seek(0, 2)
    position = 0
    while position < min(end, file_size):
        file.seek(position)
        kind, size, content = _element(file.read(12))
        content += position
        if kind == _SEGMENT:
            end = content + size
            position = content
            continue
        if position > 0 and kind not in _PARTS:
            yield position
            return
        position = content + size
        if position > file_size:  # cut off, or a live stream, whose parts have no size
            return
        file.seek(content)
        first, checksum_size, start = _element(file.read(12))
        if first == _CRC and checksum_size == 4:
            file.seek(content + start)
            if int.from_bytes(file.read(4), "little") != _checksum(file, position - content - start - 4):
                yield content


def _element(head: bytes) -> tuple[int, int, int]:
    """What an element of Matroska is, its size, and where its content begins; 0 for what is none."""
    kind_length = 9 - head[0].bit_length() if head else 9
    if kind_length > 4 or len(head) <= kind_length:
        return 0, 0, 0
    size_length = 9 - head[kind_length].bit_length()
    content = kind_length + size_length
    size = int.from_bytes(head[kind_length:content], "big") & ((1 << 7 * size_length) - 1)
    return int.from_bytes(head[:kind_length], "big"), size, content


def _checksum(file: BinaryIO, size: int) -> int:
    checksum = 0
    while size > 0 and (block := file.read(min(size, _BLOCK_BYTES))):
        checksum = zlib.crc32(block, checksum)
        size -= len(block)
    return checksum


def _lost_packets(file: BinaryIO, stream_id: int) -> Iterator[int]:
    """Where packets of MPEG-TS do not follow each other, or those of a stream are not counted up by one."""
    sizes: tuple[int, ...] = _PACKET_SIZES
    position = 0
    last: dict[int, int] = {}  # counts of the stream and of the list of programmes, which is between its packets
    while True:
        file.seek(position)
        block = np.frombuffer(file.read(_PACKETS_AT_ONCE * _PACKET_SIZES[0]), dtype=np.uint8)
        first, size = _first_packet(block, sizes)
        if size == 0:
            return
        sizes = (size,)
        packets = block[first : first + (len(block) - first) // size * size].reshape(-1, size)
        in_sync = packets[:, 0] == _SYNC
        if not in_sync.all():
            packets = packets[: int(np.argmin(in_sync))]
        breaks = np.concatenate([_breaks(packets, number, last) for number in (0, stream_id)])
        yield from (position + first + np.sort(breaks) * size).tolist()
        position += first + len(packets) * size
        if not in_sync.all():
            yield position


def _first_packet(block: np.ndarray, sizes: tuple[int, ...]) -> tuple[int, int]:
    """Where the first of some packets in a row begins, and their size; 0 if there are none."""
    found: list[tuple[int, int]] = []
    for size in sizes:
        num_starts = max(len(block) - size * (_PACKETS_IN_A_ROW - 1), 0)
        rows = [block[size * row :][:num_starts] == _SYNC for row in range(_PACKETS_IN_A_ROW)]
        found.extend((int(start), size) for start in np.flatnonzero(np.all(rows, axis=0))[:1])
    return min(found, default=(0, 0))


def _breaks(packets: np.ndarray, stream_id: int, last: dict[int, int]) -> np.ndarray:
    """The packets of a stream that do not follow the one before, of which `last` has the count.

    Packets with content are counted modulo 16, unless they announce a break or repeat the packet before; so says
    ISO/IEC 13818-1, 2.4.3.3. A recording that was put after another one begins at 0 with a picture to start from.
    """
    numbers = np.flatnonzero((packets[:, 1].astype(int) & 0x1F) << 8 | packets[:, 2] == stream_id)
    if len(numbers) == 0:
        return numbers
    heads = packets[numbers, :6].astype(int)
    counts, has_content, is_marked_wrong = heads[:, 3] & 15, heads[:, 3] >> 4 & 1, heads[:, 1] >> 7 == 1
    flags = np.where((heads[:, 3] & 0x20 > 0) & (heads[:, 4] > 0), heads[:, 5], 0)
    begins_anew = (counts == 0) & (heads[:, 1] & 0x40 > 0) & ((flags & 0x40 > 0) | (stream_id == 0))
    before = np.append(last.get(stream_id, counts[0] - has_content[0]), counts[:-1])
    last[stream_id] = int(counts[-1])
    is_break = ((before + has_content - counts) % 16 != 0) & (flags & 0x80 == 0) & ~begins_anew
    for place in np.flatnonzero(is_break & (before == counts)):
        is_break[place] = place == 0 or (packets[numbers[place]] != packets[numbers[place - 1]]).any()
    return numbers[is_break | is_marked_wrong]


__all__ = ["damaged_places", "flv_tags"]
