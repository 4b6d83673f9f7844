"""What H.264 and HEVC share: NAL units, numbers in bits, and a packet's coded frame. Pure functions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

Buffer = bytes | memoryview
_DISPLAY_ORIENTATION = 47  # H.264 D.1.27, HEVC D.2.17


class Coded(NamedTuple):
    """The coded frame of a packet."""

    order: tuple[int, int]  # ascends as frames are shown
    shown: bool = True  # False: the decoder puts nothing out for it
    entry: bool = False  # decoding may begin here: the frames shown from this one on are those of a full decode
    spare: bool = False  # no other frame refers to it


class Unknown(Exception):
    """The stream is damaged or uses what is not read here: only decoding tells its frames."""


class Bits:
    """Reads numbers from the front of a NAL unit. ValueError: it has ended."""

    def __init__(self, unit: Buffer) -> None:
        data = bytes(unit)
        if b"\0\0\3" in data:  # H.264 7.4.1: the 3 keeps a start code from appearing inside
            data = data.replace(b"\0\0\3", b"\0\0")
        self._value, self.left = int.from_bytes(data, "big"), 8 * len(data)

    def u(self, count: int) -> int:
        """The next `count` bits."""
        self.left -= count
        return (self._value >> self.left) & ((1 << count) - 1)

    def ue(self) -> int:
        """An unsigned Exp-Golomb code (H.264 9.1)."""
        rest = self._value & ((1 << self.left) - 1)
        self.left = left = 2 * rest.bit_length() - self.left - 1
        return (rest >> left) - 1

    def se(self) -> int:
        """A signed Exp-Golomb code (H.264 9.1.1)."""
        code = self.ue()
        return (code + 1) // 2 if code % 2 else -(code // 2)


def units(data: Buffer, length_bytes: int) -> Iterator[Buffer]:
    """The NAL units of a packet. length_bytes: of the length before each; 0: start codes part them (Annex B)."""
    if not length_bytes:
        yield from _between_start_codes(bytes(data))
        return
    at = 0
    while at + length_bytes < len(data):
        size = int.from_bytes(data[at : at + length_bytes], "big")
        at += length_bytes
        if size:
            yield data[at : at + size]
        at += size


def _between_start_codes(data: bytes) -> Iterator[bytes]:
    start = data.find(b"\0\0\1")
    while start >= 0:
        end = data.find(b"\0\0\1", start + 3)
        if unit := data[start + 3 : end if end >= 0 else len(data)]:
            yield unit
        start = end


def messages(unit: Buffer) -> Iterator[tuple[int, bytes]]:
    """Kind and content of the supplemental messages in a NAL unit, behind its header (H.264 7.3.2.3.1)."""
    data, at = bytes(unit).replace(b"\0\0\3", b"\0\0"), 0
    while at + 2 < len(data):
        numbers = []
        for _ in ("kind", "size"):
            value = 0
            while at < len(data) and data[at] == 255:
                value, at = value + 255, at + 1
            value, at = value + (data[at] if at < len(data) else 0), at + 1
            numbers.append(value)
        yield numbers[0], data[at : at + numbers[1]]
        at += numbers[1]


def may_be_turned(codec: str, extradata: bytes, packet: bytes) -> bool:
    """Whether an H.264 or HEVC stream asks to turn its frames. extradata: its header; packet: its first one."""
    if codec == "h264":
        length = (extradata[4] & 3) + 1 if extradata[:1] == b"\1" and len(extradata) > 4 else 0
        found = [unit[1:] for unit in units(packet, length) if unit[0] & 31 == 6]
    elif codec == "hevc":
        length = (extradata[21] & 3) + 1 if extradata[:1] == b"\1" and len(extradata) > 21 else 0
        found = [unit[2:] for unit in units(packet, length) if unit[0] >> 1 & 63 == 39]
        found += [extradata[i + 2 :] for i in range(len(extradata)) if extradata[i : i + 2] == b"\x4e\1"]
    else:
        return False
    return any(kind == _DISPLAY_ORIENTATION for unit in found for kind, _ in messages(unit))


@dataclass
class Sets:
    """Parameter sets by kind and number: what slices refer to.

    in_header: those of the stream's header are still being read. changed: one was replaced after that, so that decoding
    must begin before it. slices: what follows from the first bytes of one, by these.
    """

    fields: dict[tuple[str, int], tuple] = field(default_factory=dict)
    slices: dict[bytes, tuple] = field(default_factory=dict)
    in_header: bool = True
    changed: bool = False

    def put(self, kind: str, number: int, fields: tuple) -> None:
        self.changed |= not self.in_header and self.fields.get((kind, number)) != fields
        self.fields[kind, number] = fields
        self.slices.clear()


def order_count(low: int, bits: int, previous: int) -> int:
    """The whole order count, of which a slice has the lowest `bits` (H.264 8.2.1.1, HEVC 8.3.1).

    previous: the whole one of the reference frame before it.
    """
    whole = 1 << bits
    high = previous - previous % whole
    if low < previous % whole and previous % whole - low >= whole // 2:
        return high + whole + low
    if low > previous % whole and low - previous % whole > whole // 2:
        return high - whole + low
    return high + low
