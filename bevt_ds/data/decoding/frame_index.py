"""Which packet gives which frame, as a full decode would number them, without decoding. Pure functions.

The number of a frame is its place among those that a decoder puts out from the beginning. Timestamps do not say it: a
container may have been given them without a look at the stream (B-frames copied out of an AVI), and some packets give
no frame. So the order is read from the stream itself, and, where frames are reordered, must be that of the timestamps
too. Where the two disagree, or the stream is of a kind that is not read here, the frames are counted: `counted`.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from operator import attrgetter
from typing import NamedTuple

import numpy as np
from av import Packet

from bevt_ds.data.decoding.bitstream import Coded, Unknown
from bevt_ds.data.decoding.h264 import h264_frames
from bevt_ds.data.decoding.hevc import hevc_frames

_VOP, _USER_DATA = b"\0\0\1\xb6", b"\0\0\1\xb2"  # start codes of MPEG-4 (ISO/IEC 14496-2, 6.2.1)
_B_VOP, _I_VOP = 2, 0
_EMPTY_VOP = 16  # bytes; a shorter one may stand for a frame that was dropped
_ATTEMPTS = 2  # entries from which frames are looked for before it is done from the beginning
HIDDEN = -1  # in the place of a frame's number
_AV1_FRAME_HEADERS = (3, 6)  # OBU_FRAME_HEADER, OBU_FRAME


@dataclass(frozen=True)
class Codec:
    """A stream's codec by FFmpeg's name for it, and its properties there."""

    name: str
    reorders: bool  # it has frames that are shown in another order than they are coded in
    intra_only: bool
    extradata: bytes


@dataclass(frozen=True)
class Entry:
    """A packet at which decoding may begin, and the first frame that is right then."""

    packet: int
    frame: int


class Stretch(NamedTuple):
    """Frames that are decoded in one go."""

    frames: list[int]  # their numbers, ascending
    beginnings: list[int]  # packets from which to look for them, one after the other: the latest entries, and packet 0
    last: int  # packet that they need


@dataclass(frozen=True)
class FrameIndex:
    """The frames of a video, numbered as a full decode shows them.

    numbers: of each packet's frame, HIDDEN for a packet that gives none; None: not known, the frames are counted from
    the beginning. times: when each frame is shown, in ticks, ascending; None where the container does not say.
    """

    total: int
    entries: tuple[Entry, ...]  # both numbers ascend, that of the frame may stay; the first is packet 0
    times: np.ndarray | None
    lead: int = 0  # ticks from the first packet's time to the first frame's
    numbers: tuple[int, ...] | None = None
    spare: tuple[bool, ...] = ()  # packets that no other refers to
    is_plain: bool = False  # every packet gives a frame, and timestamps and keyframes alone would number them alike

    @property
    def keyframe_gap(self) -> int:
        """The most frames from one entry to the next."""
        firsts = sorted({entry.frame for entry in self.entries})
        return max((b - a for a, b in pairwise([*firsts, self.total])), default=self.total)

    def stretches(self, frames: Sequence[int]) -> list[Stretch]:
        """The frames, which ascend, parted where packets can be passed over.

        A stretch begins at an entry, where the one before it needs no packet from the one in front of that entry on.
        Frames that are counted are one stretch.
        """
        if self.numbers is None:
            return [Stretch(list(frames), [0], HIDDEN)]
        packet_of = {number: i for i, number in enumerate(self.numbers)}
        found: list[Stretch] = []
        for frame in frames:
            end = bisect_right(self.entries, frame, key=attrgetter("frame"))
            latest = [entry.packet for entry in reversed(self.entries[max(end - _ATTEMPTS, 0) : end])]
            if found and latest[0] <= found[-1].last + 1:
                before = found.pop()
                found.append(Stretch([*before.frames, frame], before.beginnings, max(before.last, packet_of[frame])))
            else:
                found.append(Stretch([frame], list(dict.fromkeys([*latest, 0])), packet_of[frame]))
        return found


def index_frames(codec: Codec, packets: Sequence[Packet]) -> FrameIndex | None:
    """The index of the packets of a whole stream. None: only decoding tells, see `counted`."""
    keys = [packet.is_keyframe for packet in packets]
    if read := _READERS.get(codec.name):
        try:
            coded = read(codec.extradata, [memoryview(packet) for packet in packets], keys)
        except (Unknown, ValueError, LookupError):  # LookupError: an index, or the number of a parameter set
            return None
    elif codec.reorders:
        return None
    else:
        coded = [Coded((0, i), entry=key or codec.intra_only) for i, key in enumerate(keys)]
    if not coded or not coded[0].entry:
        return None
    in_order = np.array(sorted(range(len(coded)), key=[each.order for each in coded].__getitem__))
    is_shown = np.array([each.shown and not packet.is_discard for each, packet in zip(coded, packets, strict=True)])
    shown = in_order[is_shown[in_order]]
    ticks = _ticks(packets)
    times = None if ticks is None else ticks[shown]
    is_timed = times is not None and bool((np.diff(times) > 0).all())
    if codec.reorders and not is_timed:
        return None
    numbers = np.full(len(coded), HIDDEN)
    numbers[shown] = np.arange(len(shown))
    unsafe = [packet.is_keyframe and not each.entry for each, packet in zip(coded, packets, strict=True)]
    return FrameIndex(
        total=len(shown),
        entries=_entries(coded, in_order, is_shown),
        times=None if times is None else np.sort(times),
        lead=0 if times is None or not len(times) else int(times.min() - ticks.min()),
        numbers=tuple(numbers.tolist()),
        spare=tuple(each.spare for each in coded),
        is_plain=is_timed and len(shown) == len(packets) and not any(unsafe),
    )


def counted(packets: Sequence[Packet], times: Sequence[int | None]) -> FrameIndex:
    """The index of a stream whose frames have been counted. times: the decoder's, of each frame."""
    ticks = _ticks(packets)
    if not times or ticks is None or None in times or len(set(times)) < len(times):
        return FrameIndex(len(times), (Entry(0, 0),), None)
    return FrameIndex(len(times), (Entry(0, 0),), np.sort(np.array(times)), lead=int(min(times) - ticks.min()))


