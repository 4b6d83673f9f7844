"""Pixels of clips on a CPU: what pipeline.py's DALI graph makes of decoded frames, by torch's kernels.

DALI's cubic resize and filter work in single precision there; torch resizes 8-bit images as such, and oneDNN's
depthwise convolution is the tokenizer's filter. Sizes and offsets are DALI's to the pixel. Levels of 255 (a test holds
the bounds):
- Where an image is enlarged, the cubic kernel has a = -0.5 like DALI's: mean 0.2 apart on real images.
- Where it is shrunk, torch has no such kernel without antialiasing, but OpenCV's own, a = -0.75: mean 0.05 from OpenCV,
  0.2 from DALI at 720 lines.
- Of equal crops the tokenizer's views are equal, but for a level where a half is rounded.

Shape letters: T frames, H W pixels of the source, S crop side, v = S/2 side of the tokenizer's view.
"""

from __future__ import annotations

import math
import threading
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import pairwise
from threading import Barrier
from typing import NamedTuple
from weakref import finalize

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from bevt_ds.batch import MEAN, STD
from bevt_ds.data.decoding.geometry import Box, Crop, cut, source_box
from bevt_ds.data.pixels.pipeline import lanczos4_taps
from bevt_ds.data.reading.deadline import DeadlineExecutor

_CACHED = 4  # frames at a time, which stay in a core's cache
_REACH = 3  # pixels beyond the edge that the tokenizer's filter reads
_CUBIC_REACH = 4  # source rows beyond a row's own place that a cubic resize reads, and some to spare
_MOST_PHASES = 16  # single precision numbers in a register


class ReusedMemory:
    """Memory for tensors of float32, used again once the last tensor that refers to it is gone.

    A micro-batch of 4 clips is 50 MB; to touch as much fresh memory takes as long as to resize the clips.
    """

    def __init__(self) -> None:
        self._free: dict[tuple[int, ...], list[np.ndarray]] = defaultdict(list)

    def floats(self, *shape: int) -> Tensor:
        """A tensor, its values arbitrary."""
        free = self._free[shape]
        memory = free.pop() if free else np.empty(shape, np.float32)
        lent = memory.view()  # lives as long as the tensor's storage
        finalize(lent, free.append, memory).atexit = False
        return torch.from_numpy(lent)


class Scratch(threading.local):
    """Memory of a thread for what it needs for a moment. A tensor takes the place of the last one of its name."""

    def __init__(self) -> None:
        self._memory: dict[str, Tensor] = {}

    def tensor(self, name: str, dtype: torch.dtype, *shape: int) -> Tensor:
        """Its values are arbitrary."""
        size, memory = math.prod(shape), self._memory.get(name)
        if memory is None or size > len(memory):
            memory = self._memory[name] = torch.empty(size, dtype=dtype)
        return memory[:size].view(shape)


class ClipBatch(NamedTuple):
    """The pixels of a micro-batch of clips, which `ClipPixels.fill` writes clip by clip."""

    masked: np.ndarray  # bool (B,T): the frames of which a view is wanted
    pixels: Tensor  # float (B,3,T,S,S)
    view: Tensor  # float (F,3,v,v), of the F masked frames
    views: Sequence[Tensor]  # the part of `view` that is each clip's


