"""The order in which the frames of an HEVC stream are shown, from the headers of its slices (ITU-T H.265, 7.3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from bevt_ds.data.decoding.bitstream import Bits, Buffer, Coded, Sets, Unknown, order_count, units

_HEADER = 32  # bytes, in which the needed part of a slice's header lies
_LAST_SLICE, _SPS, _PPS = 31, 33, 34
_RASL, _LEADING = (8, 9), (6, 7, 8, 9)
_BLA, _IDR, _IRAP = (16, 17, 18), (19, 20), range(16, 24)
_GPU_PROFILES = frozenset({1, 2, 3})  # Main, Main 10, Main Still Picture: what NVDEC knows
_LAST_SUB_LAYER_NON_REFERENCE = 14  # up to which even kinds of slices are none that others of their layer refer to


class _Slice(NamedTuple):
    """Fields of a frame's first slice."""

    kind: int  # of the NAL unit
    layer: int  # temporal
    order_bits: int
    order: int  # lowest bits of the order count
    is_output: bool


def hevc_frames(extradata: bytes, packets: Sequence[memoryview], keys: Sequence[bool]) -> list[Coded]:
    """The coded frame of each packet. keys: whether the container calls it a keyframe. Raises Unknown, ValueError."""
    sets = Sets()
    header, length = header_units(extradata)
    for unit in header:
        _read_set(sets, unit)
    sets.in_header = False
    slices = [_first_slice(sets, packet, length) for packet in packets]
    if slices[0].kind not in _IRAP:
        raise Unknown
    top = max(each.layer for each in slices)
    frames, group, previous, is_start = [], 0, 0, True
    for i, (each, key) in enumerate(zip(slices, keys, strict=True)):
        is_random = each.kind in _IRAP
        if is_random:
            is_start = i == 0 or each.kind in (*_BLA, *_IDR)  # leading frames that refer to what was before are lost
            if is_start:
                group, previous = group + 1, 0
        order = order_count(each.order, each.order_bits, previous)
        is_spare = each.kind <= _LAST_SUB_LAYER_NON_REFERENCE and each.kind % 2 == 0
        if each.layer == 0 and not is_spare and each.kind not in _LEADING:
            previous = order
        shown = each.is_output and not (is_start and each.kind in _RASL)
        is_entry = is_random and key and not (sets.changed and i)
        frames.append(Coded((group, order), shown, is_entry, is_spare and each.layer == top))
    return frames


def header_units(extradata: bytes) -> tuple[list[bytes], int]:
    """The parameter sets of the stream's header, and the bytes of the length before a unit, 0 for Annex B."""
    if extradata[:1] != b"\1":
        return list(units(extradata, 0)), 0
    sets, at = [], 23  # ISO/IEC 14496-15, 8.3.3.1
    for _ in range(extradata[22]):
        count, at = int.from_bytes(extradata[at + 1 : at + 3], "big"), at + 3
        for _ in range(count):
            size = int.from_bytes(extradata[at : at + 2], "big")
            sets.append(extradata[at + 2 : at + 2 + size])
            at += 2 + size
    return sets, (extradata[21] & 3) + 1


def gpu_obstacle(unit: Buffer) -> str:
    """What NVDEC does not know of a NAL unit's sequence, or would show otherwise than FFmpeg; "": nothing."""
    if unit[0] & 1 or unit[1] >> 3:  # a second view, or alpha
        return "of several layers"
    if unit[0] >> 1 & 63 != _SPS:
        return ""
    bits = Bits(unit)
    bits.u(20)
    layers = bits.u(3)
    bits.u(4)
    profile = bits.u(5)
    bits.u(32)
    if profile not in _GPU_PROFILES:
        return f"profile {profile} of HEVC"
    if not bits.u(1):  # general_progressive_source_flag: libraries let NVDEC deinterlace the others
        return "may be interlaced"
    bits.u(55)
    _skip_layers(bits, layers)
    bits.ue()
    if bits.ue() == 3:
        bits.u(1)
    left, _, top, _ = _window(bits)
    return "cropped at its left or top" if left or top else ""  # which libraries do not do


def _read_set(sets: Sets, unit: Buffer) -> None:
    kind, bits = unit[0] >> 1 & 63, Bits(unit)
    bits.u(16)
    if kind == _SPS:
        number, fields = _sps(bits)
        sets.put("sps", number, (*fields, bytes(unit)))
    elif kind == _PPS:
        number, of = bits.ue(), bits.ue()
        dependent, output, extra = bits.u(1), bits.u(1), bits.u(3)
        sets.put("pps", number, (of, output, extra, dependent, bytes(unit)))


def _sps(bits: Bits) -> tuple[int, tuple[int, ...]]:
    """Number; whether planes are apart, bits of the order count."""
    bits.u(4)
    layers = bits.u(3)
    bits.u(1)
    bits.u(96)
    _skip_layers(bits, layers)
    number = bits.ue()
    apart = bits.u(1) if bits.ue() == 3 else 0
    _window(bits)
    for _ in range(2):
        bits.ue()
    return number, (apart, bits.ue() + 4)


def _window(bits: Bits) -> list[int]:
    """Behind the size: what is cropped at the left, right, top and bottom (7.4.3.2.1)."""
    for _ in range(2):
        bits.ue()
    return [bits.ue() for _ in range(4)] if bits.u(1) else [0] * 4


def _skip_layers(bits: Bits, layers: int) -> None:
    """The rest of 7.3.3. layers: those above the first."""
    present = [(bits.u(1), bits.u(1)) for _ in range(layers)]
    if layers:
        bits.u(2 * (8 - layers))
    for profile, level in present:
        bits.u(88 * profile + 8 * level)


def _first_slice(sets: Sets, packet: memoryview, length: int) -> _Slice:
    for unit in units(packet, length):
        kind = unit[0] >> 1 & 63
        if kind in (_SPS, _PPS):
            _read_set(sets, unit)
        elif kind <= _LAST_SLICE:
            return _slice(sets, unit, kind)
    raise Unknown


def _slice(sets: Sets, unit: Buffer, kind: int) -> _Slice:
    """7.3.6.1, of a frame's first slice."""
    bits = Bits(unit[:_HEADER])
    bits.u(13)
    layer = bits.u(3) - 1
    if not bits.u(1):  # first_slice_segment_in_pic_flag
        raise Unknown
    if kind in _IRAP:
        bits.u(1)
    of, output_flag, extra, *_ = sets.fields["pps", bits.ue()]
    apart, order_bits, _ = sets.fields["sps", of]
    bits.u(extra)
    bits.ue()
    is_output = not output_flag or bits.u(1) == 1
    bits.u(2 * apart)
    return _Slice(kind, layer, order_bits, 0 if kind in _IDR else bits.u(order_bits), is_output)
