"""How an image or a video is turned to be upright: by EXIF's orientation, or the display matrix of a container."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from bevt_ds.data.decoding.cut import Box
from bevt_ds.data.limits import BadSample

_SLANT = 1 / 64  # of a matrix's larger numbers: about a degree, as FFmpeg allows too


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
