"""The labelled videos that tests and probes go through, once each, over all ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path

from bevt_ds.batch import LabelledBatch
from bevt_ds.config.samples import LabelledDataConfig, ViewsConfig
from bevt_ds.data.labelled_loader import require_decodable, test_batches
from bevt_ds.data.labels import Classes
from bevt_ds.data.ledger import StageTimes
from bevt_ds.data.open_stream import open_resources
from bevt_ds.data.reading.members import Shard
from bevt_ds.data.reading.storage import Storage
from bevt_ds.progress import progress_bar
from bevt_ds.runtime.distributed import Ranks


def shards_of(patterns: str, data: LabelledDataConfig) -> list[Shard]:
    """The videos of local or remote shards.

    Raises:
        UserError: shards missing or unusable.
    """
    with closing(Storage(data)) as storage:
        return storage.shards(patterns, "video")


def require_decodable_sets(sets: Mapping[str, Sequence[Shard]], data: LabelledDataConfig) -> None:
    """Decode a video of each set, named as the field its shards come from; see require_decodable.

    Raises:
        UserError: a set without a video that can be decoded.
    """
    with ExitStack() as resources:
        shared = open_resources(replace(data, workers=1), True, StageTimes(), resources)
        require_decodable(sets, data, shared.storage, shared.pool)


def each_video(
    data: LabelledDataConfig,
    views: ViewsConfig,
    shards: Sequence[Shard],
    classes: Classes,
    folder: Path | None,
    ranks: Ranks,
    title: str = "videos",
) -> Iterator[LabelledBatch]:
    """This rank's batches of all videos of `shards`, as many on each rank, with a progress bar on rank 0.

    `folder` is where bad samples are listed; None: nowhere.
    """
    batches = test_batches(data, views, ranks.rank, ranks.world, ranks.device, shards, classes, folder)
    steps = math.ceil(sum(map(len, shards)) / (views.micro_videos * ranks.world))
    return iter(progress_bar(batches, desc=title, total=steps, unit="batch", leave=None, disable=not ranks.is_main))
