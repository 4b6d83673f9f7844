"""What H.264 and HEVC share: NAL units, numbers in bits, and a packet's coded frame. Pure functions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

Buffer = bytes | memoryview


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

    def skip_ue(self, count: int) -> None:
        for _ in range(count):
            self.ue()


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


class Sets:
    """Parameter sets by kind and number: what slices refer to.

    changed: one was replaced on the way, so that decoding must begin before it.
    """

    def __init__(self) -> None:
        self._fields: dict[tuple[str, int], tuple[int, ...]] = {}
        self._closed = self.changed = False

    def close(self) -> None:
        """Those of the stream's header are known; more are in its packets."""
        self._closed = True

    def put(self, kind: str, number: int, fields: tuple) -> None:
        known = self._fields.get((kind, number))
        self.changed |= self._closed and known != fields
        self._fields[kind, number] = fields

    def get(self, kind: str, number: int) -> tuple:
        fields = self._fields.get((kind, number))
        if fields is None:
            raise Unknown
        return fields


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
