"""RandAugment (Cubuk et al. 2019) on clips: every frame is changed alike.

The original uses imgaug's, whose random numbers cannot be had again. These are timm's operations, in the variant in
which every one grows with the magnitude ("inc"), each applied when it is drawn; a test holds them equal to timm's. The
magnitude is on imgaug's scale (_M_MAX of its 0.4.0), three times as fine as timm's, so that 7 is as strong as it is
there. What an operation measures, as AutoContrast does, it measures in each frame.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

TOP = 30  # the largest magnitude
GREY = (128, 128, 128)  # what comes in from outside the picture

Operation = Callable[[Image.Image, float], Image.Image]


def _affine(picture: Image.Image, *matrix: float) -> Image.Image:
    return picture.transform(picture.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=GREY)


def _rotate(picture: Image.Image, level: float) -> Image.Image:
    return picture.rotate(30 * level, Image.Resampling.BILINEAR, fillcolor=GREY)


def _posterize(picture: Image.Image, level: float) -> Image.Image:
    return ImageOps.posterize(picture, max(4 - int(4 * abs(level)), 1))  # Pillow refuses to keep no bit


def _solarize(picture: Image.Image, level: float) -> Image.Image:
    return ImageOps.solarize(picture, 256 - int(256 * abs(level)))


def _solarize_add(picture: Image.Image, level: float) -> Image.Image:
    added = int(110 * abs(level))
    return picture.point([min(i + added, 255) if i < 128 else i for i in range(256)] * 3)


def _enhance(kind: Callable) -> Operation:
    return lambda picture, level: kind(picture).enhance(max(1 + 0.9 * level, 0.1))


# level: magnitude / TOP, its sign drawn; operations without a direction ignore the sign
OPERATIONS: dict[str, Operation] = {
    "AutoContrast": lambda picture, level: ImageOps.autocontrast(picture),
    "Equalize": lambda picture, level: ImageOps.equalize(picture),
    "Invert": lambda picture, level: ImageOps.invert(picture),
    "Rotate": _rotate,
    "PosterizeIncreasing": _posterize,
    "SolarizeIncreasing": _solarize,
    "SolarizeAdd": _solarize_add,
    "ColorIncreasing": _enhance(ImageEnhance.Color),
    "ContrastIncreasing": _enhance(ImageEnhance.Contrast),
    "BrightnessIncreasing": _enhance(ImageEnhance.Brightness),
    "SharpnessIncreasing": _enhance(ImageEnhance.Sharpness),
    "ShearX": lambda picture, level: _affine(picture, 1, 0.3 * level, 0, 0, 1, 0),
    "ShearY": lambda picture, level: _affine(picture, 1, 0, 0, 0.3 * level, 1, 0),
    "TranslateXRel": lambda picture, level: _affine(picture, 1, 0, 0.45 * level * picture.width, 0, 1, 0),
    "TranslateYRel": lambda picture, level: _affine(picture, 1, 0, 0, 0, 1, 0.45 * level * picture.height),
}


def randaugment(rng: np.random.Generator, frames: np.ndarray, operations: int, magnitude: int) -> np.ndarray:
    """`operations` of the set, one after the other and perhaps one twice: uint8 (T,H,W,3) -> the same."""
    names = rng.choice(list(OPERATIONS), operations).tolist()
    levels = (rng.choice((-1, 1), operations) * magnitude / TOP).tolist()
    return np.stack([_changed(frame, names, levels) for frame in frames])


def _changed(frame: np.ndarray, names: list[str], levels: list[float]) -> np.ndarray:
    picture = Image.fromarray(frame)
    for name, level in zip(names, levels, strict=True):
        picture = OPERATIONS[name](picture, level)
    return np.asarray(picture)
