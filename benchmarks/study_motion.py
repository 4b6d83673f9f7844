"""A drawn action set whose classes differ in motion alone: a few plain shapes that move together over a still ground.

The class decides how the shapes are displaced from frame to frame, and nothing else. The image is a torus: what
leaves it at one edge comes in at the other. Each shape starts anywhere on it, so that at every frame of every class its
place is uniform, and a single frame tells nothing.

Letters: N frames, H W pixels. Lengths are shares of the image's height.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bevt_ds.shards.synthetic.scene import OUTLINES, Extent, Shape, Texture

SHAPES = (2, 4)
RADII = (0.14, 0.24)
DARK, BRIGHT = (0, 90), (150, 255)  # levels of the ground's and of a shape's red, green and blue
WOBBLE = np.radians(15)  # a leg strays from its heading by at most this
USUAL, SLOW, FAST = (0.03, 0.055), (0.008, 0.016), (0.08, 0.11)  # speeds, a frame

RIGHT, DOWN, LEFT, UP = (np.radians(90 * i) for i in range(4))
DIAGONALS = tuple(np.radians(45 + 90 * i) for i in range(4))


@dataclass(frozen=True)
class Course:
    """How a class moves: the headings that each leg may take (radians; 0 right, a quarter turn down), and its speed."""

    group: str  # in what it differs from the others of the group
    legs: tuple[tuple[float, ...], ...]
    speed: tuple[float, float] = USUAL


COURSES = {
    "right": Course("direction", ((RIGHT,),)),
    "down": Course("direction", ((DOWN,),)),
    "left": Course("direction", ((LEFT,),)),
    "up": Course("direction", ((UP,),)),
    "slow": Course("speed", (DIAGONALS,), SLOW),
    "fast": Course("speed", (DIAGONALS,), FAST),
    "sideways_then_vertical": Course("order", ((RIGHT, LEFT), (DOWN, UP))),
    "vertical_then_sideways": Course("order", ((DOWN, UP), (RIGHT, LEFT))),
}


def render_action(rng: np.random.Generator, name: str, extent: Extent) -> np.ndarray:
    """One clip of the class `name`: uint8 (N,H,W,3). Its first frame does not depend on the class."""
    height, width = extent.height, extent.width
    ground = rng.uniform(*DARK, 3).astype(np.float32)
    shapes = [_random_shape(rng, height) for _ in range(rng.integers(SHAPES[0], SHAPES[1] + 1))]
    starts = rng.uniform(0, (height, width), (len(shapes), 2))
    moves = height * displacements(rng, COURSES[name], extent.frames)
    frames = np.empty((extent.frames, height, width, 3), dtype=np.uint8)
    for time, move in enumerate(moves):
        image = np.tile(ground, (height, width, 1))
        for shape, (y, x) in zip(shapes, starts + move, strict=True):
            shape.paint_over(image, 0, _from(y, height)[:, None], _from(x, width)[None, :])
        frames[time] = image
    return frames


def displacements(rng: np.random.Generator, course: Course, frames: int) -> np.ndarray:
    """Where the shapes are relative to their start: float (N,2), y and x, the first 0. The legs are about as long."""
    speed = rng.uniform(*course.speed)
    turn = frames / 2 + rng.uniform(-1, 1) * frames / 8
    headings = [rng.choice(leg) + rng.uniform(-WOBBLE, WOBBLE) for leg in course.legs]
    heading = np.where(np.arange(1, frames) < turn, headings[0], headings[-1])
    steps = speed * np.stack([np.sin(heading), np.cos(heading)], axis=1)
    return np.concatenate([np.zeros((1, 2)), np.cumsum(steps, axis=0)])


def _random_shape(rng: np.random.Generator, height: int) -> Shape:
    """Around the origin."""
    colour = rng.uniform(*BRIGHT, 3)
    return Shape(
        outline=str(rng.choice(OUTLINES)),
        texture=Texture("plain", np.stack([colour, colour]), angle=0.0, wavelength=1.0),
        centre=(0.0, 0.0),
        velocity=(0.0, 0.0),
        radius=float(rng.uniform(*RADII)) * height,
    )


def _from(place: float, length: int) -> np.ndarray:
    """How far each pixel of an axis lies from a place on it, the shortest way round: float (length,)."""
    return (np.arange(length) - place + length / 2) % length - length / 2
