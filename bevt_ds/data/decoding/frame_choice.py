"""Which frames of a video make a clip, where training and testing differ. Pure functions of the video's length.

The functions follow the original's SampleFrames (dense) and UniformSampleFrames (segments). A position is what a plan
knows before the video is opened; it travels to the decode worker as JSON.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from bevt_ds.data.plan import clip_frames

Position = Sequence[float]


def random_clip(total: int, frames: int, stride: int, position: Position) -> np.ndarray:
    """position: (start, phase) of `clip_frames`."""
    start, phase = position
    return clip_frames(start, total, frames, stride, phase)


def spaced_clip(total: int, frames: int, stride: int, position: Position) -> np.ndarray:
    """position: (i, n): the i-th of n clips, in the middle of the i-th n-th of the possible starts.

    A video shorter than the clip is repeated, from its first frame on.
    """
    i, n = position
    spacing = max(total - frames * stride + 1, 0) / n
    return (int(i * spacing + spacing / 2) + stride * np.arange(frames)) % total


def random_segments(total: int, frames: int, stride: int, position: Position) -> np.ndarray:
    """position: a fraction of [0,1) for each frame: where it lies in its segment. `stride` is not used."""
    first, last = _segments(total, frames)
    return first + (np.asarray(position) * (last - first + 1)).astype(np.int64)


def spaced_segments(total: int, frames: int, stride: int, position: Position) -> np.ndarray:
    """position: (i, n): the i-th of n clips; of one clip each frame is the middle of its segment, rounded down."""
    i, n = (int(value) for value in position)
    first, last = _segments(total, frames)
    return first + (last - first) * (2 * i + 1) // (2 * n)


def _segments(total: int, frames: int) -> tuple[np.ndarray, np.ndarray]:
    """First and last frame of each segment, both int64 (frames,). Neighbours share a frame.

    Halves are rounded to even.
    """
    bounds = np.round((total - 1) / frames * np.arange(frames + 1)).astype(np.int64)
    return bounds[:-1], bounds[1:]


CHOICES: dict[str, Callable[[int, int, int, Position], np.ndarray]] = {
    "clip": random_clip,
    "spaced_clip": spaced_clip,
    "segments": random_segments,
    "spaced_segments": spaced_segments,
}
