"""The order in which the frames of an H.264 stream are shown, from the headers of its slices (ITU-T H.264, 7.3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from bevt_ds.data.decoding.bitstream import Bits, Buffer, Coded, Sets, Unknown, messages, order_count, units

_HEADER = 24  # bytes, in which the needed part of a slice's header lies
_ALIKE = 2  # bytes, which are enough of it where frames are shown as they are coded
_WITH_CHROMA_FORMAT = frozenset({100, 110, 122, 244, 44, 83, 86, 118, 128, 138, 139, 134, 135})  # profiles
_SLICE, _IDR, _SEI, _SPS, _PPS = 1, 5, 6, 7, 8
_RECOVERY_POINT = 6
_GPU_PROFILES = frozenset({66, 77, 100})  # Baseline, Main, High: what NVDEC knows


class _Slice(NamedTuple):
    """Fields of a frame's first slice."""

    is_idr: bool
    is_random: bool  # frames shown after it are right if decoding begins at it
    is_reference: bool
    order_bits: int  # 0: frames are shown as they are coded
    order: int  # lowest bits of the order count


def h264_frames(extradata: bytes, packets: Sequence[memoryview], keys: Sequence[bool]) -> list[Coded]:
    """The coded frame of each packet. keys: whether the container calls it a keyframe. Raises Unknown, ValueError."""
    sets = Sets()
    header, length = header_units(extradata)
    for unit in header:
        _read_set(sets, unit)
    sets.in_header = False
    slices = [_first_slice(sets, packet, length, key) for packet, key in zip(packets, keys, strict=True)]
    if not slices[0].is_idr:
        raise Unknown
    frames, group, previous = [], 0, 0
    for i, (each, key) in enumerate(zip(slices, keys, strict=True)):
        if each.is_idr:
            group, previous = group + 1, 0
        order = order_count(each.order, each.order_bits, previous) if each.order_bits else i
        if each.is_reference:
            previous = order
        is_entry = each.is_random and key and not (sets.changed and i)
        frames.append(Coded((group, order), entry=is_entry, spare=not each.is_reference))
    return frames


def header_units(extradata: bytes) -> tuple[list[bytes], int]:
    """The parameter sets of the stream's header, and the bytes of the length before a unit, 0 for Annex B."""
    if extradata[:1] != b"\1":
        return list(units(extradata, 0)), 0
    sets, at = [], 5  # ISO/IEC 14496-15, 5.3.3.1
    for mask in (0x1F, 0xFF):
        count, at = (extradata[at] & mask if at < len(extradata) else 0), at + 1
        for _ in range(count):
            size = int.from_bytes(extradata[at : at + 2], "big")
            sets.append(extradata[at + 2 : at + 2 + size])
            at += 2 + size
    return sets, (extradata[4] & 3) + 1


def gpu_obstacle(unit: Buffer) -> str:
    """What NVDEC does not know of a NAL unit's sequence, or would show otherwise than FFmpeg; "": nothing."""
    if unit[0] & 31 != _SPS:
        return ""
    bits, profile = Bits(unit), unit[1]
    bits.u(8)
    _, (*_, only_frames) = _sps(bits)
    if profile not in _GPU_PROFILES:  # lossless is 244, whatever its format
        return f"profile {profile} of H.264"
    if not only_frames:  # fields are allowed, and libraries let NVDEC deinterlace these
        return "may be interlaced"
    bits.u(1)
    left, _, top, _ = [bits.ue() for _ in range(4)] if bits.u(1) else [0] * 4
    return "cropped at its left or top" if left or top else ""  # which libraries do not do


def _read_set(sets: Sets, unit: Buffer) -> None:
    bits = Bits(unit)
    bits.u(3)
    kind = bits.u(5)
    if kind == _SPS:
        number, fields = _sps(bits)
        sets.put("sps", number, (*fields, bytes(unit)))
    elif kind == _PPS:
        number, of = bits.ue(), bits.ue()
        sets.put("pps", number, (of, bytes(unit)))


def _sps(bits: Bits) -> tuple[int, tuple[int, ...]]:
    """Number; bits of frame_num, kind and bits of the order count, whether planes are apart, whether only frames."""
    profile = bits.u(8)
    bits.u(16)
    number, apart = bits.ue(), 0
    if profile in _WITH_CHROMA_FORMAT:
        chroma = bits.ue()
        apart = bits.u(1) if chroma == 3 else 0
        bits.ue()
        bits.ue()
        bits.u(1)
        if bits.u(1):
            _skip_scaling(bits, 12 if chroma == 3 else 8)
    number_bits = bits.ue() + 4
    order_kind = bits.ue()
    if order_kind == 1:  # frames in a cycle that the set describes: rare
        raise Unknown
    order_bits = bits.ue() + 4 if order_kind == 0 else 0
    bits.ue()
    bits.u(1)
    bits.ue()
    bits.ue()
    return number, (number_bits, order_bits, apart, bits.u(1))


def _skip_scaling(bits: Bits, lists: int) -> None:
    """7.3.2.1.1.1"""
    for i in range(lists):
        last = following = 8
        for _ in range((16 if i < 6 else 64) * bits.u(1)):
            if following:
                following = (last + bits.se()) % 256
            last = following or last


def _first_slice(sets: Sets, packet: memoryview, length: int, is_key: bool) -> _Slice:
    if length and not is_key and len(packet) > length and packet[length] & 31 == _SLICE:  # most are: no need to look
        head = bytes(packet[length : length + _HEADER])
        return sets.slices.get(head[:_ALIKE]) or _slice(sets, head, False)
    is_random = False
    for unit in units(packet, length):
        kind = unit[0] & 31
        if kind in (_SPS, _PPS):
            _read_set(sets, unit)
        elif kind == _SEI and is_key:
            is_random = is_random or _recovers_at_once(unit)
        elif kind in (_SLICE, _IDR):
            return _slice(sets, unit[:_HEADER], is_random or kind == _IDR)
        elif 2 <= kind <= 4:  # data partitions
            raise Unknown
    raise Unknown


def _slice(sets: Sets, head: Buffer, is_random: bool) -> _Slice:
    """7.3.3, from the first bytes of the NAL unit."""
    bits = Bits(head)
    is_reference, kind = bits.u(3) > 0, bits.u(5)
    bits.ue()
    bits.ue()
    of, _ = sets.fields["pps", bits.ue()]
    number_bits, order_bits, apart, only_frames, _ = sets.fields["sps", of]
    if only_frames and not order_bits:
        found = _Slice(kind == _IDR, is_random, is_reference, 0, 0)
        if not is_random and 8 * len(head) - bits.left <= 8 * _ALIKE:
            sets.slices[bytes(head[:_ALIKE])] = found
        return found
    bits.u(2 * apart + number_bits)
    if not only_frames and bits.u(1):  # a field: two packets may make a frame
        raise Unknown
    if kind == _IDR:
        bits.ue()
    return _Slice(kind == _IDR, is_random, is_reference, order_bits, bits.u(order_bits))


def _recovers_at_once(unit: Buffer) -> bool:
    """Whether there is a recovery point (D.1.8) of 0 frames: the I-frame of an open group.

    One of more frames, as of x264's intra-refresh, promises exact frames too and does not give them.
    """
    for kind, content in messages(unit[1:]):
        if kind == _RECOVERY_POINT:
            bits = Bits(content)
            count, is_exact, is_broken = bits.ue(), bits.u(1), bits.u(1)
            return bool(count == 0 and is_exact and not is_broken)
    return False
