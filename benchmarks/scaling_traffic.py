"""Bytes that collectives move: counted as they are called, and by formula.

Letters: n ranks, S bytes of a collective's whole tensor, P parameters, m micro-steps an update, g and p bytes of a
gradient and of a parameter on the wire.

A rank sends (n-1)/n S in a ring's reduce-scatter or all-gather, and twice that in an all-reduce, which is one after
the other. In a ring's reduce or broadcast n-1 of n ranks send S, so that a rank's mean is (n-1)/n S as well. NCCL and
gloo may choose other algorithms; none sends less for large tensors, save where a switch adds them up.

ZeRO (Rajbhandari et al. 2020, section 7) needs per update, each term times (n-1)/n:
stage 1: P g (reduce-scatter, once an update) + P p (all-gather of updated parameters);
stage 2: P g at every micro-step, because only its part of the sum is kept, + P p;
stage 3: at every micro-step 2 P p (parameters for the forward and for the backward pass) + P g.
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


def sent_bytes(payload: dict[str, int], ranks: int) -> dict[str, float]:
    """Bytes that a rank sends, by collective, if each is a ring."""
    once = (ranks - 1) / ranks
    return {kind: size * once * (2 if kind == "all_reduce" else 1) for kind, size in payload.items()}


def expected_bytes(stage: int, parameters: int, ranks: int, micro_steps: int, width: int) -> float:
    """Bytes that a rank sends in one update according to ZeRO's paper; `width` is g = p.

    Raises KeyError for a stage other than 1, 2, 3.
    """
    copies = {1: 2, 2: micro_steps + 1, 3: 3 * micro_steps}[stage]
    return copies * parameters * width * (ranks - 1) / ranks
