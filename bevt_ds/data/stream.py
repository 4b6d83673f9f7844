"""One stream of micro-batches: plan -> bytes or frames -> pictures and indices, as `Stream` values."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bevt_ds.batch import Stream
from bevt_ds.config.schema import DataConfig, SamplingConfig
from bevt_ds.data.decoding.images import check_image
from bevt_ds.data.decoding.pool import DecodePool, Load
from bevt_ds.data.decoding.video import fits_gpu
from bevt_ds.data.ledger import Ledger
from bevt_ds.data.limits import BadSample, Limits
from bevt_ds.data.masks import masked_frames, row_index
from bevt_ds.data.pixels.cpu_pixels import ClipPixels
from bevt_ds.data.pixels.pipeline import PixelPipeline
from bevt_ds.data.plan import PlanEntry, StreamPlan, clip_frames
from bevt_ds.data.reading.members import Member, Shard
from bevt_ds.data.reading.remote import redacted
from bevt_ds.data.reading.storage import Storage
from bevt_ds.data.timing import StageTimes

Pixels = PixelPipeline | ClipPixels
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Resources:
    """What the streams of a rank share."""

    storage: Storage
    threads: ThreadPoolExecutor  # data.readers of them
    pool: DecodePool | None  # decodes videos on the CPU, or looks at them before the GPU does
    times: StageTimes

    def reading(self, load: Load) -> Load:
        """`load`, begun in one of the threads that read: the pool's workers decode what has been read meanwhile."""
        return self.threads.submit(load).result


@dataclass
class Ticket:
    """A micro-batch under way: its samples are being read and decoded.

    A sample fills `clips_per_sample` slots: payloads[i] belongs to the slots and entries from i * clips_per_sample on.
    """

    step: int
    slots: range
    entries: list  # what the plan says of each slot
    payloads: list[Future]


class ShortVideos:
    """Says once that there is a video shorter than a clip, whose frames are then repeated."""

    def __init__(self, frames: int, stride: int) -> None:
        self._frames, self._stride, self._said = frames, stride, False

    def look_at(self, name: str, frames: int) -> None:
        """name: of a video with that many frames."""
        span = (self._frames - 1) * self._stride + 1
        if frames < span and not self._said:
            self._said = True
            log.warning(
                "%s has %d frames, and a clip spans %d (data.frames=%d, %d apart): frames of such videos are repeated",
                *(name, frames, span, self._frames, self._stride),
            )


def sample_name(member: Member) -> str:
    """`shard/key` of a sample."""
    return f"{PurePosixPath(redacted(member.path)).name}/{member.key}"


class SampleReader:
    """Reads the samples of one plan, with a substitute for each that cannot be used.

    `begin` starts the slow work. A subclass says in `_load` what that is, and turns the samples into a micro-batch.
    stride: from one frame of a clip to the next.
    """

    def __init__(
        self,
        plan: Any,
        shards: Sequence[Shard],
        config: SamplingConfig,
        shared: Resources,
        ledger: Ledger,
        stride: int,
    ) -> None:
        self.plan, self.shards, self.config = plan, shards, config
        self.shared, self.ledger, self.limits = shared, ledger, Limits.of(config)
        self.short = ShortVideos(config.frames, stride)
        self._window: tuple[int, int] | None = None

    def begin(self, step: int, slots: range) -> Ticket:
        self._fetch_ahead(step)
        entries = [self.plan.entry(step, slot) for slot in slots]
        k = self.plan.clips_per_sample
        payloads = [self._fetch(entries[i : i + k]) for i in range(0, len(entries), k)]
        return Ticket(step, slots, entries, payloads)

    def _fetch_ahead(self, step: int) -> None:
        """Once a window of shards: fetch those that are remote, and the next window's."""
        window = self.plan.window_at(step)
        if window != self._window:
            self._window = window
            self.shared.storage.fetch_ahead(self.shards[i].path for i in self.plan.order.shards_in(*window))

    def _member(self, entry: PlanEntry) -> Member:
        return self.shards[entry.shard].member(entry.member)

    def _fetch(self, group: list) -> Future:
        """The group's sample on its way: a future of what `_unpacked` takes, which raises BadSample."""
        first = group[0]
        if reason := self.ledger.skips.reason(self.plan.stream, first):
            return _failed(BadSample(reason, transient=True))
        return self._load(partial(self.shared.storage.read, self._member(first), self.shared.times), group)

    def _load(self, load: Load, group: list) -> Future:
        """Start on a sample; `load` reads its bytes."""
        raise NotImplementedError

    def _unpacked(self, payload, entry) -> list:
        """A future's result as a list with an item a clip; what the worker says of the video is noted."""
        if isinstance(payload, list):
            return payload
        reply, clips = payload
        self.short.look_at(sample_name(self._member(entry)), reply["total"])
        for stage in ("demux", "decode"):
            self.shared.times.add(stage, reply[stage])
        self.shared.times.add_frames(reply["decoded"])
        return clips

    def _settled(self, ticket: Ticket, i: int) -> list:
        """Wait for sample i; while it is bad, put the plan's next substitute in its place."""
        while True:
            try:
                return self._unpacked(ticket.payloads[i].result(), ticket.entries[self._slots(i)][0])
            except BadSample as bad:
                self._substitute(ticket, i, bad)

    def _slots(self, i: int) -> slice:
        k = self.plan.clips_per_sample
        return slice(i * k, (i + 1) * k)

    def _substitute(self, ticket: Ticket, i: int, bad: BadSample) -> None:
        rejected = ticket.entries[self._slots(i)]
        group = [self.plan.entry(e.step, e.slot, e.attempt + 1) for e in rejected]
        self.ledger.reject(rejected[0], self._member(rejected[0]), bad, self._member(group[0]))
        ticket.entries[self._slots(i)] = group
        ticket.payloads[i] = self._fetch(group)


