"""The sample plan: which sample fills a slot of a step, and what is done to it. Pure functions of their arguments.

A slot is a position in the global batch of one step. Nothing here knows ranks or workers, so the sequence of samples,
crops and masks is the same for any number of ranks and after any resume.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from itertools import accumulate

import numpy as np

from bevt_ds.config.samples import DataConfig, LabelledDataConfig, ViewsConfig
from bevt_ds.data.masks import block_mask, tube_mask
from bevt_ds.rng import Use, generator, key_number

CELL = 16  # pixels along a side of a mask cell
FRAMES_PER_CELL = 2
NO_JITTER = (1.0, 1.0, 1.0)

Position = Sequence[float]


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
    crop_number: int = 0  # which of the sample's data.crops; 0 where there are none


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
    """The plan of one stream: `global_size` slots a step over shards with `counts` samples each.

    keys: of the samples of each shard; crops that are fixed (data.crops) follow from them.
    """

    def __init__(
        self,
        stream: StreamId,
        counts: Sequence[int],
        config: DataConfig,
        seed: int,
        global_size: int,
        keys: Sequence[Sequence[str]] = (),
    ) -> None:
        self.stream, self.config, self.seed, self.global_size = stream, config, seed, global_size
        self.keys = keys
        self.order = SampleOrder(counts, seed, stream, config.shuffle_window)
        self.grid = (config.size // CELL, config.size // CELL)
        self.kind, self.held_out = stream.kind, stream.held_out
        self.frames_per_cell = FRAMES_PER_CELL if self.kind == "video" else 1
        repeats = self.kind == "video" and not self.held_out
        self.clips_per_sample = config.clips_per_video if repeats else 1
        self.masks = lru_cache(maxsize=2)(self._masks)

    def entry(self, step: int, slot: int, attempt: int = 0) -> PlanEntry:
        """The sample of (step, slot), or with `attempt` j > 0 its j-th substitute: another sample, treated alike.

        Slots come in groups of `clips_per_sample` that share a sample and a window of its time, so that one decode
        serves them all; clips, crops and masks are each slot's own.
        """
        first = slot - slot % self.clips_per_sample
        position = (step * self.global_size + first) // self.clips_per_sample
        shard, member = self.order.substitute(step, first, attempt) if attempt else self.order.at(position)
        if self.held_out:
            treatment = self._fixed_view()
        elif self.config.crops:
            epoch = position // self.order.total
            treatment = self.fixed_crop(shard, member, epoch * self.clips_per_sample + slot - first)
        else:
            treatment = self._random_view(self.seed, step, slot, first)
        return PlanEntry(step, slot, attempt, shard, member, *treatment)

    def fixed_crop(self, shard: int, member: int, turn: int) -> tuple:
        """What is done to a sample at its `turn`-th turn, where it has data.crops crops: they come round again.

        Crops come in groups of `clips_per_sample`, as slots do. Neither the seed nor the other samples matter, so that
        what is made of a crop once is right for every run.
        """
        number = turn % self.config.crops
        first = number - number % self.clips_per_sample
        return *self._random_view(0, key_number(self.keys[shard][member]), number, first), number

    def window_at(self, step: int) -> tuple[int, int]:
        """The window of shards in which a step begins; see SampleOrder."""
        return self.order.window_at(step * self.global_size // self.clips_per_sample)

    def _masks(self, step: int) -> np.ndarray:
        """True = masked: bool (global_size, T/2, h, w) for clips, (global_size, h, w) for images."""
        rngs = [generator(self.seed, Use.MASK, self.stream, step, slot) for slot in range(self.global_size)]
        if self.kind == "image":
            return np.stack([block_mask(rng, self.grid, self.config.mask) for rng in rngs])
        cells = (self.config.frames // FRAMES_PER_CELL, *self.grid)
        return np.stack([tube_mask(rng, cells, self.config.mask) for rng in rngs])

    def _random_view(self, seed: int, group: int, number: int, first: int) -> tuple:
        """Drawn for a slot of a step, or a crop of a sample: `number` of `group`. first: the one that it follows."""
        config, place = self.config, (self.stream, group, number)
        start = fraction(generator(seed, Use.CLIP_START, self.stream, group, first))
        phase = 0.0 if number == first else fraction(generator(seed, Use.CLIP_START, *place))
        crop_rng = generator(seed, Use.CROP, *place)
        short_side = int(crop_rng.integers(config.short_side[0], config.short_side[1] + 1))
        crop = (fraction(crop_rng), fraction(crop_rng))
        flip = bool(generator(seed, Use.FLIP, *place).random() < config.flip)
        jitter = NO_JITTER
        if self.kind == "image":
            rng = generator(seed, Use.JITTER, *place)
            jitter = tuple(rng.uniform(max(1 - strength, 0), 1 + strength) for strength in config.image_jitter)
        return start, phase, short_side, crop, flip, jitter

    def _fixed_view(self) -> tuple:
        """Held-out samples: the middle of the clip, the centre of the frame, nothing random."""
        return 0.5, 0.0, self.config.short_side[0], (0.5, 0.5), False, NO_JITTER


@dataclass(frozen=True)
class LabelledEntry:
    """One video of one step, and where in it the clips lie."""

    step: int
    slot: int
    attempt: int  # 0: the planned sample; j: the j-th substitute
    shard: int
    member: int
    choice: str  # of CHOICES
    positions: tuple[tuple[float, ...], ...]  # of each clip, as `choice` takes them


class LabelledPlan:
    """Training: `global_size` slots a step over shards with `counts` videos each, one random clip a slot.

    What is done to the pixels depends on their size: it is drawn from `generator` once the video is decoded.
    """

    stream = StreamId.LABELLED
    clips_per_sample = 1

    def __init__(self, counts: Sequence[int], config: LabelledDataConfig, seed: int, global_size: int) -> None:
        self.config, self.seed, self.global_size = config, seed, global_size
        self.order = SampleOrder(counts, seed, self.stream, config.shuffle_window)

    def entry(self, step: int, slot: int, attempt: int = 0) -> LabelledEntry:
        """The sample of (step, slot), or with `attempt` j > 0 its j-th substitute: another sample, treated alike."""
        if attempt:
            shard, member = self.order.substitute(step, slot, attempt)
        else:
            shard, member = self.order.at(step * self.global_size + slot)
        rng = self.generator(Use.CLIP_START, step, slot)
        if self.config.sampling == "segments":
            choice, position = "segments", tuple(rng.random(self.config.frames).tolist())
        else:
            choice, position = "clip", (fraction(rng), 0.0)
        return LabelledEntry(step, slot, attempt, shard, member, choice, (position,))

    def window_at(self, step: int) -> tuple[int, int]:
        """The window of shards in which a step begins; see SampleOrder."""
        return self.order.window_at(step * self.global_size)

    def generator(self, use: Use, step: int, slot: int) -> np.random.Generator:
        """Random numbers of a slot."""
        return generator(self.seed, use, self.stream, step, slot)


class ViewPlan:
    """Testing: every video once, in the order of the shards. A step is a micro-batch of all ranks; nothing is random.

    The last step's slots beyond the last video have no entry.
    """

    stream = StreamId.TEST
    clips_per_sample = 1

    def __init__(self, counts: Sequence[int], config: LabelledDataConfig, views: ViewsConfig, global_size: int) -> None:
        self.global_size, self.total = global_size, sum(counts)
        self._ends = np.cumsum(counts)
        self._choice = "spaced_segments" if config.sampling == "segments" else "spaced_clip"
        self._positions = tuple((float(i), float(views.clips)) for i in range(views.clips))

    @property
    def steps(self) -> int:
        return -(-self.total // self.global_size)

    def videos(self, step: int) -> int:
        """How many videos a step has, over all ranks."""
        return min(self.global_size, self.total - step * self.global_size)

    def entry(self, step: int, slot: int) -> LabelledEntry | None:
        """The video of (step, slot); None: there is none left, or the step has no such slot."""
        if slot >= self.videos(step):
            return None
        position = step * self.global_size + slot
        shard = int(np.searchsorted(self._ends, position, side="right"))
        member = position - int(self._ends[shard - 1]) if shard else position
        return LabelledEntry(step, slot, 0, shard, member, self._choice, self._positions)


# Which frames of a video make a clip. `random_clip` and `spaced_clip` follow the original's SampleFrames, the segments
# its UniformSampleFrames. A position is what a plan knows before the video is opened; it goes to the worker as JSON.


def random_clip(total: int, frames: int, stride: int, position: Position) -> np.ndarray:
    """Frame numbers of a clip: int64 (frames,), evenly `stride` apart, from a video of `total` frames.

    position: (start, phase) in [0,1). The possible starts are 0 .. total - frames*stride, and a shorter video is
    repeated. That leaves the last stride - 1 frames of the span unused, and so room for any `phase`.
    """
    start, phase = position
    starts = max(total - frames * stride + 1, 1)
    return (int(start * starts) + int(phase * stride) + stride * np.arange(frames)) % total


def clip_frames(start: float, total: int, frames: int, stride: int, phase: float = 0.0) -> np.ndarray:
    """`random_clip` of a start and a phase."""
    return random_clip(total, frames, stride, (start, phase))


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


def slots_of(micro_step: int, rank: int, world: int, micro_size: int) -> range:
    """The slots of the global batch that a rank processes in a micro-step."""
    first = (micro_step * world + rank) * micro_size
    return range(first, first + micro_size)


def fraction(rng: np.random.Generator) -> float:
    """A number of [0,1) that single precision holds exactly: rounding to it must not reach 1."""
    return int(rng.integers(1 << 24)) / (1 << 24)
