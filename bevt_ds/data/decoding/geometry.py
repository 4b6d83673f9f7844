"""Boxes, crops and turns: where a crop lies in a frame, and how a frame is turned to be upright. No torch.

Pure functions. A frame is turned by EXIF's orientation, or by the display matrix of a container.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from bevt_ds.data.limits import BadSample

# Pixels beyond a crop's own: two that the cubic kernel reads, and one whose chroma the edge of a part would change.
_MARGIN = 3
_SLANT = 1 / 64  # of a matrix's larger numbers: about a degree, as FFmpeg allows too


class Box(NamedTuple):
    """A part of a frame, in pixels."""

    top: int
    left: int
    height: int
    width: int

    def of(self, images):
        """The part of a tensor or array (..., H, W)."""
        return images[..., self.top : self.top + self.height, self.left : self.left + self.width]

    def with_other(self, other: Box) -> Box:
        """The smallest box that holds both."""
        top, left = min(self.top, other.top), min(self.left, other.left)
        bottom = max(self.top + self.height, other.top + other.height)
        right = max(self.left + self.width, other.left + other.width)
        return Box(top, left, bottom - top, right - left)


class Crop(NamedTuple):
    """A crop as a plan knows it, before the frame's size is known."""

    short_side: int  # pixels, to which the frame is resized
    y: float  # [0,1): place among the possible ones
    x: float
    size: int  # pixels, its side


class Cut(NamedTuple):
    """A square of a resized frame, in pixels."""

    height: int  # of the resized frame
    width: int
    top: int
    left: int


def cut(height: int, width: int, crop: Crop) -> Cut:
    """Where the crop of a source frame lies, as DALI computes it: single precision, halves up; offsets floored."""
    scale = np.float32(crop.short_side / min(height, width))
    resized = [int(np.float32(n) * scale + np.float32(0.5)) for n in (height, width)]
    offsets = [int(fraction * (n - crop.size)) for fraction, n in zip((crop.y, crop.x), resized, strict=True)]
    return Cut(*resized, *offsets)


def source_box(height: int, width: int, crop: Crop) -> Box:
    """The part of a frame that a cubic resize needs for the crop; its edges are even, or those of the frame."""
    place = cut(height, width, crop)
    top, bottom = _span(place.top, crop.size, place.height, height)
    left, right = _span(place.left, crop.size, place.width, width)
    return Box(top, left, bottom - top, right - left)


def _span(first: int, count: int, resized: int, length: int) -> tuple[int, int]:
    """Source pixels [begin, end) behind `count` pixels from `first` on, of `resized` that are made of `length`."""
    centres = [(i + 0.5) * length / resized - 0.5 for i in (first, first + count - 1)]
    begin, end = math.floor(centres[0]) - _MARGIN, math.ceil(centres[1]) + _MARGIN + 1
    return max(begin - begin % 2, 0), min(end + end % 2, length)


class Turn(NamedTuple):
    """From what is stored to what is shown: rows become columns, then columns and rows are put in reverse order."""

    transposed: bool = False
    flipped_x: bool = False
    flipped_y: bool = False

    @property
    def rotation(self) -> int:
        """Degrees clockwise, after `mirrored`."""
        if self.transposed:
            return 90 if self.flipped_x else 270
        return 180 if self.flipped_y else 0

    @property
    def mirrored(self) -> bool:
        """Whether left and right change places, before the rotation."""
        return (self.flipped_x != self.flipped_y) != self.transposed

    @property
    def facts(self) -> dict[str, int | bool]:
        """What a sample's JSON says of it."""
        return {"rotation": self.rotation, "mirrored": self.mirrored}

    def size(self, width: int, height: int) -> tuple[int, int]:
        """Width and height as shown of what is stored; a turn back has the same."""
        return (height, width) if self.transposed else (width, height)

    def applied(self, stored: np.ndarray) -> np.ndarray:
        """A view of stored pixels (H,W,...) as they are shown."""
        shown = stored.swapaxes(0, 1) if self.transposed else stored
        return shown[:: -1 if self.flipped_y else 1, :: -1 if self.flipped_x else 1]

    def undone(self, shown: np.ndarray) -> np.ndarray:
        """A view of shown pixels (H,W,...) as they are stored: what is written there appears upright in `shown`."""
        flipped = shown[:: -1 if self.flipped_y else 1, :: -1 if self.flipped_x else 1]
        return flipped.swapaxes(0, 1) if self.transposed else flipped

    def stored_box(self, box: Box, width: int, height: int) -> Box:
        """A part of the shown image, which is width x height, as a part of the stored one."""
        top = height - box.top - box.height if self.flipped_y else box.top
        left = width - box.left - box.width if self.flipped_x else box.left
        if self.transposed:
            return Box(left, top, box.width, box.height)
        return Box(top, left, box.height, box.width)


UPRIGHT = Turn()
# EXIF's numbers, from 1 on (CIPA DC-008, Orientation).
_OF_EXIF = (
    UPRIGHT,
    Turn(flipped_x=True),
    Turn(flipped_x=True, flipped_y=True),
    Turn(flipped_y=True),
    Turn(transposed=True),
    Turn(transposed=True, flipped_x=True),
    Turn(transposed=True, flipped_x=True, flipped_y=True),
    Turn(transposed=True, flipped_y=True),
)


def turn_of_exif(orientation: int) -> Turn:
    """Numbers that EXIF does not define mean upright, as decoders have it."""
    return _OF_EXIF[orientation - 1] if 1 <= orientation <= len(_OF_EXIF) else UPRIGHT


def turn_of_matrix(matrix: Sequence[float]) -> Turn:
    """The turn of a display matrix a, b, u, c, d, v, x, y, w (ISO/IEC 14496-12, 6.2.2): x' = ax + cy, y' = bx + dy.

    Scales do not count, and a matrix of zeros is none. BadSample: it turns by no multiple of 90 degrees.
    """
    a, b, c, d = (matrix[i] for i in (0, 1, 3, 4))
    straight, crossed = max(abs(a), abs(d)), max(abs(b), abs(c))
    if min(straight, crossed) > _SLANT * max(straight, crossed):
        raise BadSample(
            "its display matrix turns it by no multiple of 90 degrees: `ffmpeg -i IN OUT.mp4` makes a video as it shows"
        )
    if crossed > straight:
        return Turn(True, flipped_x=c < 0, flipped_y=b < 0)
    return Turn(False, flipped_x=a < 0, flipped_y=d < 0)