class StreamReader(SampleReader):
    """Reads the micro-batches of one stream of pretraining."""

    def __init__(
        self,
        plan: StreamPlan,
        shards: Sequence[Shard],
        config: DataConfig,
        pixels: Pixels,
        shared: Resources,
        ledger: Ledger,
    ) -> None:
        super().__init__(plan, shards, config, shared, ledger, config.stride)
        self.pixels = pixels

    def finish(self, ticket: Ticket) -> Stream:
        """The micro-batch: pictures on the pipeline's device, index tensors on the host."""
        masks = self.plan.masks(ticket.step)[ticket.slots.start : ticket.slots.stop]
        index = row_index(masks, self.plan.frames_per_cell)
        pixels, view = self._pictures(ticket, masked_frames(masks, self.plan.frames_per_cell))
        keys = [self.plan.key(ticket.step, slot) for slot in ticket.slots]
        return Stream(
            pixels=pixels,
            view=view,
            mask=torch.from_numpy(masks.copy()),
            rows=torch.from_numpy(index.rows),
            cells=torch.from_numpy(index.cells),
            token_rows=torch.from_numpy(index.token_rows),
            sample_keys=torch.tensor(keys, dtype=torch.int64),
            count=self.plan.masked_cells(ticket.step),
        )

    def _load(self, load: Load, group: list[PlanEntry]) -> Future:
        """What the pipeline needs of a sample, a list with an item a clip."""
        if self.plan.stream.kind == "image":
            return self.shared.threads.submit(self._read_image, load)
        if self.pixels.dali_decoder:
            return self.shared.threads.submit(self._read_videos, load, group)
        return self._decode(self.shared.reading(load), group)

    def _decode(self, load: Load, group: list[PlanEntry]) -> Future:
        starts = [(entry.start, entry.phase) for entry in group]
        receive, crops = partial(self.pixels.received, entries=group), self.pixels.crops(group)
        return self.shared.pool.clips(
            load, starts, self.config.frames, self.config.stride, receive=receive, crops=crops
        )

    def _read_image(self, load: Load) -> list[bytes]:
        data = load()
        check_image(data, self.limits)
        return [data]

    def _read_videos(self, load: Load, group: list[PlanEntry]) -> Any:
        """The whole file and each clip's frame numbers, once a worker has looked at it and decoded a frame.

        What is not for DALI's decoder is decoded by the worker.
        """
        data = load()
        reply, _ = self.shared.pool.describe(lambda: data).result()
        self.short.look_at(sample_name(self._member(group[0])), reply["frames"])
        if not fits_gpu(reply):
            return self._decode(lambda: data, group).result()
        frames, stride = self.config.frames, self.config.stride
        return [(data, clip_frames(e.start, reply["frames"], frames, stride, e.phase)) for e in group]

    def _pictures(self, ticket: Ticket, masked: np.ndarray) -> tuple[Tensor, Tensor]:
        """Pixels and token view, with a substitute for each sample that cannot be used. masked: `masked_frames`."""
        samples = []
        for i in range(len(ticket.payloads)):
            samples.append(self._settled(ticket, i))
            self.ledger.end_row()
        try:
            pictures = self._run([clip for clips in samples for clip in clips], ticket.entries, masked)
        except BadSample:
            pictures = self._one_by_one(ticket, masked)
        self.ledger.accept(len(ticket.payloads))
        return pictures

    def _run(self, clips: list, entries: list[PlanEntry], masked: np.ndarray) -> tuple[Tensor, Tensor]:
        """Through the graph; clips that arrive as frames, though DALI decodes, go through one without a decoder."""
        pipelines = [self._pipeline(clip) for clip in clips]
        if all(pipeline is pipelines[0] for pipeline in pipelines):
            return pipelines[0].run(clips, entries, masked)
        samples = zip(pipelines, clips, entries, masked, strict=True)
        return _joined([pixels.run([clip], [entry], frames[None]) for pixels, clip, entry, frames in samples])

    def _pipeline(self, clip: Any) -> Pixels:
        return self._frames_pixels if self.pixels.dali_decoder and isinstance(clip, np.ndarray) else self.pixels

    @cached_property
    def _frames_pixels(self) -> PixelPipeline:
        return self.pixels.without_decoder()

    def _one_by_one(self, ticket: Ticket, masked: np.ndarray) -> tuple[Tensor, Tensor]:
        """DALI refused the batch without naming the culprit: run each sample alone."""
        return _joined([self._alone(ticket, i, masked[self._slots(i)]) for i in range(len(ticket.payloads))])

    def _alone(self, ticket: Ticket, i: int, masked: np.ndarray) -> tuple[Tensor, Tensor]:
        while True:
            clips = self._settled(ticket, i)
            try:
                pictures = self._run(clips, ticket.entries[self._slots(i)], masked)
                self.ledger.end_row()
                return pictures
            except BadSample as bad:
                if isinstance(clips[0], tuple):  # a file: what DALI's decoder does not take, a worker's may
                    (data, _), group = clips[0], ticket.entries[self._slots(i)]
                    log.warning("%s goes to a worker: %s", sample_name(self._member(group[0])), bad)
                    ticket.payloads[i] = self._decode(lambda data=data: data, group)
                else:
                    self._substitute(ticket, i, bad)


def _joined(pictures: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """One micro-batch of several. On a GPU it is made when this returns, for the parts' memory is free then."""
    joined = tuple(torch.cat(parts) for parts in zip(*pictures, strict=True))
    if joined[0].is_cuda:
        torch.cuda.current_stream(joined[0].device).synchronize()
    return joined


def _failed(error: BadSample) -> Future:
    future: Future = Future()
    future.set_exception(error)
    return future
