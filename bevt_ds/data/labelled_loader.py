"""The loader of labelled videos: training clips for ever, as loader.py has it for pretraining, and a test's views."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import torch

from bevt_ds.batch import LabelledBatch
from bevt_ds.config.schema import LabelledDataConfig, ViewsConfig
from bevt_ds.config.validate import check_holds_crop, check_labelled, check_views, micro_steps_of, need_shards
from bevt_ds.data.delivery import Aside, used_here
from bevt_ds.data.labelled_plan import LabelledPlan, ViewPlan
from bevt_ds.data.labelled_reader import ClipReader, LabelledShards, ViewReader
from bevt_ds.data.labelled_trial import require_decodable
from bevt_ds.data.labels import Classes, expected_count, read_classes
from bevt_ds.data.ledger import Ledger, Skips
from bevt_ds.data.loader import LEDGER, BackgroundLoader, Exchange, open_resources
from bevt_ds.data.pixels.cpu_pixels import single_core_threads
from bevt_ds.data.plan import StreamId, slots_of
from bevt_ds.data.reading.members import Shard
from bevt_ds.data.reading.storage import Storage
from bevt_ds.data.stream import Resources, Ticket
from bevt_ds.data.timing import StageTimes


class Batching(Protocol):
    """What the loader needs of a training configuration; FinetuneTrainConfig has it."""

    @property
    def seed(self) -> int: ...

    @property
    def streams(self) -> dict[str, tuple[int, int]]: ...


class LabelledReader:
    """Makes the micro-batches of one rank, as BatchReader does for pretraining."""

    def __init__(
        self,
        config: LabelledDataConfig,
        train: Batching,
        rank: int,
        world: int,
        device: torch.device | str,
        folder: Path | None,
        state: dict[str, Any] | None,
    ) -> None:
        check_labelled(config)
        need_shards("data.train", config.train)
        if config.val:
            check_holds_crop("data.short_side", config.short_side, config.size)
        self._rank, self._world, self._device = rank, world, torch.device(device)
        global_size, self._micro_size = train.streams["clips"]
        self.skips, self.times = Skips(state), StageTimes()
        ledger = Ledger(StreamId.LABELLED, folder and folder / LEDGER, self.skips)
        self.ledgers, self.decoder_choices = {ledger.stream: ledger}, {}
        with ExitStack() as resources:
            augmenters, shared = _open(config, self.times, resources)
            shards = shared.storage.shards(config.train, "video")
            self.val_shards = shared.storage.shards(config.val, "video") if config.val else []
            self.classes = read_classes(shards, self.val_shards, config.classes)
            data = LabelledShards.of(shards, self.classes)
            require_decodable({"data.train": shards, "data.val": self.val_shards}, config, shared.storage, shared.pool)
            self.fingerprint, self._pool = _fingerprint(shards), shared.pool
            plan = LabelledPlan(data.counts, config, train.seed, global_size)
            self._clips = ClipReader(plan, data, config, shared, augmenters, ledger, self._device)
            self._aside = Aside(self._device)
            self._resources = resources.pop_all()

    @property
    def videos(self) -> int:
        return self._clips.plan.order.total

    @property
    def worker_pids(self) -> list[int]:
        """The decode processes."""
        return self._pool.pids

    def begin(self, step: int, micro_step: int) -> Ticket:
        """Start on a micro-batch."""
        return self._clips.begin(step, slots_of(micro_step, self._rank, self._world, self._micro_size))

    def finish(self, ticket: Ticket) -> LabelledBatch:
        """Wait for a micro-batch that was begun."""
        with self._aside.making():
            return self._clips.finish(ticket).to(self._device, non_blocking=True)

    def close(self) -> None:
        """End the decode processes and threads."""
        self._resources.close()


class LabelledLoader(BackgroundLoader):
    """Iterates over the `LabelledBatch`es of this rank for ever: each step's micro-steps in order.

    The arguments are those of bevt_ds.data.loader.Loader. Every label, of training and validation, is checked at once,
    and a few videos of both are decoded.

    UserError: shards missing or unusable, labels that make no classes (see read_classes), videos of which none can be
    decoded (see require_decodable), sizes that do not divide.
    """

    def __init__(
        self,
        data: LabelledDataConfig,
        train: Batching,
        rank: int = 0,
        world: int = 1,
        start_step: int = 0,
        device: torch.device | str = "cpu",
        folder: Path | None = None,
        state: dict[str, Any] | None = None,
        exchange: Exchange | None = None,
    ) -> None:
        parts = micro_steps_of(train.streams, world)
        reader = LabelledReader(data, train, rank, world, device, folder, state)
        self.classes, self.videos, self.val_shards = reader.classes, reader.videos, reader.val_shards
        self.steps_an_epoch = max(self.videos // train.streams["clips"][0], 1)
        super().__init__(reader, parts, data, start_step, exchange)

    def __next__(self) -> LabelledBatch:
        batch = super().__next__()
        used_here(batch)
        return batch

    def _lanes(self) -> dict[str, int]:
        return {**super()._lanes(), "augment": self._config.threads}


def test_batches(
    data: LabelledDataConfig,
    views: ViewsConfig,
    rank: int = 0,
    world: int = 1,
    device: torch.device | str = "cpu",
    shards: Sequence[Shard] | None = None,
    classes: Classes | None = None,
    folder: Path | None = None,
) -> Iterator[LabelledBatch]:
    """This rank's batches of the validation videos, all views of each, the same at every call.

    Over all ranks every video comes once, in the order of the shards, and each rank gets as many batches. What fills
    up the last one, and videos that cannot be read, have the label -1 and the key "".

    shards: those of `data.val`, if they are known. classes: those the model was trained for; None: read from the data.
    folder: where bad samples are listed; None: nowhere. UserError: shards or labels that cannot be used.
    """
    check_labelled(data)
    check_views(data, views)
    if shards is None:
        need_shards("data.val", data.val)
    times = StageTimes()
    with ExitStack() as resources:
        augmenters, shared = _open(data, times, resources)
        shards = shared.storage.shards(data.val, "video") if shards is None else shards
        classes = classes or _classes_of(data, shards, shared.storage)
        labelled = LabelledShards.of(shards, classes)
        plan = ViewPlan(labelled.counts, data, views, views.micro_videos * world)
        ledger = Ledger(StreamId.TEST, folder and folder / LEDGER, Skips())
        reader = ViewReader(plan, labelled, data, views, shared, augmenters, ledger, torch.device(device))
        under_way: deque[Ticket] = deque()
        for step in range(plan.steps):
            under_way.append(reader.begin(step, slots_of(0, rank, world, views.micro_videos)))
            if len(under_way) > data.prefetch:
                yield reader.finish(under_way.popleft())
        while under_way:
            yield reader.finish(under_way.popleft())


def expected_videos(data: LabelledDataConfig, shards: Sequence[Shard]) -> int:
    """How many videos the whole validation set has, of which `shards` hold what there is; see expected_count."""
    return expected_count(shards, data.expected_val)


def _classes_of(data: LabelledDataConfig, val: Sequence[Shard], storage: Storage) -> Classes:
    train = storage.shards(data.train, "video") if data.train else []
    return read_classes(train, val, data.classes)


def _open(data: LabelledDataConfig, times: StageTimes, closing: ExitStack) -> tuple[ThreadPoolExecutor, Resources]:
    """Threads that augment, and what reads and decodes; `closing` ends the latter first, for which the former wait."""
    augmenters = closing.enter_context(single_core_threads(data.threads))
    return augmenters, open_resources(data, True, times, closing)


def _fingerprint(shards: Sequence[Shard]) -> str:
    """Names, sizes, checksums and labels of the samples; where the tars lie does not matter."""
    digest = hashlib.sha256()
    for shard in shards:
        digest.update(repr((shard.keys, shard.sizes, shard.crcs, shard.labels)).encode())
    return digest.hexdigest()
