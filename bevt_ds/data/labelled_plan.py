"""The sample plan of labelled videos, as plan.py has it for pretraining: pure functions that know no rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bevt_ds.config.schema import LabelledDataConfig, ViewsConfig
from bevt_ds.data.plan import SampleOrder, StreamId, fraction
from bevt_ds.rng import Use, generator, sample_key


@dataclass(frozen=True)
class LabelledEntry:
    """One video of one step, and where in it the clips lie."""

    step: int
    slot: int
    attempt: int  # 0: the planned sample; j: the j-th substitute
    shard: int
    member: int
    choice: str  # of frame_choice.CHOICES
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

    def key(self, step: int, slot: int) -> int:
        """The sample's key for the model's own randomness."""
        return sample_key(self.seed, self.stream, step, slot)

    def generator(self, use: Use, step: int, slot: int) -> np.random.Generator:
        """Random numbers of a slot."""
        return generator(self.seed, use, self.stream, step, slot)


class ViewPlan:
    """Testing: every video once, in the order of the shards. A step is a micro-batch of all ranks; nothing is random.

    The last step's slots beyond the last video have no entry.
    """

    stream = StreamId.TEST

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
        """The video of (step, slot); None: there is none left."""
        position = step * self.global_size + slot
        if position >= self.total:
            return None
        shard = int(np.searchsorted(self._ends, position, side="right"))
        member = position - int(self._ends[shard - 1]) if shard else position
        return LabelledEntry(step, slot, 0, shard, member, self._choice, self._positions)
