"""From one file to the tensor that a model takes: decoded, resized, cropped and normalised as evaluation does it.

Shape letters: T frames, S crop side.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from torch import Tensor

from bevt_ds.data.decoding.images import JPEG_MAGIC, PNG_MAGIC, check_image, image_decoder
from bevt_ds.data.decoding.video import opened
from bevt_ds.data.limits import BadSample, Limits
from bevt_ds.data.pixels.clip_pixels import as_frames, normalised, view_boxes, with_short_side
from bevt_ds.data.plan import CHOICES
from bevt_ds.errors import UserError


def load_clip(
    path: str | Path, frames: int = 16, stride: int = 8, size: int = 224, short_side: int | None = None
) -> Tensor:
    """The clip in the middle of a video file: float (3,T,S,S), normalised RGB.

    The same frames and pixels as one view of `evaluate.py`: `frames` frames, `stride` source frames apart (a shorter
    video is repeated), the short side resized to `short_side` pixels (default: `size`), the centre cropped.

    Raises:
        UserError: no such file, it is not a video, or a number that cannot work.
    """
    return centred(read_frames(path, frames, stride), size, short_side)


def load_image(path: str | Path, size: int = 224, short_side: int | None = None) -> Tensor:
    """An image file: float (3,S,S), normalised RGB; turned as its EXIF orientation says, resized and cropped as a clip.

    Raises:
        UserError: no such file, it is neither JPEG nor PNG, or a number that cannot work.
    """
    return centred(read_image(path)[None], size, short_side)[:, 0]


def is_image(path: str | Path) -> bool:
    """Whether a file begins as a JPEG or PNG does. Raises UserError where it cannot be read."""
    return _read(path).startswith((JPEG_MAGIC, PNG_MAGIC))


def read_image(path: str | Path) -> np.ndarray:
    """An image file: uint8 (H,W,3), turned as its EXIF orientation says. Raises UserError as `load_image`."""
    with _named(path):
        data = _read(path)
        check_image(data, Limits())
        return image_decoder().decode(data)


def read_frames(path: str | Path, frames: int, stride: int, choice: str = "spaced_clip") -> np.ndarray:
    """The frames of the clip in the middle of a video file: uint8 (T,H,W,3). `choice` is one of CHOICES.

    Raises UserError as `load_clip`.
    """
    _require_numbers(frames=frames, stride=stride)
    with _named(path), opened(_read(path), Limits()) as video:
        return video.frames(CHOICES[choice](video.total, frames, stride, (0, 1)))


def centred(frames: np.ndarray, size: int, short_side: int | None = None) -> Tensor:
    """uint8 (T,H,W,3) -> float (3,T,S,S): the short side resized to `short_side` or `size`, the centre, normalised.

    Raises:
        UserError: a number that cannot work.
    """
    short_side = short_side or size
    _require_numbers(size=size, short_side=short_side)
    if short_side < size:
        raise UserError(f"short_side={short_side}: a side below size={size} cannot hold the crop.")
    resized = with_short_side(as_frames(frames), short_side)
    (box,) = view_boxes(*resized.shape[-2:], size, crops=1)
    return normalised(box.of(resized), "cpu")


def _read(path: str | Path) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error


@contextmanager
def _named(path: str | Path) -> Iterator[None]:
    """Turns the reason why a sample cannot be used into a message that names its file."""
    try:
        yield
    except BadSample as error:
        raise UserError(f"{path} cannot be used: {error}.") from error


def _require_numbers(**numbers: int) -> None:
    for name, value in numbers.items():
        if not isinstance(value, int) or value < 1:
            raise UserError(f"{name}={value!r}: must be a whole number of at least 1.")
