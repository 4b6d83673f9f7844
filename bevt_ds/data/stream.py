"""One stream of micro-batches: plan -> bytes -> frames -> pixels and indices, as `Stream` values.

Each sample is worked on in one thread from its read to its pixels; the thread of the loader waits for them in order.
"""

from __future__ import annotations

import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import count
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bevt_ds.batch import IGNORE, Stream
from bevt_ds.config.samples import SamplingConfig
from bevt_ds.data.decoding.geometry import Crop
from bevt_ds.data.decoding.gpu_decoder import GpuDecoder
from bevt_ds.data.decoding.pool import DecodePool
from bevt_ds.data.ledger import Ledger, StageTimes
from bevt_ds.data.limits import BadSample, Limits
from bevt_ds.data.masks import masked_frames, row_index
from bevt_ds.data.pixels.cpu_pixels import ClipBatch, ClipPixels
from bevt_ds.data.plan import LabelledEntry, LabelledPlan, PlanEntry, StreamPlan, ViewPlan
from bevt_ds.data.reading.members import Member, Shard
from bevt_ds.data.reading.remote import redacted
from bevt_ds.data.reading.storage import Storage
from bevt_ds.data.tokens import KeptIds
from bevt_ds.rng import sample_key

Entry = PlanEntry | LabelledEntry
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Resources:
    """What the streams of a rank share."""

    storage: Storage  # in the threads of its executor samples are read, and all else is done with them
    pool: DecodePool | None  # decodes videos on the CPU, or looks at them before the GPU does
    times: StageTimes
    cores: threading.Semaphore  # as many samples are augmented at a time: data.threads
    gpu: GpuDecoder | None = None  # decodes videos where data.decoder lets it


@dataclass
class PendingBatch:
    """A micro-batch under way: its samples are being read and decoded.

    A sample fills `clips_per_sample` slots: samples[i] belongs to the slots and entries from i * clips_per_sample on.
    """

    step: int
    slots: range
    entries: list  # what the plan says of each slot
    samples: list[Future] = field(default_factory=list)
    masks: np.ndarray | None = None  # bool (B,T/2,h,w) or (B,h,w), in pretraining
    masked: np.ndarray | None = None  # bool (B,T) or (B,): the frames or images that the tokenizer needs a view of
    ids: np.ndarray | None = None  # int64 (B,T,h,w), of images T = 1, where they are kept: no view is needed then
    count: int = 0  # masked cells of the global batch
    pixels: ClipBatch | None = None  # where clips are written on a CPU
    number: int = 0  # of those that its reader has begun
    refusal: str = ""  # why DALI's decoder has refused it


def sample_name(member: Member) -> str:
    """`shard/key` of a sample."""
    return f"{PurePosixPath(redacted(member.path)).name}/{member.key}"


