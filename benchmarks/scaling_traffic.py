"""Bytes that collectives move, counted as they are called.

What ZeRO needs, and the formulas, are in bevt_ds/plan/traffic.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

COLLECTIVES = {  # operator of torch.ops.c10d -> what it is
    "allreduce_": "all_reduce",
    "reduce_": "reduce",
    "broadcast_": "broadcast",
    "allgather_": "all_gather",
    "_allgather_base_": "all_gather",
    "allgather_into_tensor_coalesced_": "all_gather",
    "reduce_scatter_": "reduce_scatter",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_tensor_coalesced_": "reduce_scatter",
    "alltoall_base_": "all_to_all",
    "alltoall_": "all_to_all",
}
SILENT = {"barrier", "monitored_barrier_"}  # they move no tensor


class Traffic(TorchDispatchMode):
    """Inside the block, counts calls and bytes of every collective of any library, by kind.

    `payload` holds S summed over calls. Raises KeyError at an operator whose kind is not known.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.payload: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.namespace == "c10d" and (name := func._schema.name.removeprefix("c10d::")) not in SILENT:
            kind = COLLECTIVES[name]
            self.calls[kind] += 1
            self.payload[kind] += max(sum(t.nbytes for t in tensors(arg)) for arg in args)
        return func(*args, **(kwargs or {}))


def tensors(value: Any) -> Iterable[Tensor]:
    """Every tensor in nested lists."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors(item)
