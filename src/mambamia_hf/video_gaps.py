"""Where reference pictures of H.264 are missing, of which neither containers nor FFmpeg tell.

H.264 numbers the pictures that others may refer to: each picture has the number of the last of them or the one after
it (`frame_num` of ISO/IEC 14496-10, 7.4.3). Where a picture has another number, FFmpeg decodes it with whatever is
there, and calls it whole. Sections in comments are those of the standard.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import av


# Kinds of units (7.4.1): slices, those with which everything begins anew, parameters of sequences and of pictures.
_SLICES, _SLICE_OF_IDR, _SEQUENCE, _PICTURE = (1, 2, 5), 5, 7, 8

# Kinds of slices (7.4.3); the other two are intra-coded.
_P, _B, _SP = 0, 1, 3

# Profiles whose parameters state colours and scaling (7.3.2.1.1).
_HIGH_PROFILES = (44, 83, 86, 100, 110, 118, 122, 128, 134, 135, 138, 139, 144, 244)

# The operation that makes the pictures after it count from 0 again, and what follows the others (7.4.3.3).
_COUNT_AGAIN, _NUM_OPERANDS = 5, {1: 1, 2: 1, 3: 2, 4: 1, 6: 1}

# So many bytes hold the head of a slice, except one with weights of very many references.
_HEAD_BYTES = 256

_START = b"\0\0\1"

# Until PyAV 16, packets do not tell of new parameters that are beside them, as those of MP4 and FLV are.
_TELLS_OF_NEW_PARAMETERS = hasattr(av.Packet, "has_sidedata")


class FrameNumbers:
    """Follows the numbers of pictures from packet to packet, in the order of decoding.

    Args:
        parameters: What the container keeps beside the packets: `extradata` of the decoder.
        container_format: The name that FFmpeg gives to the format of the file.
    """

    def __init__(self, parameters: bytes | None, container_format: str) -> None:
        self._sequences: dict[int, _Sequence] = {}
        self._pictures: dict[int, _Picture] = {}
        self._length_size = 0  # bytes of the length before each unit; 0 where starts are marked
        self._is_blind = not _TELLS_OF_NEW_PARAMETERS and ("mp4" in container_format or "flv" in container_format)
        self._last: _Slice | None = None  # of the last picture that others may refer to
        self._read_parameters(parameters or b"")

    def begin_anew(self) -> None:
        """The next packet does not follow the one before."""
        self._last = None

    def shows_a_gap(self, packet: av.Packet) -> bool:
        """Whether pictures are missing between the picture of `packet` and the one before.

        What precedes a key frame is never missed, as recordings may be put together there; key frames of a stream that
        is refreshed bit by bit are none.
        """
        if self._is_blind:
            return False
        if _TELLS_OF_NEW_PARAMETERS and packet.has_sidedata("new_extradata"):
            self._read_parameters(bytes(packet.get_sidedata("new_extradata")))
        current = self._first_slice(bytes(packet))
        last, self._last = self._last, current if current is None or current.is_reference else self._last
        if current is None or last is None or current.is_idr:
            return False
        if packet.is_keyframe and current.is_intra:
            return False
        if current.sequence.may_have_gaps or current.sequence != last.sequence:
            return False
        if not current.follows(last.number) and _counts_again_after(last):
            last.number = 0
        if current.follows(last.number):
            return False
        if not current.is_reference:
            self._last = None  # the missing picture is told of once
        return True

    def _read_parameters(self, parameters: bytes) -> None:
        """Reads what MP4 has beside packets (ISO/IEC 14496-15, 5.3.3.1), or marked units."""
        if parameters[:1] != b"\1" or len(parameters) < 7:
            self._first_slice(parameters)
            return
        self._length_size = (parameters[4] & 3) + 1
        place = 5
        for mask in (0x1F, 0xFF):
            num_units = parameters[place] & mask if place < len(parameters) else 0
            place += 1
            for _ in range(num_units):
                size = int.from_bytes(parameters[place : place + 2], "big")
                self._read_unit(parameters[place + 2 : place + 2 + size])
                place += 2 + size

    def _first_slice(self, data: bytes) -> "_Slice | None":
        """The first slice of a packet, after the parameters before it were read; `None` for none that is readable."""
        for unit in _units(data, self._length_size):
            if unit and unit[0] & 0x1F in _SLICES:
                try:
                    return self._read_slice(unit[:_HEAD_BYTES])
                except (EOFError, KeyError):
                    return None
            self._read_unit(unit)
        return None

    def _read_unit(self, unit: bytes) -> None:
        """Takes note of a unit with parameters; unreadable ones are not known from then on."""
        kind = unit[0] & 0x1F if unit else 0
        try:
            if kind == _SEQUENCE:
                number, sequence = _read_sequence(_Bits(unit[1:]))
                self._sequences[number] = sequence
            elif kind == _PICTURE:
                number, picture = _read_picture(_Bits(unit[1:]))
                self._pictures[number] = picture
        except EOFError:
            (self._sequences if kind == _SEQUENCE else self._pictures).clear()

    def _read_slice(self, unit: bytes) -> "_Slice":
        bits = _Bits(unit[1:])
        bits.unsigned()  # where in the picture it begins
        kind = bits.unsigned() % 5
        picture = self._pictures[bits.unsigned()]
        sequence = self._sequences[picture.sequence]
        if sequence.has_planes:
            bits.number(2)
        return _Slice(
            number=bits.number(sequence.bits_of_number),
            kind=kind,
            is_reference=unit[0] & 0x60 > 0,
            is_idr=unit[0] & 0x1F == _SLICE_OF_IDR,
            sequence=sequence,
            picture=picture,
            rest=bits,
        )


@dataclass
class _Sequence:
    """The parameters of a sequence that are needed to read slices (7.3.2.1.1)."""

    has_planes: bool
    has_colours: bool
    bits_of_number: int
    order_kind: int
    bits_of_order: int
    has_order: bool
    may_have_gaps: bool
    frames_only: bool


@dataclass
class _Picture:
    """The parameters of a picture that are needed to read slices (7.3.2.2)."""

    sequence: int
    has_order_of_fields: bool
    num_references: tuple[int, int]
    is_weighted: tuple[bool, bool]  # P and B
    has_copies: bool


@dataclass
class _Slice:
    """The head of a slice (7.3.3)."""

    number: int
    kind: int
    is_reference: bool
    is_idr: bool
    sequence: _Sequence
    picture: _Picture
    rest: "_Bits"

    @property
    def is_intra(self) -> bool:
        return self.kind not in (_P, _B, _SP)

    def follows(self, number: int) -> bool:
        """Whether this may be the picture after one with this number. Both fields of a frame have the same."""
        return self.number in (number, (number + 1) % (1 << self.sequence.bits_of_number))


class _Bits:
    """Reads the bits of a unit, which raises an `EOFError` at its end."""

    def __init__(self, unit: bytes) -> None:
        unit = unit.replace(b"\0\0\3", b"\0\0")  # lets nothing look like a start (7.4.1)
        self._bits, self._num_left = int.from_bytes(unit, "big"), 8 * len(unit)

    def number(self, length: int) -> int:
        self._num_left -= length
        if self._num_left < 0:
            raise EOFError
        return self._bits >> self._num_left & ((1 << length) - 1)

    def flag(self) -> bool:
        return bool(self.number(1))

    def unsigned(self) -> int:
        """A number in an Exp-Golomb code (9.1)."""
        num_zeros = self._num_left - (self._bits & ((1 << self._num_left) - 1)).bit_length()
        return self.number(2 * num_zeros + 1) - 1

    def signed(self) -> int:
        code = self.unsigned()
        return (code + 1) // 2 if code % 2 else -(code // 2)


def _units(data: bytes, length_size: int) -> Iterator[bytes]:
    if length_size:
        start = length_size
        while start < len(data):
            end = start + int.from_bytes(data[start - length_size : start], "big")
            yield data[start:end]
            start = end + length_size
        return
    start = data.find(_START)
    while start >= 0:
        end = data.find(_START, start + 3)
        yield data[start + 3 : end if end >= 0 else len(data)]
        start = end


def _read_sequence(bits: _Bits) -> tuple[int, _Sequence]:
    profile = bits.number(8)
    bits.number(16)
    number = bits.unsigned()
    colours, has_planes = 1, False
    if profile in _HIGH_PROFILES:
        colours = bits.unsigned()
        has_planes = colours == 3 and bits.flag()
        bits.unsigned(), bits.unsigned(), bits.flag()
        if bits.flag():
            _skip_scaling(bits, 12 if colours == 3 else 8)
    bits_of_number = bits.unsigned() + 4
    order_kind = bits.unsigned()
    bits_of_order = bits.unsigned() + 4 if order_kind == 0 else 0
    has_order = order_kind == 1 and not bits.flag()
    if order_kind == 1:
        bits.unsigned(), bits.unsigned()
        for _ in range(bits.unsigned()):
            bits.unsigned()
    bits.unsigned()
    may_have_gaps = bits.flag()
    bits.unsigned(), bits.unsigned()
    return number, _Sequence(
        has_planes=has_planes,
        has_colours=colours > 0 and not has_planes,
        bits_of_number=bits_of_number,
        order_kind=order_kind,
        bits_of_order=bits_of_order,
        has_order=has_order,
        may_have_gaps=may_have_gaps,
        frames_only=bits.flag(),
    )


def _skip_scaling(bits: _Bits, num_lists: int) -> None:
    for size in [16] * 6 + [64] * (num_lists - 6):
        if not bits.flag():
            continue
        last = following = 8
        for _ in range(size):
            if following:
                following = (last + bits.signed()) % 256
                last = following or last


def _read_picture(bits: _Bits) -> tuple[int, _Picture]:
    number, sequence = bits.unsigned(), bits.unsigned()
    bits.flag()
    has_order_of_fields = bits.flag()
    if bits.unsigned():
        raise EOFError  # slices in any order, of which only a profile of the first days made use
    num_references = bits.unsigned() + 1, bits.unsigned() + 1
    is_weighted = bits.flag(), bits.number(2) == 1
    bits.unsigned(), bits.unsigned(), bits.unsigned(), bits.number(2)
    return number, _Picture(sequence, has_order_of_fields, num_references, is_weighted, has_copies=bits.flag())


def _counts_again_after(head: _Slice) -> bool:
    """Whether pictures are counted from 0 after that of a slice, which is read on; so also where it cannot be read."""
    try:
        operations = list(_operations(head))
    except EOFError:
        return True
    return _COUNT_AGAIN in operations


def _operations(head: _Slice) -> Iterator[int]:
    """What is done to pictures that were decoded before (7.3.3.3), for a picture that not all begins anew with."""
    bits, picture = head.rest, head.picture
    _skip_order(head)
    if picture.has_copies:
        bits.unsigned()
    if head.kind == _B:
        bits.flag()
    num_lists = {_P: 1, _SP: 1, _B: 2}.get(head.kind, 0)
    num_references = list(picture.num_references[:num_lists])
    if num_lists and bits.flag():
        num_references = [bits.unsigned() + 1 for _ in num_references]
    for _ in num_references:
        if bits.flag():
            while bits.unsigned() != 3:
                bits.unsigned()
    if num_lists and picture.is_weighted[num_lists - 1]:
        _skip_weights(bits, num_references, head.sequence.has_colours)
    if not bits.flag():
        return
    while operation := bits.unsigned():
        yield operation
        for _ in range(_NUM_OPERANDS.get(operation, 0)):
            bits.unsigned()


def _skip_order(head: _Slice) -> None:
    """Skips when the picture is shown."""
    bits, sequence = head.rest, head.sequence
    is_field = not sequence.frames_only and bits.flag()
    if is_field:
        bits.flag()
    bits.number(sequence.bits_of_order)
    num_deltas = int(sequence.has_order)
    if head.picture.has_order_of_fields and not is_field:
        num_deltas += int(sequence.has_order or sequence.order_kind == 0)
    for _ in range(num_deltas):
        bits.unsigned()


def _skip_weights(bits: _Bits, num_references: list[int], has_colours: bool) -> None:
    """Skips the weights of references (7.3.3.2)."""
    bits.unsigned()
    if has_colours:
        bits.unsigned()
    for _ in range(sum(num_references)):
        for num_planes in (1, 2) if has_colours else (1,):
            if bits.flag():
                for _ in range(2 * num_planes):
                    bits.unsigned()


__all__ = ["FrameNumbers"]
