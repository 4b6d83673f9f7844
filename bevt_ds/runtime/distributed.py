"""The processes of a run and the few collectives that are not DeepSpeed's business."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Ranks:
    """This process among the others. Every method is collective: all ranks call it, in the same order.

    `host` is a process group over the CPU, so that small facts travel without waiting for the device.
    """

    rank: int
    world: int
    device: torch.device
    host: Any = None

    @property
    def is_main(self) -> bool:
        """True on the one process that writes and prints."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all."""
        if self.world > 1:
            dist.barrier(group=self.host)

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value (any small picklable object of our own) on every rank."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.host)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value (any small picklable object of our own), by rank, on every rank."""
        values = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value, group=self.host)
        return values

    def sum_counts(self, counts: Sequence[int]) -> list[int]:
        """Integers summed over ranks, element by element."""
        total = torch.tensor(counts, dtype=torch.int64)
        if self.world > 1:
            dist.all_reduce(total, group=self.host)
        return total.tolist()

    def all_hold(self, holds: bool) -> bool:
        """True where it holds on every rank."""
        return self.sum_counts([int(holds)]) == [self.world]

    def sum(self, value: Tensor) -> Tensor:
        """The sum of device tensors over ranks, in place."""
        if self.world > 1:
            dist.all_reduce(value)
        return value
