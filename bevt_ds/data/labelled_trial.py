"""A trial before the start: a labelled set of which no video can be decoded is found at once, not at its first use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from bevt_ds.config.schema import LabelledDataConfig, ViewsConfig
from bevt_ds.data.decoding.pool import DecodePool
from bevt_ds.data.labelled_plan import ViewPlan
from bevt_ds.data.limits import BadSample
from bevt_ds.data.reading.members import Shard
from bevt_ds.data.reading.remote import redacted
from bevt_ds.data.reading.storage import Storage
from bevt_ds.data.timing import StageTimes
from bevt_ds.errors import UserError

TRIED = 8  # videos of a set, at most
ONE_VIEW = ViewsConfig(clips=1, crops=1)


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
        load = partial(storage.read, member, StageTimes())
        try:
            pool.clips(load, entry.positions, config.frames, config.stride, entry.choice).result()
        except BadSample as bad:
            faults.append(f"{member.key!r} of {redacted(member.path)}: {bad}")
        else:
            return []
    return faults
