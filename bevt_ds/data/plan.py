"""The sample plan: which sample fills a slot of a step, and what is done to it. Pure functions of their arguments.

A slot is a position in the global batch of one step. Nothing here knows ranks or workers, so the sequence of samples,
crops and masks is the same for any number of ranks and after any resume.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from itertools import accumulate

import numpy as np

from bevt_ds.config.schema import DataConfig
from bevt_ds.data.masks import block_mask, tube_mask
from bevt_ds.rng import Use, generator, sample_key

CELL = 16  # pixels along a side of a mask cell
FRAMES_PER_CELL = 2
NO_JITTER = (1.0, 1.0, 1.0)


class StreamId(IntEnum):
    """A counter of every random number, so that no two streams share one. Never renumber, or old runs change."""

    VIDEO = 0
    IMAGE = 1
    EVAL_VIDEO = 2
    EVAL_IMAGE = 3
    LABELLED = 4
    TEST = 5

    @property
    def kind(self) -> str:
        return "image" if self in (StreamId.IMAGE, StreamId.EVAL_IMAGE) else "video"

    @property
    def held_out(self) -> bool:
        return self in (StreamId.EVAL_VIDEO, StreamId.EVAL_IMAGE)


@dataclass(frozen=True)
class PlanEntry:
    """One sample of one step: which member of which shard, and everything that its pixels need.

    Positions are fractions, because the sizes of a sample are known only when it is opened.
    """

    step: int
    slot: int
    attempt: int  # 0: the planned sample; j: the j-th substitute
    shard: int
    member: int
    start: float  # [0,1): where the clip starts among the possible starts
    phase: float  # [0,1): by what share of the stride it starts later than that
    short_side: int  # pixels
    crop: tuple[float, float]  # [0,1): y, x of the crop among the possible positions
    flip: bool
    jitter: tuple[float, float, float]  # factors of brightness, contrast, saturation


class SampleOrder:
    """Position in an endless sequence of epochs -> (shard, member). Each epoch holds each sample exactly once.

    Shards are shuffled, then the samples of each run of `window` shards among themselves, so that reads stay within
    few files at a time.
    """

    def __init__(self, counts: Sequence[int], seed: int, stream: StreamId, window: int) -> None:
        self.counts = np.asarray(counts, dtype=np.int64)
        self.total = int(self.counts.sum())
        self.seed, self.stream, self.window = seed, stream, window
        self._shards_of = lru_cache(maxsize=2)(self._shuffle_shards)
        self._samples_of = lru_cache(maxsize=2)(self._shuffle_samples)

    def at(self, position: int) -> tuple[int, int]:
        epoch, offset = divmod(position, self.total)
        _, starts = self._shards_of(epoch)
        window = bisect_right(starts, offset) - 1
        shard, member = self._samples_of(epoch, window)[offset - starts[window]]
        return int(shard), int(member)

    def substitute(self, step: int, slot: int, attempt: int) -> tuple[int, int]:
        """The `attempt`-th sample to stand in for a slot's own: any of the shards."""
        rng = generator(self.seed, Use.SUBSTITUTE, self.stream, step, slot)
        sample = int(rng.integers(self.total, size=attempt)[-1])
        starts = np.cumsum(self.counts) - self.counts
        shard = int(np.searchsorted(starts, sample, side="right")) - 1
        return shard, sample - int(starts[shard])

    def window_at(self, position: int) -> tuple[int, int]:
        """Epoch and number of the window that holds a position."""
        epoch, offset = divmod(position, self.total)
        return epoch, bisect_right(self._shards_of(epoch)[1], offset) - 1

    def shards_in(self, epoch: int, window: int) -> list[int]:
        """The shards of a window, and of the one after it: what is read now and next."""
        windows = [*self._shards_of(epoch)[0], *self._shards_of(epoch + 1)[0]]
        return [int(shard) for shards in windows[window : window + 2] for shard in shards]

    def _shuffle_shards(self, epoch: int) -> tuple[list[np.ndarray], list[int]]:
        """The epoch's windows (arrays of shard numbers) and the offset at which each starts."""
        rng = generator(self.seed, Use.SHARD_ORDER, self.stream, epoch)
        order = rng.permutation(len(self.counts))
        windows = [order[i : i + self.window] for i in range(0, len(order), self.window)]
        sizes = [int(self.counts[shards].sum()) for shards in windows]
        return windows, list(accumulate(sizes[:-1], initial=0))

    def _shuffle_samples(self, epoch: int, window: int) -> np.ndarray:
        """int64 (samples of the window, 2): shard and member."""
        shards = self._shards_of(epoch)[0][window]
        counts = self.counts[shards]
        members = np.concatenate([np.arange(n) for n in counts])
        samples = np.stack([np.repeat(shards, counts), members], axis=1)
        rng = generator(self.seed, Use.SAMPLE_ORDER, self.stream, epoch, window)
        return rng.permutation(samples)