class ClipPixels:
    """Turns the frames of a clip into the two images that the video stream needs; threads may share it. size: S."""

    def __init__(self, size: int) -> None:
        self._size, self._memory, self._scratch = size, ReusedMemory(), Scratch()

    def batch(self, masked: np.ndarray) -> ClipBatch:
        """Room for a micro-batch, its values arbitrary. masked: bool (B,T)."""
        (clips, frames), size = masked.shape, self._size
        pixels = self._memory.floats(clips, 3, frames, size, size)
        view = self._memory.floats(clips * frames, 3, size // 2, size // 2)[: masked.sum()]
        return ClipBatch(masked, pixels, view, view.split(masked.sum(axis=1).tolist()))

    def crop(self, images: np.ndarray, rows: np.ndarray, crop: Crop, name: str = "crop") -> Tensor:
        """A clip resized to the short side and cut, not yet flipped: uint8 (T,S,S,3), in this thread's memory.

        images: uint8 (n,H,W,3). rows: int (T,), the image of each frame. name: the memory's; what a thread made before
        under the same name is overwritten.
        """
        frames = torch.from_numpy(_chosen(images, rows, source_box(*images.shape[1:3], crop), self._scratch))
        height, width, top, left = cut(*frames.shape[1:3], crop)
        bottom, right = top + self._size, left + self._size
        if (height, width) != frames.shape[1:3]:
            frames = _resized(frames, (height, width), (bottom, right))
        kept = self._scratch.tensor(name, torch.uint8, len(frames), self._size, self._size, 3)
        return kept.copy_(frames[:, top:bottom, left:right])

    def fill(self, batch: ClipBatch, i: int, crop: Tensor, flip: bool) -> None:
        """Write clip i of a batch. crop: uint8 (T,S,S,3), as `crop` makes it."""
        pixels, masked, done = batch.pixels[i], batch.masked[i], 0
        for part in _runs(masked):
            some = crop[part].flip(2) if flip else crop[part]
            levels = _levels(some, self._scratch)
            for channel, (mean, std) in enumerate(zip(MEAN, STD, strict=True)):
                level, out = levels[channel, :, _REACH:-_REACH], pixels[channel, part]
                torch.add(torch.tensor(-mean / std), level, alpha=1 / std, out=out)
            if masked[part.start]:
                _token_view(levels, self._scratch, out=batch.views[i][done : done + len(some)])
                done += len(some)


def compute_on_one_core(executor: DeadlineExecutor) -> None:
    """In each of its threads, none of which has work, torch computes on one core from now on.

    Clips are the parallelism: inside a clip the cores would wait for each other, in vain where they are busy decoding.
    Torch's setting is the calling thread's and that of all threads that begin later, so it is put back.
    """
    before, started = torch.get_num_threads(), Barrier(executor.threads + 1)
    for _ in range(executor.threads):
        executor.submit(_use_one_core, started)
    started.wait()
    torch.set_num_threads(before)


def _use_one_core(started: Barrier) -> None:
    torch.get_num_threads()  # at a thread's first use torch would take the setting of all threads over its own
    torch.set_num_threads(1)
    started.wait()


def _runs(masked: np.ndarray) -> Iterator[slice]:
    """Frames that are neighbours and alike, not more than stay in a core's cache. masked: bool (T,)."""
    edges = [0, *(np.flatnonzero(np.diff(masked)) + 1).tolist(), len(masked)]
    for begin, end in pairwise(edges):
        for first in range(begin, end, _CACHED):
            yield slice(first, min(first + _CACHED, end))


def _chosen(images: np.ndarray, rows: np.ndarray, box: Box, scratch: Scratch) -> np.ndarray:
    """images[rows], without a copy where the rows follow one another. Else `box` is copied; the rest is arbitrary."""
    if (np.diff(rows) == 1).all():
        return images[rows[0] : rows[-1] + 1]
    chosen = scratch.tensor("chosen", torch.uint8, len(rows), *images.shape[1:]).numpy()
    part = (slice(box.top, box.top + box.height), slice(box.left, box.left + box.width))
    for frame, row in zip(chosen, rows.tolist(), strict=True):
        frame[part] = images[row][part]
    return chosen


def _resized(frames: Tensor, size: tuple[int, int], needed: tuple[int, int]) -> Tensor:
    """Cubic resize to `size`, of which the first `needed` rows and columns are made, or a few more: uint8 (T,...,3)."""
    (rows, down), (columns, across) = map(_source_of, needed, size, frames.shape[1:3])
    # Antialiasing widens the kernel only where a frame shrinks; what is left of it is a = -0.5.
    resized = F.interpolate(
        frames[:, :rows, :columns].permute(0, 3, 1, 2),
        scale_factor=(down, across),
        mode="bicubic",
        antialias=min(down, across) >= 1,
    )
    return resized.permute(0, 2, 3, 1)


def _source_of(needed: int, new: int, old: int) -> tuple[int, float]:
    """How many of `old` rows the first `needed` of `new` rows are made of, and the scale."""
    if new == old:
        return needed, 1.0
    scale = math.nextafter(new / old, math.inf)  # old * scale must not end just below new
    rows = min(old, math.ceil(needed / scale) + _CUBIC_REACH)
    # As many rows as were read would be taken for no resize at all, whatever the scale.
    return (old if int(rows * scale) == rows else rows), scale


def _levels(image: Tensor, scratch: Scratch) -> Tensor:
    """A crop as the tokenizer's filter wants it: uint8 (T,S,S,3) -> float (3,T,S+6,S), lines repeated at both ends."""
    frames, size = image.shape[:2]
    padded = scratch.tensor("levels", torch.float32, 3, frames, size + 2 * _REACH, size)
    padded[:, :, _REACH:-_REACH] = image.permute(3, 0, 1, 2)
    _repeat_edges(padded, dim=2)
    return padded


def _token_view(levels: Tensor, scratch: Scratch, out: Tensor) -> None:
    """Half-size images by OpenCV's LANCZOS4: `_levels` -> float (T,3,v,v) of RGB in [0,1].

    First down the columns, with a channel for each: lines stay contiguous, and oneDNN has a kernel for it. Then along
    the lines, with a channel for each of `phases` neighbouring results: for a single one oneDNN has no fast kernel.
    """
    channels, frames, tall, wide = levels.shape
    half, phases = wide // 2, math.gcd(wide // 2, _MOST_PHASES)
    columns = levels.view(channels * frames, tall, 1, wide).permute(0, 3, 1, 2)
    lines = F.conv2d(columns, _filters(wide), stride=(2, 1), groups=wide).permute(0, 2, 3, 1)
    padded = scratch.tensor("lines", torch.float32, channels * frames * half, wide + 2 * _REACH)
    padded[:, _REACH:-_REACH] = lines.reshape(-1, wide)
    _repeat_edges(padded, dim=1)
    results = F.conv2d(padded[None, None], _filter_bank(phases), stride=(1, 2 * phases))
    in_order = results.round_().clamp_(0, 255).view(phases, channels, frames, half, -1).permute(2, 1, 3, 4, 0)
    torch.div(in_order, 255, out=out.view(in_order.shape))


def _repeat_edges(padded: Tensor, dim: int) -> None:
    """Fill the margin of _REACH on either side with the line next to it."""
    length = padded.shape[dim] - 2 * _REACH
    for margin, edge in ((0, _REACH), (_REACH + length, _REACH + length - 1)):
        padded.narrow(dim, margin, _REACH).copy_(padded.narrow(dim, edge, 1))


@lru_cache(maxsize=8)
def _filters(length: int) -> Tensor:
    """LANCZOS4's taps once a channel: float (length,1,8,1)."""
    return torch.from_numpy(lanczos4_taps()).view(1, 1, 8, 1).repeat(length, 1, 1, 1)


@lru_cache(maxsize=8)
def _filter_bank(phases: int) -> Tensor:
    """LANCZOS4's taps, each filter two pixels on from the one before: float (phases,1,1,6 + 2 phases)."""
    bank = torch.zeros(phases, 1, 1, 2 * _REACH + 2 * phases)
    for phase in range(phases):
        bank[phase, 0, 0, 2 * phase : 2 * phase + 8] = torch.from_numpy(lanczos4_taps())
    return bank
