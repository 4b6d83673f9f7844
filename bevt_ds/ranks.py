"""The processes of a run and the few collectives that are not DeepSpeed's business."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Ranks:
    """This process among the others. Every method is collective: all ranks call it, in the same order."""

    rank: int
    world: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """True on the one process that writes and prints."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all."""
        if self.world > 1:
            dist.barrier()

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value (any small picklable object of our own) on every rank."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def all_hold(self, holds: bool) -> bool:
        """True where it holds on every rank."""
        return bool(self.sum(torch.tensor(float(holds), device=self.device)) == self.world)

    def sum(self, value: Tensor) -> Tensor:
        """The sum over ranks, in place."""
        if self.world > 1:
            dist.all_reduce(value)
        return value
