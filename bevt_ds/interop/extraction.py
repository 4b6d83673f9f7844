"""Features of all samples of shards, in files of a fixed number of samples.

Samples are numbered in the order of the shards. File i has the samples from i * chunk on, whoever computes it: rank r
of n takes every n-th. A file is written aside and renamed, so that one that is there is whole and is never computed
again. Nothing is said from rank to rank.

Letters: B samples, V views (clips * crops, crops change fastest), T frames, T' H' W' tokens, C channels.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bevt_ds.batch import DTYPES
from bevt_ds.config.features import FeaturesRunConfig
from bevt_ds.data.labelled_reader import LabelledShards
from bevt_ds.data.ledger import StageTimes
from bevt_ds.data.open_stream import open_resources
from bevt_ds.data.plan import ViewPlan
from bevt_ds.data.reading.members import Shard
from bevt_ds.data.stream import PendingBatch, Resources, sample_name
from bevt_ds.data.view_reader import UnlabelledImages, UnlabelledViews
from bevt_ds.disk import make_folder
from bevt_ds.eval.multi_view import check_device, printing_once
from bevt_ds.interop.feature_files import (
    Chunk,
    chunk_path,
    manifest_of,
    remove_leftovers,
    require_same_manifest,
    write_chunk,
)
from bevt_ds.model.frozen_swin import FrozenModel, load_frozen
from bevt_ds.progress import progress_bar
from bevt_ds.runtime.distributed import Ranks, ranks_of


def extract(config: FeaturesRunConfig) -> int:
    """Write what is missing of this rank's files; returns the exit code.

    Raises:
        UserError: weights or shards that cannot be used, or `output_dir` has features of others.
    """
    ranks, folder = ranks_of(os.environ), Path(config.output_dir)
    check_device(config.precision, config.kernels, ranks)
    with printing_once(ranks):
        model = load_frozen(config.weights, config.kernels, DTYPES[config.precision]).to(ranks.device)
    with ExitStack() as resources:
        shared = open_resources(config.data, config.features.kind == "video", StageTimes(), resources)
        shards = shared.storage.shards(config.data.val, config.features.kind)
        make_folder(folder)
        require_same_manifest(folder, manifest_of(config, shards, model))
        source = Source(config, shards, shared, ranks)
        chunks = [i for i in range(source.plan.steps) if i % ranks.world == ranks.rank]
        missing = [i for i in chunks if not chunk_path(folder, config.features, i).exists()]
        unreadable = 0
        for number, rows in source.chunks(missing, model):
            unreadable += len(rows.unreadable)
            write_chunk(folder, config.features, number, rows)
    print(closing_lines(config, ranks, folder, source.plan, len(missing), unreadable), flush=True)
    return 0


@dataclass
class Source:
    """The samples of shards as micro-batches of views, prepared ahead."""

    config: FeaturesRunConfig
    shards: Sequence[Shard]
    shared: Resources
    ranks: Ranks

    def __post_init__(self) -> None:
        config, chunk = self.config, self.config.features.chunk
        unlabelled = LabelledShards(self.shards, [np.zeros(len(shard), np.int64) for shard in self.shards])
        self.plan = ViewPlan(unlabelled.counts, config.data, config.views, chunk)
        kind = UnlabelledViews if config.features.kind == "video" else UnlabelledImages
        parts = (self.plan, unlabelled, config.data, self.shared)
        self.reader = kind(*parts, device=self.ranks.device, views=config.views)

    def chunks(self, numbers: Sequence[int], model: FrozenModel) -> Iterator[tuple[int, Chunk]]:
        """Each of the chunks with these numbers, with a progress bar on rank 0."""
        last = {number: self._batches(number)[-1] for number in numbers}
        work = [(number, slots) for number in numbers for slots in self._batches(number)]
        who = f"features, rank 0 of {self.ranks.world}" if self.ranks.world > 1 else "features"
        options = {"desc": who, "total": len(work), "unit": "batch", "leave": None, "disable": not self.ranks.is_main}
        parts: list[Chunk] = []
        for pending in progress_bar(self._ahead(work), **options):
            parts.append(self._encoded(pending, model))
            if pending.slots == last[pending.step]:
                yield pending.step, Chunk.joined(parts)
                parts = []

    def _batches(self, number: int) -> list[range]:
        """The slots of each micro-batch of a chunk. The last is padded, so that every one has the same rounding."""
        size, samples = self.config.views.micro_videos, self.plan.videos(number)
        return [range(first, first + size) for first in range(0, samples, size)]

    def _ahead(self, work: Sequence[tuple[int, range]]) -> Iterator[PendingBatch]:
        under_way: deque[PendingBatch] = deque()
        for number, slots in work:
            under_way.append(self.reader.begin(number, slots))
            if len(under_way) > self.config.data.prefetch:
                yield under_way.popleft()
        yield from under_way

    @torch.no_grad()
    def _encoded(self, pending: PendingBatch, model: FrozenModel) -> Chunk:
        """The features of a micro-batch's readable samples, and what is wrong with the others."""
        batch = self.reader.finish(pending)
        pixels, readable = batch.pixels, (batch.labels >= 0).nonzero()[:, 0].tolist()
        if self.config.features.kind == "image":
            pixels = pixels.squeeze(3)  # of time
        values = self._kept(model, pixels.flatten(0, 1)).unflatten(0, pixels.shape[:2]).cpu()
        entries = [pending.entries[i] for i in readable]
        unreadable = [entry for i, entry in enumerate(pending.entries) if i not in readable]
        name = lambda entry: sample_name(self.shards[entry.shard].member(entry.member))  # noqa: E731
        return Chunk(
            values[readable].to(getattr(torch, self.config.features.dtype)),
            numbers=[entry.step * self.plan.global_size + entry.slot for entry in entries],
            keys=[name(entry) for entry in entries],
            labels=[self.shards[entry.shard].labels[entry.member] for entry in entries],
            seconds=[self.reader.seconds.pop((entry.step, entry.slot), []) for entry in entries],
            unreadable={name(entry): self.reader.ledger.reasons[entry.step, entry.slot] for entry in unreadable},
        )

    def _kept(self, model: FrozenModel, pixels: Tensor) -> Tensor:
        """Clips or images (B,...) -> (B,C), or dense (B,T',H',W',C), of images (B,H',W',C)."""
        if not self.config.features.dense:
            return model.pooled(pixels)
        tokens = model.tokens(pixels).float()
        return tokens if pixels.ndim == 5 else tokens.squeeze(1)


def closing_lines(
    config: FeaturesRunConfig, ranks: Ranks, folder: Path, plan: ViewPlan, written: int, unreadable: int
) -> str:
    """What this rank did, and whether all files are there now."""
    there = sum(chunk_path(folder, config.features, i).exists() for i in range(plan.steps))
    who = f"rank {ranks.rank}: " if ranks.world > 1 else ""
    lines = [f"{who}wrote {written} of the {plan.steps} files of {plan.total} samples; {there} are there"]
    if unreadable:
        lines.append(f"{who}{unreadable} samples cannot be read: `unreadable` of each file's metadata says why")
    if there == plan.steps:
        remove_leftovers(folder)
        lines.append(f"{who}complete: {folder}/")
    return "\n".join(lines)
