"""A drawn world: textured shapes that move in front of a textured ground.

Textures are large against a mask cell and everything moves smoothly, so what is hidden can be inferred from what is
around it in space and time.

Shape letters: N frames, H W pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

_PATTERNS = {
    "plain": lambda along, across: np.zeros_like(along),
    "grating": lambda along, across: np.sin(along) > 0,
    "checks": lambda along, across: (np.sin(along) > 0) != (np.sin(across) > 0),
    "blobs": lambda along, across: np.sin(along) * np.sin(across) > 0.3,
    "gradient": lambda along, across: 0.5 + 0.5 * np.sin(along / 4),
}
OUTLINES = ("disc", "box", "ring", "diamond")


@dataclass(frozen=True)
class Extent:
    """Size of drawn media."""

    height: int = 144
    width: int = 176
    frames: int = 24


@dataclass(frozen=True)
class Texture:
    """A pattern over the plane, between two colours."""

    kind: str
    colours: np.ndarray  # float (2,3), levels
    angle: float  # radians
    wavelength: float  # pixels

    def paint(self, y: np.ndarray, x: np.ndarray) -> np.ndarray:
        """Colours at pattern coordinates float32 (...,): float32 (...,3)."""
        scale = 2 * math.pi / self.wavelength
        cosine, sine = scale * math.cos(self.angle), scale * math.sin(self.angle)
        weight = _PATTERNS[self.kind](x * cosine + y * sine, y * cosine - x * sine)
        low, high = self.colours.astype(np.float32)
        return low + (high - low) * weight[..., None].astype(np.float32)


@dataclass(frozen=True)
class Shape:
    """A textured outline that moves in a straight line."""

    outline: str
    texture: Texture
    centre: tuple[float, float]  # pixels: y, x at frame 0
    velocity: tuple[float, float]  # pixels a frame
    radius: float

    def inside(self, y: np.ndarray, x: np.ndarray) -> np.ndarray:
        """Whether points relative to the centre are covered: bool, as y and x broadcast."""
        if self.outline == "box":
            return np.maximum(np.abs(y), np.abs(x)) < 0.8 * self.radius
        if self.outline == "diamond":
            return np.abs(y) + np.abs(x) < 1.2 * self.radius
        distance = np.hypot(y, x)
        hole = 0.5 * self.radius if self.outline == "ring" else 0.0
        return (distance < self.radius) & (distance >= hole)

    def paint_over(self, image: np.ndarray, time: int, y: np.ndarray, x: np.ndarray) -> None:
        """Draw the shape as it is at frame `time` into float32 (H,W,3); y (H,1) and x (1,W) are pixel coordinates."""
        local_y = y - (self.centre[0] + self.velocity[0] * time)
        local_x = x - (self.centre[1] + self.velocity[1] * time)
        rows, columns = np.nonzero(self.inside(local_y, local_x))
        image[rows, columns] = self.texture.paint(local_y[rows, 0], local_x[0, columns])


def render(rng: np.random.Generator, extent: Extent) -> np.ndarray:
    """One scene: uint8 (N,H,W,3)."""
    ground, drift = _random_texture(rng), rng.uniform(-2, 2, 2).tolist()
    shapes = [_random_shape(rng, extent) for _ in range(rng.integers(2, 6))]
    y = np.arange(extent.height, dtype=np.float32)[:, None]
    x = np.arange(extent.width, dtype=np.float32)[None, :]
    frames = np.empty((extent.frames, extent.height, extent.width, 3), dtype=np.uint8)
    for time in range(extent.frames):
        image = ground.paint(y - drift[0] * time, x - drift[1] * time)
        for shape in shapes:
            shape.paint_over(image, time, y, x)
        frames[time] = image
    return frames


def _random_texture(rng: np.random.Generator) -> Texture:
    return Texture(
        kind=str(rng.choice(list(_PATTERNS))),
        colours=rng.uniform(0, 255, (2, 3)),
        angle=float(rng.uniform(0, np.pi)),
        wavelength=float(rng.uniform(48, 128)),
    )


def _random_shape(rng: np.random.Generator, extent: Extent) -> Shape:
    return Shape(
        outline=str(rng.choice(OUTLINES)),
        texture=_random_texture(rng),
        centre=(float(rng.uniform(0, extent.height)), float(rng.uniform(0, extent.width))),
        velocity=(float(rng.uniform(-3, 3)), float(rng.uniform(-3, 3))),
        radius=float(rng.uniform(0.15, 0.4) * extent.height),
    )
