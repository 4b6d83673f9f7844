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

import math
import threading
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import pairwise
from threading import Barrier
from weakref import finalize

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from bevt_ds.batch import MEAN, STD
from bevt_ds.data.decoding.cut import Box, Crop, cut, source_box
from bevt_ds.data.pixels.pipeline import lanczos4_taps
from bevt_ds.data.plan import PlanEntry
from bevt_ds.data.timing import StageTimes

_CACHED = 4  # frames at a time, which stay in a core's cache
_REACH = 3  # pixels beyond the edge that the tokenizer's filter reads
_CUBIC_REACH = 4  # source rows beyond a row's own place that a cubic resize reads, and some to spare
_MOST_PHASES = 16  # single precision numbers in a register


class ReusedMemory:
    """Memory for tensors, used again once the last tensor that refers to it is gone.

    A micro-batch of 4 clips is 50 MB; to touch as much fresh memory takes as long as to resize the clips.
    """

    def __init__(self) -> None:
        self._free: dict[tuple[type, tuple[int, ...]], list[np.ndarray]] = defaultdict(list)

    def floats(self, *shape: int) -> Tensor:
        """A tensor of float32, its values arbitrary."""
        return self._lent(np.float32, shape)

    def levels(self, *shape: int) -> Tensor:
        """A tensor of uint8, its values arbitrary."""
        return self._lent(np.uint8, shape)

    def _lent(self, dtype: type, shape: tuple[int, ...]) -> Tensor:
        free = self._free[dtype, shape]
        memory = free.pop() if free else np.empty(shape, dtype)
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


class ClipPixels:
    """Turns a micro-batch's clips into the two pictures that the video stream needs; PixelPipeline's twin.

    size: S. threads: clips at a time. times: where the seconds are counted.
    """

    dali_decoder = None  # clips arrive as frames

    def __init__(self, size: int, threads: int, times: StageTimes | None = None) -> None:
        self._size, self._times = size, times or StageTimes()
        self._threads, self._memory, self._scratch = single_core_threads(threads), ReusedMemory(), Scratch()

    def crops(self, entries: Sequence[PlanEntry]) -> list[Crop]:
        """What `received` needs of each clip's frames."""
        return [Crop(entry.short_side, *entry.crop, self._size) for entry in entries]

    def received(self, pictures: np.ndarray, places: np.ndarray, entries: Sequence[PlanEntry]) -> list[Tensor]:
        """The crops of a video's clips, uint8 (T,S,S,3) each: small, and nothing of the worker's memory.

        pictures: uint8 (n,H,W,3). places: int (clips,T), each frame's picture. Runs in the thread that waits for the
        worker, on one core.
        """
        kept = []
        with self._times.measured("decode"):  # for that long the worker cannot decode
            for rows, crop in zip(places, self.crops(entries), strict=True):
                frames = _chosen(pictures, rows, source_box(*pictures.shape[1:3], crop), self._scratch)
                kept.append(self._crop(torch.from_numpy(frames), crop))
        return kept

    def run(self, crops: Sequence[Tensor], entries: Sequence[PlanEntry], masked: np.ndarray) -> tuple[Tensor, Tensor]:
        """Pictures of a micro-batch: (pixels, view) as bevt_ds.batch.Stream describes them.

        crops: `received`'s. masked: bool (clips,T), the frames of which a view is wanted.
        """
        (batch, frames), size = masked.shape, self._size
        with self._times.measured("augment"):
            pixels = self._memory.floats(batch, 3, frames, size, size)
            view = self._memory.floats(batch * frames, 3, size // 2, size // 2)[: masked.sum()]
            views = view.split(masked.sum(axis=1).tolist())
            for _ in self._threads.map(self._fill, pixels, views, crops, entries, masked):
                pass
        return pixels, view

    def _crop(self, frames: Tensor, crop: Crop) -> Tensor:
        """Resized to the short side and cut, not yet flipped: uint8 (T,H,W,3) -> (T,S,S,3)."""
        height, width, top, left = cut(*frames.shape[1:3], crop)
        bottom, right = top + self._size, left + self._size
        if (height, width) != frames.shape[1:3]:
            frames = _resized(frames, (height, width), (bottom, right))
        kept = self._memory.levels(len(frames), self._size, self._size, 3)
        return kept.copy_(frames[:, top:bottom, left:right])

    def _fill(self, pixels: Tensor, view: Tensor, crop: Tensor, entry: PlanEntry, masked: np.ndarray) -> None:
        """Write both pictures of a clip: float (3,T,S,S), and (F,3,v,v) of the F frames that are `masked`, bool (T,).

        crop: uint8 (T,S,S,3), not yet flipped.
        """
        done = 0
        for part in _runs(masked):
            some = crop[part].flip(2) if entry.flip else crop[part]
            levels = _levels(some, self._scratch)
            _normalise(levels, out=pixels[:, part])
            if masked[part.start]:
                _token_view(levels, self._scratch, out=view[done : done + len(some)])
                done += len(some)


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


def _runs(masked: np.ndarray) -> Iterator[slice]:
    """Frames that are neighbours and alike, not more than stay in a core's cache. masked: bool (T,)."""
    edges = [0, *(np.flatnonzero(np.diff(masked)) + 1).tolist(), len(masked)]
    for begin, end in pairwise(edges):
        for first in range(begin, end, _CACHED):
            yield slice(first, min(first + _CACHED, end))


def _chosen(pictures: np.ndarray, rows: np.ndarray, box: Box, scratch: Scratch) -> np.ndarray:
    """pictures[rows], without a copy where the rows follow one another. Else `box` is copied; the rest is arbitrary."""
    if (np.diff(rows) == 1).all():
        return pictures[rows[0] : rows[-1] + 1]
    chosen = scratch.tensor("chosen", torch.uint8, len(rows), *pictures.shape[1:]).numpy()
    part = (slice(box.top, box.top + box.height), slice(box.left, box.left + box.width))
    for frame, row in zip(chosen, rows.tolist(), strict=True):
        frame[part] = pictures[row][part]
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


def _levels(picture: Tensor, scratch: Scratch) -> Tensor:
    """A crop as the tokenizer's filter wants it: uint8 (T,S,S,3) -> float (3,T,S+6,S), lines repeated at both ends."""
    frames, size = picture.shape[:2]
    padded = scratch.tensor("levels", torch.float32, 3, frames, size + 2 * _REACH, size)
    padded[:, :, _REACH:-_REACH] = picture.permute(3, 0, 1, 2)
    _repeat_edges(padded, dim=2)
    return padded


def _normalise(levels: Tensor, out: Tensor) -> None:
    """`_levels` -> float (3,T,S,S), zero mean and unit variance of the training set."""
    for channel, (mean, std) in enumerate(zip(MEAN, STD, strict=True)):
        torch.add(torch.tensor(-mean / std), levels[channel, :, _REACH:-_REACH], alpha=1 / std, out=out[channel])


def _token_view(levels: Tensor, scratch: Scratch, out: Tensor) -> None:
    """Half-size pictures by OpenCV's LANCZOS4: `_levels` -> float (T,3,v,v) of RGB in [0,1].

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
    """Fill the margin of _REACH on either side with the line beside it."""
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
