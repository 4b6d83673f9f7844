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
GREY = (128, 128, 128)  # what comes in from outside the image

Operation = Callable[[Image.Image, float], Image.Image]


def _affine(image: Image.Image, *matrix: float) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=GREY)


def _rotate(image: Image.Image, level: float) -> Image.Image:
    return image.rotate(30 * level, Image.Resampling.BILINEAR, fillcolor=GREY)


def _posterize(image: Image.Image, level: float) -> Image.Image:
    return ImageOps.posterize(image, max(4 - int(4 * abs(level)), 1))  # Pillow refuses to keep no bit


def _solarize(image: Image.Image, level: float) -> Image.Image:
    return ImageOps.solarize(image, 256 - int(256 * abs(level)))


def _solarize_add(image: Image.Image, level: float) -> Image.Image:
    added = int(110 * abs(level))
    return image.point([min(i + added, 255) if i < 128 else i for i in range(256)] * 3)


def _enhance(kind: Callable) -> Operation:
    return lambda image, level: kind(image).enhance(max(1 + 0.9 * level, 0.1))


# level: magnitude / TOP, its sign drawn; operations without a direction ignore the sign
OPERATIONS: dict[str, Operation] = {
    "AutoContrast": lambda image, level: ImageOps.autocontrast(image),
    "Equalize": lambda image, level: ImageOps.equalize(image),
    "Invert": lambda image, level: ImageOps.invert(image),
    "Rotate": _rotate,
    "PosterizeIncreasing": _posterize,
    "SolarizeIncreasing": _solarize,
    "SolarizeAdd": _solarize_add,
    "ColorIncreasing": _enhance(ImageEnhance.Color),
    "ContrastIncreasing": _enhance(ImageEnhance.Contrast),
    "BrightnessIncreasing": _enhance(ImageEnhance.Brightness),
    "SharpnessIncreasing": _enhance(ImageEnhance.Sharpness),
    "ShearX": lambda image, level: _affine(image, 1, 0.3 * level, 0, 0, 1, 0),
    "ShearY": lambda image, level: _affine(image, 1, 0, 0, 0.3 * level, 1, 0),
    "TranslateXRel": lambda image, level: _affine(image, 1, 0, 0.45 * level * image.width, 0, 1, 0),
    "TranslateYRel": lambda image, level: _affine(image, 1, 0, 0, 0, 1, 0.45 * level * image.height),
}


def randaugment(rng: np.random.Generator, frames: np.ndarray, operations: int, magnitude: int) -> np.ndarray:
    """`operations` of the set, one after the other and perhaps one twice: uint8 (T,H,W,3) -> the same."""
    names = rng.choice(list(OPERATIONS), operations).tolist()
    levels = (rng.choice((-1, 1), operations) * magnitude / TOP).tolist()
    return np.stack([_changed(frame, names, levels) for frame in frames])


def _changed(frame: np.ndarray, names: list[str], levels: list[float]) -> np.ndarray:
    image = Image.fromarray(frame)
    for name, level in zip(names, levels, strict=True):
        image = OPERATIONS[name](image, level)
    return np.asarray(image)
