"""Where a crop of a resized picture lies, and which part of the source it is made of. Pure functions; no torch."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

# Pixels beyond a crop's own: two that the cubic kernel reads, and one whose chroma the edge of a part would change.
_MARGIN = 3


class Box(NamedTuple):
    """A part of a picture, in pixels."""

    top: int
    left: int
    height: int
    width: int

    def of(self, pictures):
        """The part of a tensor or array (..., H, W)."""
        return pictures[..., self.top : self.top + self.height, self.left : self.left + self.width]

    def with_other(self, other: Box) -> Box:
        """The smallest box that holds both."""
        top, left = min(self.top, other.top), min(self.left, other.left)
        bottom = max(self.top + self.height, other.top + other.height)
        right = max(self.left + self.width, other.left + other.width)
        return Box(top, left, bottom - top, right - left)


class Crop(NamedTuple):
    """A crop as a plan knows it, before the picture's size is known."""

    short_side: int  # pixels, to which the picture is resized
    y: float  # [0,1): place among the possible ones
    x: float
    size: int  # pixels, its side


class Cut(NamedTuple):
    """A square of a resized picture, in pixels."""

    height: int  # of the resized picture
    width: int
    top: int
    left: int


def cut(height: int, width: int, crop: Crop) -> Cut:
    """Where the crop of a source picture lies, as DALI computes it: single precision, halves up; offsets floored."""
    scale = np.float32(crop.short_side / min(height, width))
    resized = [int(np.float32(n) * scale + np.float32(0.5)) for n in (height, width)]
    offsets = [int(fraction * (n - crop.size)) for fraction, n in zip((crop.y, crop.x), resized, strict=True)]
    return Cut(*resized, *offsets)


def source_box(height: int, width: int, crop: Crop) -> Box:
    """The part of a picture that a cubic resize needs for the crop; its edges are even, or those of the picture."""
    place = cut(height, width, crop)
    top, bottom = _span(place.top, crop.size, place.height, height)
    left, right = _span(place.left, crop.size, place.width, width)
    return Box(top, left, bottom - top, right - left)


def _span(first: int, count: int, resized: int, length: int) -> tuple[int, int]:
    """Source pixels [begin, end) behind `count` pixels from `first` on, of `resized` that are made of `length`."""
    centres = [(i + 0.5) * length / resized - 0.5 for i in (first, first + count - 1)]
    begin, end = math.floor(centres[0]) - _MARGIN, math.ceil(centres[1]) + _MARGIN + 1
    return max(begin - begin % 2, 0), min(end + end % 2, length)