class StreamPlan:
    """The plan of one stream: `global_size` slots a step over shards with `counts` samples each."""

    def __init__(
        self,
        stream: StreamId,
        counts: Sequence[int],
        config: DataConfig,
        seed: int,
        global_size: int,
    ) -> None:
        self.stream, self.config, self.seed, self.global_size = stream, config, seed, global_size
        self.order = SampleOrder(counts, seed, stream, config.shuffle_window)
        self.grid = (config.size // CELL, config.size // CELL)
        self.frames_per_cell = FRAMES_PER_CELL if stream.kind == "video" else 1
        repeats = stream.kind == "video" and not stream.held_out
        self.clips_per_sample = config.clips_per_video if repeats else 1
        self.masks = lru_cache(maxsize=2)(self._masks)

    def entry(self, step: int, slot: int, attempt: int = 0) -> PlanEntry:
        """The sample of (step, slot), or with `attempt` j > 0 its j-th substitute: a sample drawn anew, treated alike.

        Slots come in groups of `clips_per_sample` that share a sample and a window of its time, so that one decode
        serves them all; clips, crops and masks are each slot's own.
        """
        first = slot - slot % self.clips_per_sample
        shard, member = self._locate(step, first, attempt)
        treatment = self._fixed_view() if self.stream.held_out else self._random_view(step, slot, first)
        return PlanEntry(step, slot, attempt, shard, member, *treatment)

    def window_at(self, step: int) -> tuple[int, int]:
        """The window of shards in which a step begins; see SampleOrder."""
        return self.order.window_at(step * self.global_size // self.clips_per_sample)

    def key(self, step: int, slot: int) -> int:
        """The sample's key for the model's own randomness."""
        return sample_key(self.seed, self.stream, step, slot)

    def masked_cells(self, step: int) -> int:
        """Masked output positions of the step's global batch: the denominator of the loss."""
        return int(self.masks(step).sum()) * self.frames_per_cell

    def _masks(self, step: int) -> np.ndarray:
        """bool (global_size, T/2, h, w) for clips, (global_size, h, w) for images."""
        return np.stack([self._mask(step, slot) for slot in range(self.global_size)])

    def _mask(self, step: int, slot: int) -> np.ndarray:
        rng = generator(self.seed, Use.MASK, self.stream, step, slot)
        if self.stream.kind == "image":
            return block_mask(rng, self.grid, self.config.mask)
        return tube_mask(rng, (self.config.frames // FRAMES_PER_CELL, *self.grid), self.config.mask)

    def _locate(self, step: int, slot: int, attempt: int) -> tuple[int, int]:
        if attempt == 0:
            return self.order.at((step * self.global_size + slot) // self.clips_per_sample)
        return self.order.substitute(step, slot, attempt)

    def _random_view(self, step: int, slot: int, first: int) -> tuple:
        draw = lambda use: generator(self.seed, use, self.stream, step, slot)  # noqa: E731
        config = self.config
        start = fraction(generator(self.seed, Use.CLIP_START, self.stream, step, first))
        phase = 0.0 if slot == first else fraction(draw(Use.CLIP_START))
        crop_rng = draw(Use.CROP)
        short_side = int(crop_rng.integers(config.short_side[0], config.short_side[1] + 1))
        crop = (fraction(crop_rng), fraction(crop_rng))
        flip = bool(draw(Use.FLIP).random() < config.flip)
        jitter = NO_JITTER
        if self.stream.kind == "image":
            strengths = np.asarray(config.image_jitter)
            factors = draw(Use.JITTER).uniform(np.maximum(1 - strengths, 0), 1 + strengths)
            jitter = tuple(float(f) for f in factors)
        return start, phase, short_side, crop, flip, jitter

    def _fixed_view(self) -> tuple:
        """Held-out samples: the middle of the clip, the centre of the picture, nothing random."""
        return 0.5, 0.0, self.config.short_side[0], (0.5, 0.5), False, NO_JITTER


def clip_frames(start: float, total: int, frames: int, stride: int, phase: float = 0.0) -> np.ndarray:
    """Frame numbers of a clip: int64 (frames,), evenly `stride` apart, from a video of `total` frames.

    The possible starts are 0 .. total - frames*stride, and a shorter video is repeated (SampleFrames of the original).
    That leaves the last stride - 1 frames of the span unused, and so room for any `phase`.
    """
    starts = max(total - frames * stride + 1, 1)
    return (int(start * starts) + int(phase * stride) + stride * np.arange(frames)) % total


def slots_of(micro_step: int, rank: int, world: int, micro_size: int) -> range:
    """The slots of the global batch that a rank processes in a micro-step."""
    first = (micro_step * world + rank) * micro_size
    return range(first, first + micro_size)


def fraction(rng: np.random.Generator) -> float:
    """A number of [0,1) that single precision holds exactly: rounding to it must not reach 1."""
    return int(rng.integers(1 << 24)) / (1 << 24)
