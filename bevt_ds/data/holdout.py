"""Which samples of a run's own shards are held out: a function of their keys, whatever the seed and the ranks."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from bevt_ds.data.reading.members import Shard
from bevt_ds.errors import UserError


def place_of(key: str) -> float:
    """Where a key lies in [0,1): evenly spread, the same everywhere and for ever."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=6).digest()) / (1 << 48)


def split(shards: Sequence[Shard], share: float, kind: str) -> tuple[list[Shard], list[Shard]]:
    """The shards' samples to train on, and those held out: the ones whose key's place is below `share`.

    Samples of the same key stay together. Where a set is so small that no key lies there, the lowest one is held out.
    `share` 0: none is. Shards that are left empty are left out.

    Raises:
        UserError: there would be nothing to train on.
    """
    if not share:
        return list(shards), []
    places = [[place_of(key) for key in shard.keys] for shard in shards]
    lowest = min((place for row in places for place in row), default=0.0)
    held = [[place < share or place == lowest for place in row] for row in places]
    rest = _chosen(shards, held, False)
    if not rest:
        raise UserError(
            f"data.holdout={share} leaves no {kind} to train on: the shards have {sum(map(len, shards))}, and samples"
            " of one key stay together. Give more, or data.holdout=0."
        )
    return rest, _chosen(shards, held, True)


def _chosen(shards: Sequence[Shard], held: Sequence[Sequence[bool]], wanted: bool) -> list[Shard]:
    """The samples that are held out, or those that are not, in shards that have any."""
    parts = [
        shard.at(i for i, is_held in enumerate(row) if is_held is wanted)
        for shard, row in zip(shards, held, strict=True)
    ]
    return [part for part in parts if len(part)]