class SampleReader(ABC):
    """Reads the samples of one plan, with a substitute for each that cannot be used.

    `begin` starts the slow work. A subclass says in `_sample` what that is, and turns the samples into a micro-batch.
    stride: from one frame of a clip to the next.
    """

    def __init__(
        self,
        plan: StreamPlan | LabelledPlan | ViewPlan,
        shards: Sequence[Shard],
        config: SamplingConfig,
        shared: Resources,
        ledger: Ledger,
        stride: int,
    ) -> None:
        self.plan, self.shards, self.config = plan, shards, config
        self.shared, self.ledger, self.limits = shared, ledger, Limits.of(config)
        self._span, self._short = (config.frames - 1) * stride + 1, threading.Semaphore(1)
        self._window: tuple[int, int] | None = None
        self._remote, self._begun = any(shard.is_remote for shard in shards), count()

    def begin(self, step: int, slots: range) -> PendingBatch:
        """Start on a micro-batch."""
        if self._remote:
            self._fetch_ahead(step)
        entries = [e for slot in slots if (e := self.plan.entry(step, slot))]
        pending = PendingBatch(step, slots, entries, number=next(self._begun))
        self._prepare(pending)
        k = self.plan.clips_per_sample
        pending.samples = [self._start(pending, i, entries[i * k : (i + 1) * k]) for i in range(len(entries) // k)]
        return pending

    def _fetch_ahead(self, step: int) -> None:
        """Once a window of shards: fetch those that are remote, and the next window's."""
        window = self.plan.window_at(step)
        if window != self._window:
            self._window = window
            self.shared.storage.fetch_ahead(self.shards[i].path for i in self.plan.order.shards_in(*window))

    def _prepare(self, pending: PendingBatch) -> None:  # noqa: B027 - not every reader needs it
        """What a micro-batch needs before its samples are started."""

    def _start(self, pending: PendingBatch, i: int, group: list) -> Future:
        """Start on sample i. The future raises BadSample."""
        if (skips := self.ledger.skips).has_any and (reason := skips.reason(self.plan.stream, group[0])):
            skipped: Future = Future()
            skipped.set_exception(BadSample(reason, transient=True))
            return skipped
        return self.shared.storage.executor.submit(self._sample, pending, i, group)

    @abstractmethod
    def _sample(self, pending: PendingBatch, i: int, group: list) -> Any:
        """In a thread of its own: read sample i, whose slots have the entries `group`, and make what is needed of it.

        BadSample: that is not possible.
        """

    def _read(self, entry: Entry) -> bytes:
        with self.shared.times.measured("storage"):
            return self.shared.storage.read(self._member(entry))

    def _member(self, entry: Entry) -> Member:
        return self.shards[entry.shard].member(entry.member)

    def _note(self, entry: Entry, reply: Mapping[str, Any]) -> None:
        """Count what a worker has done for a video."""
        self.shared.times.add("demux", reply["demux"])
        self.shared.times.add("decode", reply["decode"], reply["decoded"])
        if reply["total"] < self._span:
            self._note_short(entry, reply["total"])

    def _note_short(self, entry: Entry, frames: int) -> None:
        """Say once that there is a video shorter than a clip, whose frames are then repeated."""
        if self._short.acquire(blocking=False):
            log.warning(
                "%s has %d frames, and a clip spans %d (data.frames=%d, %d apart): frames of such videos are repeated",
                *(sample_name(self._member(entry)), frames, self._span, self.config.frames),
                (self._span - 1) // max(self.config.frames - 1, 1),
            )

    def _settled(self, pending: PendingBatch, i: int) -> Any:
        """Wait for sample i; while it is bad, put the plan's next substitute in its place."""
        while True:
            try:
                return pending.samples[i].result()
            except BadSample as bad:
                self._substitute(pending, i, bad)

    def _group(self, pending: PendingBatch, i: int) -> list:
        k = self.plan.clips_per_sample
        return pending.entries[i * k : (i + 1) * k]

    def _substitute(self, pending: PendingBatch, i: int, bad: BadSample) -> None:
        rejected = self._group(pending, i)
        group = [self.plan.entry(e.step, e.slot, e.attempt + 1) for e in rejected]
        self.ledger.reject(rejected[0], self._member(rejected[0]), bad, self._member(group[0]))
        pending.entries[i * len(group) : (i + 1) * len(group)] = group
        pending.samples[i] = self._start(pending, i, group)


class StreamReader(SampleReader):
    """Reads the micro-batches of one stream of pretraining. kept: the ids of each shard's crops, if there are any."""

    plan: StreamPlan

    def __init__(self, *arguments: Any, kept: Sequence[KeptIds] = (), **more: Any) -> None:
        super().__init__(*arguments, **more)
        self.kept = kept

    def _prepare(self, pending: PendingBatch) -> None:
        masks = self.plan.masks(pending.step)
        pending.masks = masks[pending.slots.start : pending.slots.stop].copy()
        pending.masked = masked_frames(pending.masks, self.plan.frames_per_cell)
        pending.count = int(masks.sum()) * self.plan.frames_per_cell
        if self.kept:
            pending.ids = np.empty((len(pending.slots), *self.kept[0].shape[2:]), np.int64)
            pending.masked[:] = False

    def _take_ids(self, pending: PendingBatch, i: int, group: list[PlanEntry]) -> None:
        """Put the ids of sample i that are kept into the micro-batch. BadSample: they cannot be had."""
        with self.shared.times.measured("storage"):
            for j, entry in enumerate(group):
                kept = self.kept[entry.shard]
                pending.ids[i * len(group) + j] = self.shared.storage.ask(
                    kept.read, entry.member, entry.crop_number, place=kept.path
                )

    def finish(self, pending: PendingBatch) -> Stream:
        """The micro-batch: pixels on the device, index tensors on the host."""
        pixels, view = self._pixels(pending)
        index = row_index(pending.masks, self.plan.frames_per_cell)
        keys = [sample_key(self.plan.seed, self.plan.stream, pending.step, slot) for slot in pending.slots]
        return Stream(
            pixels=pixels,
            view=view,
            mask=torch.from_numpy(pending.masks),
            rows=torch.from_numpy(index.rows),
            cells=torch.from_numpy(index.cells),
            token_rows=torch.from_numpy(index.token_rows),
            sample_keys=torch.tensor(keys, dtype=torch.int64),
            count=pending.count,
            targets=None if pending.ids is None else _targets(pending.ids, index.rows),
            keys=tuple(sample_name(self._member(entry)) for entry in pending.entries),
        )

    @abstractmethod
    def _pixels(self, pending: PendingBatch) -> tuple[Tensor, Tensor]:
        """Pixels and token view, with a substitute for each sample that cannot be used."""


class ClipReader(StreamReader):
    """Clips on a CPU: the thread of a video writes its clips into the micro-batch's memory."""

    def __init__(self, *arguments: Any, pixels: ClipPixels, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self.pixels, self._lock = pixels, threading.Lock()

    def _sample(self, pending: PendingBatch, i: int, group: list[PlanEntry]) -> None:
        if pending.ids is not None:
            self._take_ids(pending, i, group)
        data, config, shared = self._read(group[0]), self.config, self.shared
        starts = [(entry.start, entry.phase) for entry in group]
        crops = [Crop(entry.short_side, *entry.crop, config.size) for entry in group]
        with (
            shared.pool.clips(data, starts, config.frames, config.stride, crops=crops) as decoded,
            shared.times.measured("decode"),  # for that long the worker cannot decode
        ):
            clips = [
                self.pixels.crop(decoded.frames, places, crop, f"crop {j}")
                for j, (places, crop) in enumerate(zip(decoded.places, crops, strict=True))
            ]
        self._note(group[0], decoded.reply)
        with shared.cores, shared.times.measured("augment"):
            with self._lock:  # as late as can be: memory that was used a moment ago is in the cache
                pending.pixels = pending.pixels or self.pixels.batch(pending.masked)
            for j, (entry, clip) in enumerate(zip(group, clips, strict=True)):
                self.pixels.fill(pending.pixels, i * len(group) + j, clip, entry.flip)

    def _pixels(self, pending: PendingBatch) -> tuple[Tensor, Tensor]:
        for i in range(len(pending.samples)):
            self._settled(pending, i)
            self.ledger.accept(1)
        return pending.pixels.pixels, pending.pixels.view


def _targets(ids: np.ndarray, rows: np.ndarray) -> Tensor:
    """The ids of the masked positions, IGNORE for padding: int64 (R,). ids: int64 (B,T,h,w). rows: see Stream."""
    return torch.from_numpy(np.where(rows < 0, IGNORE, ids.reshape(-1)[rows]))
