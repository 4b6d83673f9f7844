"""A look at an encoded image's header before any decoder sees it.

A few kilobytes can announce gigabytes of pixels, and DALI has no limit of its own.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from functools import lru_cache
from typing import TYPE_CHECKING

from bevt_ds.data.decoding.geometry import UPRIGHT, Turn, turn_of_exif
from bevt_ds.data.limits import BadSample, Limits

if TYPE_CHECKING:
    from bevt_ds.data.decoding.dali_images import ImageDecoder

PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
JPEG_MAGIC = b"\xff\xd8\xff"
# Start-of-frame markers C0..CF hold the size, except these three: DHT, JPG, DAC.
_FRAME_MARKERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_START_OF_SCAN, _APP1 = 0xDA, 0xE1
_ORIENTATION, _SHORT = 0x112, 3  # EXIF's tag, and the type of its value
MOST_SCANS = 100  # progressive JPEGs have about ten
_ALONE = frozenset({0x01, *range(0xD0, 0xD8)})  # markers without a length


def check_image(data: bytes, limits: Limits) -> tuple[int, int]:
    """(width, height) of a JPEG or PNG. BadSample: neither of them, cut, or over a limit."""
    limits.check_file(len(data))
    if data.startswith(JPEG_MAGIC):
        width, height = _jpeg_size(data)
    elif data.startswith(PNG_MAGIC):
        width, height = _png_size(data)
    else:
        raise BadSample("it is neither JPEG nor PNG" if data else "it is empty")
    limits.check_size(width, height)
    return width, height


def describe_image(data: bytes, limits: Limits) -> dict[str, int | bool]:
    """Width and height as it is shown, and how it is turned for that, from the header. BadSample: as `check_image`."""
    stored = check_image(data, limits)
    turn = turn_of(data)
    width, height = turn.size(*stored)
    return {"width": width, "height": height, **turn.facts}


def decode_image(data: bytes, limits: Limits) -> dict[str, int | bool]:
    """As `describe_image`, after every pixel has been decoded as in training. BadSample: that is not possible."""
    facts = describe_image(data, limits)
    height, width, _ = image_decoder().decode(data).shape
    if (width, height) != (facts["width"], facts["height"]):
        raise BadSample(f"it is decoded to {width}x{height} pixels, its header says {facts['width']}x{facts['height']}")
    return facts


@lru_cache(maxsize=1)
def image_decoder() -> ImageDecoder:
    """This process's decoder of single images, the one of training."""
    from bevt_ds.data.decoding.dali_images import ImageDecoder  # DALI takes a second to import: only where it is used

    return ImageDecoder()


def turn_of(data: bytes) -> Turn:
    """What the EXIF orientation of a JPEG or PNG, which `check_image` has passed, asks for."""
    exif = next(_jpeg_exif(data) if data.startswith(JPEG_MAGIC) else _png_exif(data), b"")
    order = {b"II": "<", b"MM": ">"}.get(exif[:2])
    if order is None or len(exif) < 8:
        return UPRIGHT
    (at,) = struct.unpack_from(f"{order}I", exif, 4)
    count = struct.unpack_from(f"{order}H", exif, at)[0] if at + 2 <= len(exif) else 0
    for start in range(at + 2, min(at + 2 + 12 * count, len(exif) - 11), 12):
        tag, kind = struct.unpack_from(f"{order}HH", exif, start)
        if (tag, kind) == (_ORIENTATION, _SHORT):
            return turn_of_exif(*struct.unpack_from(f"{order}H", exif, start + 8))
    return UPRIGHT


def _jpeg_exif(data: bytes) -> Iterator[bytes]:
    """The content of its EXIF segments: TIFF."""
    for marker, start, end in _segments(data):
        if marker == _APP1 and data[start : start + 6] == b"Exif\0\0":
            yield data[start + 6 : end]


def _png_exif(data: bytes) -> Iterator[bytes]:
    """The content of its eXIf chunks."""
    at = len(PNG_MAGIC)
    while at + 8 <= len(data):
        length, name = struct.unpack_from(">I4s", data, at)
        if name == b"eXIf":
            yield data[at + 8 : at + 8 + length]
        at += 12 + length


def _segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Marker, first and last + 1 byte of each JPEG segment up to the first scan's (ISO/IEC 10918-1, B.2)."""
    at = 2
    while at + 4 <= len(data):
        if data[at] != 0xFF:
            raise BadSample(f"JPEG segment expected at byte {at}")
        marker = data[at + 1]
        if marker == 0xFF or marker in _ALONE:
            at += 1 if marker == 0xFF else 2
            continue
        end = at + 2 + max(struct.unpack_from(">H", data, at + 2)[0], 2)
        yield marker, at + 4, end
        if marker == _START_OF_SCAN:
            return
        at = end


def _jpeg_size(data: bytes) -> tuple[int, int]:
    """From the frame header, once the first scan has been found."""
    size = None
    for marker, start, _ in _segments(data):
        if marker == _START_OF_SCAN:
            return _require_end(data, start - 4, size)
        if marker in _FRAME_MARKERS and start + 5 <= len(data):
            height, width = struct.unpack_from(">HH", data, start + 1)
            size = (width, height)
    raise BadSample("the JPEG is cut before its image data")


def _require_end(data: bytes, scan: int, size: tuple[int, int] | None) -> tuple[int, int]:
    if size is None:
        raise BadSample("the JPEG has no frame header")
    if data.rfind(b"\xff\xd9", scan) < 0:  # from the end, where it is
        raise BadSample("the JPEG is cut: it has no end marker")
    # inside a scan 0xFF is followed by 0, so these two bytes are a marker
    if (scans := data.count(b"\xff\xda", scan)) > MOST_SCANS:
        raise BadSample(f"the JPEG has {scans} scans: it would take very long to decode")
    return size


def _png_size(data: bytes) -> tuple[int, int]:
    """Size from the IHDR chunk, which the standard puts first; behind IEND anything may follow."""
    if len(data) < 33 or data[12:16] != b"IHDR":
        raise BadSample("the PNG has no header chunk")
    if data.find(b"IEND", 33) < 0:
        raise BadSample("the PNG is cut: it has no end chunk")
    return struct.unpack_from(">II", data, 16)
