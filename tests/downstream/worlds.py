"""Several ranks in one process: threads whose collectives meet at a barrier."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from bevt_ds.runtime.distributed import Ranks

SECONDS = 60  # before a rank that waits for the others gives up
ALONE = Ranks(0, 1, torch.device("cpu"))


@dataclass
class Meeting:
    """Where the ranks of one world leave their values for each other."""

    world: int
    values: dict[int, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.barrier = threading.Barrier(self.world)

    def exchange(self, rank: int, value: Any) -> list[Any]:
        self.values[rank] = value
        self.barrier.wait(SECONDS)
        everyone = [self.values[r] for r in range(self.world)]
        self.barrier.wait(SECONDS)
        return everyone


class ThreadRanks(Ranks):
    """Ranks whose `host` is a Meeting."""

    def apart(self) -> ThreadRanks:
        return replace(self, host=self.broadcast(Meeting(self.world)))

    def barrier(self) -> None:
        self.host.exchange(self.rank, None)

    def broadcast(self, value: Any) -> Any:
        return self.host.exchange(self.rank, value)[0]

    def gather(self, value: Any) -> list[Any]:
        return self.host.exchange(self.rank, value)

    def sum_counts(self, counts) -> list[int]:
        return [sum(column) for column in zip(*self.gather(list(counts)), strict=True)]

    def sum(self, value: Tensor) -> Tensor:
        return value.copy_(torch.stack(self.gather(value.clone())).sum(0))


def on_ranks(world: int, work: Callable[[Ranks], Any]) -> list[Any]:
    """What `work` returns on each rank of a world of so many."""
    meeting = Meeting(world)
    ranks = [ThreadRanks(rank, world, torch.device("cpu"), meeting) for rank in range(world)]
    with ThreadPoolExecutor(world) as threads:
        return list(threads.map(work, ranks))


def main_on_ranks(world: int, joining: ModuleType, main: Callable[[list[str]], int], words: list[str]) -> None:
    """A measuring program on so many ranks of this process; `joining` is the module in which it joins them."""
    mine = threading.local()

    def on_rank(ranks: Ranks) -> None:
        mine.ranks = ranks
        assert main(words) == 0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(joining, "joined_to_measure", lambda: nullcontext(mine.ranks))
        on_ranks(world, on_rank)