def _ticks(packets: Sequence[Packet]) -> np.ndarray | None:
    """When the packets' frames are shown, int64, or None if one does not say. An AVI says when they are decoded."""
    ticks = [packet.pts for packet in packets]
    if None in ticks:
        ticks = [packet.dts for packet in packets]
    return None if None in ticks else np.array(ticks, np.int64)


def _entries(coded: Sequence[Coded], in_order: np.ndarray, is_shown: np.ndarray) -> tuple[Entry, ...]:
    """Where decoding may begin: frames that are shown before an entry's own may refer to what was before it."""
    shown_before = np.cumsum(is_shown[in_order]) - is_shown[in_order]
    first = np.empty(len(coded), np.int64)  # number of the first frame that is shown with or after each
    first[in_order] = shown_before
    entries = [Entry(i, int(first[i]) if i else 0) for i, each in enumerate(coded) if each.entry]
    most = accumulate((entry.frame for entry in entries), max)
    return tuple(entry for entry, least in zip(entries, most, strict=True) if entry.frame == least)


def _mpeg4_frames(extradata: bytes, packets: Sequence[memoryview], keys: Sequence[bool]) -> list[Coded]:
    """A B-frame is shown before the reference frame that precedes it. Packets of several frames are not read here."""
    needs_first = _USER_DATA in bytes(packets[0]) and _USER_DATA not in extradata  # it tells the inverse DCT
    frames, references = [], 0
    for i, (packet, key) in enumerate(zip(packets, keys, strict=True)):
        data = bytes(packet)
        start = data.find(_VOP)
        if start < 0 or data.find(_VOP, start + 4) >= 0 or len(data) - start < _EMPTY_VOP:
            raise Unknown
        kind = data[start + 4] >> 6
        if kind == _B_VOP:
            if references < 2:
                raise Unknown
            frames.append(Coded((references - 1, i), spare=True))
            continue
        references += 1
        is_entry = kind == _I_VOP and key and not (needs_first and i)
        frames.append(Coded((references, -1), entry=is_entry))
    return frames


