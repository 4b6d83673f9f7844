"""One stream of micro-batches: plan -> bytes or frames -> pictures and indices, as `Stream` values."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bevt_ds.batch import Stream
from bevt_ds.config import DataConfig
from bevt_ds.data.decode_pool import DecodePool
from bevt_ds.data.images import check_image
from bevt_ds.data.index import BadSample, Member, Shard, read_member
from bevt_ds.data.ledger import Ledger
from bevt_ds.data.masks import row_index
from bevt_ds.data.pipeline import PixelPipeline
from bevt_ds.data.plan import PlanEntry, StreamPlan, clip_frames


@dataclass
class Ticket:
    """A micro-batch under way: its samples are being read and decoded."""

    step: int
    slots: range
    entries: list[PlanEntry]
    payloads: list[Future]


class StreamReader:
    """Reads the micro-batches of one plan. `begin` starts the slow work, `finish` waits for it.

    pool decodes videos on the CPU or counts their frames for the GPU; threads read files.
    """

    def __init__(
        self,
        plan: StreamPlan,
        shards: Sequence[Shard],
        config: DataConfig,
        pixels: PixelPipeline,
        threads: ThreadPoolExecutor,
        pool: DecodePool | None,
        ledger: Ledger,
    ) -> None:
        self.plan, self.shards, self.config, self.pixels = plan, shards, config, pixels
        self.threads, self.pool, self.ledger = threads, pool, ledger

    def begin(self, step: int, slots: range) -> Ticket:
        entries = [self.plan.entry(step, slot) for slot in slots]
        return Ticket(step, slots, entries, [self._fetch(entry) for entry in entries])

    def finish(self, ticket: Ticket) -> Stream:
        """The micro-batch: pictures on the pipeline's device, index tensors on the host."""
        pixels, view = self._pictures(ticket)
        masks = self.plan.masks(ticket.step)[ticket.slots.start : ticket.slots.stop]
        index = row_index(masks, self.plan.frames_per_cell)
        keys = [self.plan.key(ticket.step, slot) for slot in ticket.slots]
        return Stream(
            pixels=pixels,
            view=view,
            mask=torch.from_numpy(masks.copy()),
            rows=torch.from_numpy(index.rows),
            frames=torch.from_numpy(index.frames),
            token_rows=torch.from_numpy(index.token_rows),
            sample_keys=torch.tensor(keys, dtype=torch.int64),
            count=self.plan.masked_cells(ticket.step),
        )

    def _member(self, entry: PlanEntry) -> Member:
        return self.shards[entry.shard].member(entry.member)

    def _fetch(self, entry: PlanEntry) -> Future:
        """What the pipeline needs of a sample; the future raises BadSample if it is unusable."""
        member = self._member(entry)
        if self.plan.stream.kind == "image":
            return self.threads.submit(_read_image, member, self.config.max_pixels)
        clip = (entry.start, self.config.frames, self.config.stride)
        if self.pixels.decode_on_gpu:
            return self.threads.submit(_read_video, self.pool, member, clip)
        return self.pool.clip(member, *clip)

    def _pictures(self, ticket: Ticket) -> tuple[Tensor, Tensor]:
        """Pixels and token view, with a substitute for each sample that cannot be used."""
        for i in range(len(ticket.entries)):
            self._settle(ticket, i)
        payloads = [payload.result() for payload in ticket.payloads]
        try:
            pictures = self.pixels.run(payloads, ticket.entries)
        except BadSample:
            pictures = self._one_by_one(ticket)
        for _ in ticket.entries:
            self.ledger.accept()
        return pictures

    def _settle(self, ticket: Ticket, i: int) -> None:
        """Wait for sample i; while it is bad, put the plan's next substitute in its place."""
        while True:
            try:
                ticket.payloads[i].result()
                return
            except BadSample as bad:
                self._substitute(ticket, i, str(bad))

    def _substitute(self, ticket: Ticket, i: int, reason: str) -> None:
        entry = ticket.entries[i]
        self.ledger.reject(self.plan.stream, entry, self._member(entry), reason)
        ticket.entries[i] = self.plan.entry(entry.step, entry.slot, entry.attempt + 1)
        ticket.payloads[i] = self._fetch(ticket.entries[i])

    def _one_by_one(self, ticket: Ticket) -> tuple[Tensor, Tensor]:
        """DALI refused the batch without naming the culprit: run each sample alone."""
        pictures = [self._alone(ticket, i) for i in range(len(ticket.entries))]
        return tuple(torch.cat(parts) for parts in zip(*pictures, strict=True))

    def _alone(self, ticket: Ticket, i: int) -> tuple[Tensor, Tensor]:
        while True:
            self._settle(ticket, i)
            try:
                return self.pixels.run([ticket.payloads[i].result()], [ticket.entries[i]])
            except BadSample as bad:
                self._substitute(ticket, i, str(bad))


def _read_image(member: Member, max_pixels: int) -> bytes:
    data = read_member(member)
    check_image(data, max_pixels)
    return data


def _read_video(pool: DecodePool, member: Member, clip: tuple[float, int, int]) -> Any:
    """The whole file, and the clip's frame numbers, which need the file's number of frames."""
    start, frames, stride = clip
    numbers = clip_frames(start, pool.frame_count(member).result(), frames, stride)
    return read_member(member), numbers
