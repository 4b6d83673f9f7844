"""A look at the elements of a WebM or Matroska file before any demuxer sees them (RFC 8794, RFC 9559)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from bevt_ds.data.limits import BadSample, Container, Limits

MAGIC = b"\x1a\x45\xdf\xa3"
SEGMENT, CLUSTER, TRACKS, TRACK = 0x18538067, 0x1F43B675, 0x1654AE6B, 0xAE
NUMBER, TYPE, VIDEO, WIDTH, HEIGHT = 0xD7, 0x83, 0xE0, 0xB0, 0xBA
PROJECTION = 0x7670  # of a video: how it is turned, among others
SIMPLE_BLOCK, BLOCK_GROUP, BLOCK = 0xA3, 0xA0, 0xA1
_IS_VIDEO = 1
_NESTED = frozenset({SEGMENT, CLUSTER, TRACKS, TRACK, VIDEO, BLOCK_GROUP})
# A writer that cannot seek leaves their size open: such an element ends where one that cannot be its child begins.
_MAY_BE_OPEN = frozenset({SEGMENT, CLUSTER})
_MAX_ELEMENTS = 1_000_000
_LACING = 0x06


@dataclass
class Facts:
    """What the walk has met so far. Tracks are numbered by the file."""

    track: dict[int, int] = field(default_factory=dict)  # of the track that is being read: element -> value
    videos: dict[int, tuple[int, int]] = field(default_factory=dict)  # number -> width, height
    blocks: dict[int, int] = field(default_factory=dict)  # number -> frames
    may_be_turned: bool = False


def check_matroska(data: bytes, limits: Limits) -> Container:
    """The first video track; any of them may be turned. BadSample: an element is cut or outside its parent."""
    facts = Facts()
    for element, start, end in _elements(data):
        if element == TRACK:
            facts.track = {}
        elif element in (NUMBER, TYPE, WIDTH, HEIGHT):
            facts.track[element] = _unsigned(data, start, end)
            _note_video(facts)
        elif element == PROJECTION:
            facts.may_be_turned = True
        elif element in (SIMPLE_BLOCK, BLOCK):
            _count_block(facts, data, start, end)
    if not facts.videos:
        raise BadSample("it has no video stream")
    number, (width, height) = next(iter(facts.videos.items()))
    limits.check_size(width, height)
    limits.check_frames(facts.blocks.get(number, 0))
    return Container("matroska", width, height, facts.blocks[number], may_be_turned=facts.may_be_turned)


def _elements(data: bytes) -> Iterator[tuple[int, int, int]]:
    """(id, first byte, last + 1) of every element on the way down to blocks and track facts."""
    at, ends = 0, [len(data)]
    for _ in range(_MAX_ELEMENTS):
        while len(ends) > 1 and at == ends[-1]:
            ends.pop()
        if at == len(data):
            return
        element, start = _vint(data, at, ends[-1], keep_marker=True)
        size, start = _vint(data, start, ends[-1])
        if size is None:
            if element not in _MAY_BE_OPEN:
                raise BadSample(f"its element {element:#x} at byte {at} has no size")
            end = ends[-1]
        else:
            end = start + size
        if end > ends[-1]:
            raise BadSample(f"it is cut: its element {element:#x} at byte {at} ends at {end}, outside its parent")
        yield element, start, end
        at = start if element in _NESTED else end
        if element in _NESTED and size is not None:
            ends.append(end)
    raise BadSample(f"it has more than {_MAX_ELEMENTS} elements")


def _vint(data: bytes, at: int, end: int, keep_marker: bool = False) -> tuple[int | None, int]:
    """A number of variable length, and the byte after it. None: all its bits are set, which means unknown."""
    if at >= end or not data[at]:
        raise BadSample(f"it is damaged at byte {at}: a number of an impossible length")
    length = 9 - data[at].bit_length()
    if at + length > end:
        raise BadSample("it is cut inside an element's header")
    raw = int.from_bytes(data[at : at + length], "big")
    value = raw & ((1 << 7 * length) - 1)
    if keep_marker:
        return raw, at + length
    return (None if value == (1 << 7 * length) - 1 else value), at + length


def _unsigned(data: bytes, start: int, end: int) -> int:
    if end - start > 8:
        raise BadSample("it is damaged: a number of more than 8 bytes")
    return int.from_bytes(data[start:end], "big")


def _note_video(facts: Facts) -> None:
    track = facts.track
    if track.get(TYPE) == _IS_VIDEO and {NUMBER, WIDTH, HEIGHT} <= track.keys():
        facts.videos[track[NUMBER]] = (track[WIDTH], track[HEIGHT])


def _count_block(facts: Facts, data: bytes, start: int, end: int) -> None:
    """A block's header is the track's number, two bytes of time, and flags."""
    number, at = _vint(data, start, end)
    if at + 3 > end:
        raise BadSample("it is cut inside a block's header")
    if number in facts.videos and data[at + 2] & _LACING:
        raise BadSample("its video frames are laced, which is not read here")
    facts.blocks[number] = facts.blocks.get(number, 0) + 1
