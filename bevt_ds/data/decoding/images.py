"""A look at an encoded picture's header before any decoder sees it.

A few kilobytes can announce gigabytes of pixels, and DALI has no limit of its own.
"""

from __future__ import annotations

import io
import struct

from PIL import Image

from bevt_ds.data.limits import BadSample, Limits

PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
JPEG_MAGIC = b"\xff\xd8\xff"
# Start-of-frame markers C0..CF hold the size, except these three: DHT, JPG, DAC.
_FRAME_MARKERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_START_OF_SCAN = 0xDA
MOST_SCANS = 100  # progressive JPEGs have about ten
_ALONE = frozenset({0x01, *range(0xD0, 0xD8)})  # markers without a length


def check_image(data: bytes, limits: Limits) -> tuple[int, int]:
    """(width, height) of a JPEG or PNG. BadSample: neither of them, cut, or over a limit."""
    if len(data) > limits.file_bytes:
        raise BadSample(f"it has {len(data)} bytes, over data.max_file_bytes={limits.file_bytes}")
    if data.startswith(JPEG_MAGIC):
        width, height = _jpeg_size(data)
    elif data.startswith(PNG_MAGIC):
        width, height = _png_size(data)
    else:
        raise BadSample("it is neither JPEG nor PNG" if data else "it is empty")
    limits.check_picture(width, height)
    return width, height


def decode_image(data: bytes, limits: Limits) -> tuple[int, int]:
    """(width, height), after every pixel has been decoded. BadSample: that is not possible."""
    size = check_image(data, limits)
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG")) as picture:
            picture.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BadSample(f"it cannot be decoded: {error}") from error
    return size


def _jpeg_size(data: bytes) -> tuple[int, int]:
    """Walk the segments (ISO/IEC 10918-1, B.2) to the frame header and on to the first scan."""
    size = None
    at = 2
    while at + 4 <= len(data):
        if data[at] != 0xFF:
            raise BadSample(f"JPEG segment expected at byte {at}")
        marker = data[at + 1]
        if marker == 0xFF or marker in _ALONE:
            at += 1 if marker == 0xFF else 2
            continue
        if marker == _START_OF_SCAN:
            return _require_end(data, at, size)
        length = struct.unpack_from(">H", data, at + 2)[0]
        if marker in _FRAME_MARKERS and at + 9 <= len(data):
            height, width = struct.unpack_from(">HH", data, at + 5)
            size = (width, height)
        at += 2 + max(length, 2)
    raise BadSample("the JPEG is cut before its picture data")


def _require_end(data: bytes, scan: int, size: tuple[int, int] | None) -> tuple[int, int]:
    if size is None:
        raise BadSample("the JPEG has no frame header")
    if data.find(b"\xff\xd9", scan) < 0:
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
