"""The loader of labelled videos: training clips for ever, as loader.py has it for pretraining, and a test's views."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import torch

from bevt_ds.batch import LabelledBatch
from bevt_ds.config.samples import LabelledDataConfig, ViewsConfig
from bevt_ds.config.validate import check_holds_crop, check_labelled, check_views, micro_steps_of, need_shards
from bevt_ds.data.decoding.pool import DecodePool
from bevt_ds.data.labelled_reader import LabelledShards, TrainingReader, ViewReader
from bevt_ds.data.labels import Classes, read_classes
from bevt_ds.data.ledger import Ledger, Skips, StageTimes
from bevt_ds.data.limits import BadSample
from bevt_ds.data.loader import ALONE, LEDGER, BackgroundLoader, RankReader, Ranks
from bevt_ds.data.open_stream import open_resources
from bevt_ds.data.plan import LabelledPlan, StreamId, ViewPlan, slots_of
from bevt_ds.data.reading.members import Shard
from bevt_ds.data.reading.remote import redacted
from bevt_ds.data.reading.storage import Storage
from bevt_ds.data.stream import PendingBatch, Resources
from bevt_ds.errors import UserError

TRIED = 8  # videos of a set that are tried before the start, at most
ONE_VIEW = ViewsConfig(clips=1, crops=1)


class Batching(Protocol):
    """What the loader needs of a training configuration; FinetuneTrainConfig has it."""

    @property
    def seed(self) -> int: ...

    @property
    def streams(self) -> dict[str, tuple[int, int]]: ...


class LabelledBatchReader(RankReader):
    """Makes the micro-batches of labelled videos. The arguments: see RankReader."""

    def __init__(
        self,
        config: LabelledDataConfig,
        train: Batching,
        ranks: Ranks,
        device: torch.device | str,
        folder: Path | None,
        state: dict[str, Any] | None,
    ) -> None:
        check_labelled(config)
        need_shards("data.train", config.train)
        if config.val:
            check_holds_crop("data.short_side", config.short_side, config.size)
        self._config, self._seed = config, train.seed
        self._global_size, micro_size = train.streams["clips"]
        super().__init__(config, {StreamId.LABELLED: micro_size}, ranks, device, folder, state)

    def _open(self, shared: Resources) -> dict[StreamId, TrainingReader]:
        config, storage = self._config, shared.storage
        shards = storage.shards(config.train, "video")
        self.val_shards = storage.shards(config.val, "video") if config.val else []
        self.classes = read_classes(shards, self.val_shards, config.classes)
        data = LabelledShards.of(shards, self.classes)
        require_decodable({"data.train": shards, "data.val": self.val_shards}, config, storage, shared.pool)
        self.fingerprint, self.videos = _fingerprint(shards), sum(data.counts)
        plan = LabelledPlan(data.counts, config, self._seed, self._global_size)
        ledger = self.ledgers[StreamId.LABELLED]
        return {StreamId.LABELLED: TrainingReader(plan, data, config, shared, ledger, self._device)}

    def _joined(self, parts: dict[StreamId, LabelledBatch]) -> LabelledBatch:
        return parts[StreamId.LABELLED]


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
        ranks: Ranks = ALONE,
        start_step: int = 0,
        device: torch.device | str = "cpu",
        folder: Path | None = None,
        state: dict[str, Any] | None = None,
    ) -> None:
        parts = micro_steps_of(train.streams, ranks.world)
        reader = LabelledBatchReader(data, train, ranks, device, folder, state)
        self.classes, self.videos, self.val_shards = reader.classes, reader.videos, reader.val_shards
        self.steps_an_epoch = max(self.videos // train.streams["clips"][0], 1)
        super().__init__(reader, parts, data, ranks, start_step)


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
    with ExitStack() as resources:
        shared = open_resources(data, True, StageTimes(), resources)
        shards = shared.storage.shards(data.val, "video") if shards is None else shards
        if classes is None:
            train = shared.storage.shards(data.train, "video") if data.train else []
            classes = read_classes(train, shards, data.classes)
        labelled = LabelledShards.of(shards, classes)
        plan = ViewPlan(labelled.counts, data, views, views.micro_videos * world)
        ledger = Ledger(StreamId.TEST, folder and folder / LEDGER, Skips())
        reader = ViewReader(plan, labelled, data, shared, ledger, torch.device(device), views=views)
        under_way: deque[PendingBatch] = deque()
        for step in range(plan.steps):
            under_way.append(reader.begin(step, slots_of(0, rank, world, views.micro_videos)))
            if len(under_way) > data.prefetch:
                yield reader.finish(under_way.popleft())
        while under_way:
            yield reader.finish(under_way.popleft())


def _fingerprint(shards: Sequence[Shard]) -> str:
    """Names, sizes, checksums and labels of the samples; where the tars lie does not matter."""
    digest = hashlib.sha256()
    for shard in shards:
        digest.update(repr((shard.keys, shard.sizes, shard.crcs, shard.labels)).encode())
    return digest.hexdigest()


def require_decodable(
    sets: Mapping[str, Sequence[Shard]], config: LabelledDataConfig, storage: Storage, pool: DecodePool
) -> None:
    """Decode a clip of one video of each set, or of up to TRIED, all over the set, until one succeeds.

    sets: shards by the name of the field that they come from; a set may be empty. A few bad videos among good ones are
    no reason to stop: the loader replaces them and counts them.

    UserError: none can be decoded; it names set, shard, key and reason. StorageStalled: as Storage.read.
    """
    for name, shards in sets.items():
        if shards and (faults := _faults(shards, config, storage, pool)):
            raise UserError(
                f"{name}: none of the {len(faults)} videos that were tried can be decoded. Sample {faults[0]}."
                " `bevt shards check` lists all that is wrong."
            )


def _faults(shards: Sequence[Shard], config: LabelledDataConfig, storage: Storage, pool: DecodePool) -> list[str]:
    """What is wrong with each video that was tried; nothing if one of them could be decoded."""
    plan = ViewPlan([len(shard) for shard in shards], config, ONE_VIEW, 1)
    faults = []
    for place in sorted({i * plan.total // TRIED for i in range(TRIED)}):
        entry = plan.entry(place, 0)
        member = shards[entry.shard].member(entry.member)
        try:
            with pool.clips(storage.read(member), entry.positions, config.frames, config.stride, entry.choice):
                return []
        except BadSample as bad:
            faults.append(f"{member.key!r} of {redacted(member.path)}: {bad}")
    return faults