def _vp8_frames(extradata: bytes, packets: Sequence[memoryview], keys: Sequence[bool]) -> list[Coded]:
    """RFC 6386, 9.1."""
    return [
        Coded((0, i), shown=bool(packet[0] >> 4 & 1), entry=key and not packet[0] & 1)
        for i, (packet, key) in enumerate(zip(packets, keys, strict=True))
    ]


def _vp9_frames(extradata: bytes, packets: Sequence[memoryview], keys: Sequence[bool]) -> list[Coded]:
    """VP9 bitstream specification, 6.2 and annex B."""
    frames = []
    for i, (packet, key) in enumerate(zip(packets, keys, strict=True)):
        heads = [_vp9_head(packet[start]) for start in _vp9_starts(packet)]
        shown = sum(is_shown for is_shown, _ in heads)
        if shown > 1:
            raise Unknown
        frames.append(Coded((0, i), shown=shown == 1, entry=key and heads[0][1]))
    return frames


def _vp9_starts(packet: memoryview) -> list[int]:
    """First bytes of the frames in a packet, by the index at its end if there is one."""
    last = packet[-1]
    count, width = (last & 7) + 1, (last >> 3 & 3) + 1
    index = len(packet) - 2 - count * width
    if last >> 5 != 6 or index < 0 or packet[index] != last:
        return [0]
    sizes = [int.from_bytes(packet[at : at + width], "little") for at in range(index + 1, len(packet) - 1, width)]
    starts = [sum(sizes[:n]) for n in range(count)]
    return [start for start, size in zip(starts, sizes, strict=True) if size]


def _vp9_head(byte: int) -> tuple[bool, bool]:
    """Whether the frame is shown, and whether it is a keyframe."""
    if byte >> 6 != 2:
        raise Unknown
    at = 2 if byte >> 4 & 3 == 3 else 3  # of show_existing_frame; profile 3 has one more bit before it
    if byte >> at & 1:
        return True, False
    return bool(byte >> (at - 2) & 1), not byte >> (at - 1) & 1


def _av1_frames(extradata: bytes, packets: Sequence[memoryview], keys: Sequence[bool]) -> list[Coded]:
    """AV1 bitstream specification, 5.3 to 5.9: a temporal unit shows a frame, unless a muxer has cut it up."""
    return [
        Coded((0, i), shown=_av1_shows(packet), entry=key)
        for i, (packet, key) in enumerate(zip(packets, keys, strict=True))
    ]


def _av1_shows(packet: memoryview) -> bool:
    at = 0
    while at < len(packet):
        head = packet[at]
        at += 2 if head & 4 else 1
        size = len(packet) - at
        if head & 2:
            size, at = _leb128(packet, at)
        if head >> 3 & 15 in _AV1_FRAME_HEADERS and (packet[at] & 0x80 or packet[at] & 0x10):
            return True
        at += size
    return False


def _leb128(data: memoryview, at: int) -> tuple[int, int]:
    """A number, and the byte after it (AV1, 4.10.5)."""
    value, shift = 0, 0
    while True:
        value |= (data[at] & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if not data[at - 1] & 0x80:
            return value, at


_READERS: dict[str, Callable[[bytes, Sequence[memoryview], Sequence[bool]], list[Coded]]] = {
    "h264": h264_frames,
    "hevc": hevc_frames,
    "mpeg4": _mpeg4_frames,
    "vp8": _vp8_frames,
    "vp9": _vp9_frames,
    "av1": _av1_frames,
}
