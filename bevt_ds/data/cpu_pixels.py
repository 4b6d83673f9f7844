"""Pixels of clips on a CPU: what pipeline.py's DALI graph makes of decoded frames, by torch's kernels.

DALI's cubic resize and filter work in single precision there; torch resizes 8-bit pictures as such, and oneDNN's
depthwise convolution is the tokenizer's filter. Sizes and offsets are DALI's to the pixel. Levels of 255 (a test holds
the bounds):
- Where a picture is enlarged, the cubic kernel has a = -0.5 like DALI's: mean 0.2 apart on real pictures.
- Where it is shrunk, torch has no such kernel without antialiasing, but OpenCV's own, a = -0.75: mean 0.05 from OpenCV,
  0.2 from DALI at 720 lines.
- Of equal crops the tokenizer's views are equal, but for a level where a half is rounded.

Shape letters: T frames, H W pixels of the source, S crop side, v = S/2 side of the tokenizer's view.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from threading import Barrier
from typing import NamedTuple
from weakref import finalize

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from bevt_ds.data.pipeline import MEAN, STD, lanczos4_taps
from bevt_ds.data.plan import PlanEntry
from bevt_ds.data.timing import StageTimes

_CACHED = 4  # frames at a time, whose filtering stays in a core's cache


class Cut(NamedTuple):
    """A square of a resized picture, in pixels."""

    height: int  # of the resized picture
    width: int
    top: int
    left: int


def cut(height: int, width: int, entry: PlanEntry, size: int) -> Cut:
    """Where the crop of a source picture lies, as DALI computes it: single precision, halves up; offsets floored."""
    scale = np.float32(entry.short_side / min(height, width))
    resized = [int(np.float32(n) * scale + np.float32(0.5)) for n in (height, width)]
    offsets = [int(fraction * (n - size)) for fraction, n in zip(entry.crop, resized, strict=True)]
    return Cut(*resized, *offsets)


class ReusedMemory:
    """Memory for tensors, used again once the last tensor that refers to it is gone.

    A micro-batch of 4 clips is 50 MB; to touch as much fresh memory takes as long as to resize the clips.
    """

    def __init__(self) -> None:
        self._free: dict[tuple[int, ...], list[np.ndarray]] = defaultdict(list)

    def floats(self, *shape: int) -> Tensor:
        """A tensor of float32, its values arbitrary."""
        free = self._free[shape]
        memory = free.pop() if free else np.empty(shape, np.float32)
        lent = memory.view()  # lives as long as the tensor's storage
        finalize(lent, free.append, memory).atexit = False
        return torch.from_numpy(lent)


class ClipPixels:
    """Turns a micro-batch's clips into the two pictures that the video stream needs; PixelPipeline's twin.

    size: S. threads: clips at a time. times: where the seconds are counted.
    """

    dali_decoder = None  # clips arrive as frames

    def __init__(self, size: int, threads: int, times: StageTimes | None = None) -> None:
        self._size, self._times = size, times or StageTimes()
        self._threads, self._memory = single_core_threads(threads), ReusedMemory()

    def received(self, pictures: np.ndarray, places: np.ndarray, entries: Sequence[PlanEntry]) -> list[np.ndarray]:
        """The crops of a video's clips, uint8 (T,S,S,3) each: small, and nothing of the worker's memory.

        pictures: uint8 (n,H,W,3). places: int (clips,T), each frame's picture. Runs in the thread that waits for the
        worker, on one core.
        """
        return [self._crop(_chosen(pictures, rows), entry) for rows, entry in zip(places, entries, strict=True)]

    def run(self, crops: Sequence[np.ndarray], entries: Sequence[PlanEntry]) -> tuple[Tensor, Tensor]:
        """Pictures of a micro-batch: (pixels, view) as bevt_ds.batch.Stream describes them. crops: `received`'s."""
        batch, frames, size = len(crops), len(crops[0]), self._size
        with self._times.measured("augment"):
            pixels = self._memory.floats(batch, 3, frames, size, size)
            view = self._memory.floats(batch, frames, 3, size // 2, size // 2)
            for _ in self._threads.map(_fill, pixels, view, crops, entries):
                pass
        return pixels, view

    def _crop(self, frames: np.ndarray, entry: PlanEntry) -> np.ndarray:
        """Resized to the short side and cut, not yet flipped: uint8 (T,H,W,3) -> (T,S,S,3)."""
        height, width, top, left = cut(*frames.shape[1:3], entry, self._size)
        if (height, width) == frames.shape[1:3]:
            resized = frames
        else:
            resized = _resized(frames, (height, width), (top + self._size, left + self._size))
        return resized[:, top : top + self._size, left : left + self._size].copy()


def single_core_threads(count: int) -> ThreadPoolExecutor:
    """Threads in each of which torch computes on one core.

    Clips are the parallelism: inside a clip the cores would wait for each other, in vain where they are busy decoding.
    Torch's setting is the calling thread's and that of all threads that begin later, so it is put back.
    """
    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(count, "pixels", _use_one_core)
    started = Barrier(count + 1)
    for _ in range(count):
        pool.submit(started.wait)
    started.wait()
    torch.set_num_threads(before)
    return pool


def _use_one_core() -> None:
    torch.get_num_threads()  # at a thread's first use torch would take the setting of all threads over its own
    torch.set_num_threads(1)


def _fill(pixels: Tensor, view: Tensor, crop: np.ndarray, entry: PlanEntry) -> None:
    """Write both pictures of a clip: float (3,T,S,S) and (T,3,v,v). crop: uint8 (T,S,S,3), not yet flipped."""
    picture = torch.from_numpy(crop)
    picture = picture.flip(2) if entry.flip else picture
    _normalise(picture, out=pixels)
    for some, their_view in zip(picture.split(_CACHED), view.split(_CACHED), strict=True):
        token_view(some, out=their_view)


def _chosen(pictures: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """pictures[rows], without a copy where the rows follow one another."""
    if (np.diff(rows) == 1).all():
        return pictures[rows[0] : rows[-1] + 1]
    return pictures[rows]


def _resized(frames: np.ndarray, size: tuple[int, int], needed: tuple[int, int]) -> np.ndarray:
    """Cubic resize to `size`, of which the first `needed` rows and columns are made, or one more: uint8 (T,...,3)."""
    scales = [new / old for new, old in zip(size, frames.shape[1:3], strict=True)]
    # As many rows as the source has would be taken for no resize at all, whatever the scale.
    needed = [count + (count == old) for count, old in zip(needed, frames.shape[1:3], strict=True)]
    # Antialiasing widens the kernel only where a picture shrinks; what is left of it is a = -0.5.
    resize = torch.ops.aten._upsample_bicubic2d_aa if min(scales) >= 1 else torch.ops.aten.upsample_bicubic2d
    channels_first = torch.from_numpy(frames).permute(0, 3, 1, 2)
    return resize(channels_first, needed, False, *scales).permute(0, 2, 3, 1).numpy()


def _normalise(picture: Tensor, out: Tensor) -> None:
    """uint8 (T,S,S,3) -> float (3,T,S,S), zero mean and unit variance of the training set."""
    mean, std = (torch.tensor(values).view(3, 1, 1, 1) for values in (MEAN, STD))
    out.copy_(picture.permute(3, 0, 1, 2)).sub_(mean).div_(std)


def token_view(picture: Tensor, out: Tensor) -> None:
    """Half-size picture of a crop, OpenCV's LANCZOS4: uint8 (T,S,S,3) -> float (T,3,v,v) of RGB in [0,1]."""
    levels = _halved(_halved(picture).transpose(1, 2))  # (T, v of x, v of y, 3)
    torch.div(levels.round_().clamp_(0, 255).permute(0, 3, 2, 1), 255, out=out)


def _halved(lines: Tensor) -> Tensor:
    """Lines filtered across, every second kept: (T,n,...) -> float (T,n/2,...). Those at the edge go on beyond it."""
    frames, count, *line = lines.shape
    padded = torch.empty(frames, count + 6, *line)
    padded[:, :3], padded[:, 3:-3], padded[:, -3:] = lines[:, :1], lines, lines[:, -1:]
    # A convolution with a channel for each place along the line: lines stay contiguous, and oneDNN has a kernel for it.
    flat = padded.view(frames, count + 6, 1, -1)
    filters = _filters(flat.shape[-1])
    kept = F.conv2d(flat.permute(0, 3, 1, 2), filters, stride=(2, 1), groups=len(filters))
    return kept.permute(0, 2, 3, 1).reshape(frames, count // 2, *line)


@lru_cache(maxsize=8)
def _filters(length: int) -> Tensor:
    """LANCZOS4's taps once a channel: float (length,1,8,1)."""
    return torch.from_numpy(lanczos4_taps()).view(1, 1, 8, 1).repeat(length, 1, 1, 1)
