"""A bucket of reduced gradients is added up in a few operators.

DeepSpeed 0.19.8 adds to its partition parameter by parameter at stages 1 and 2: each gradient is cast to fp32, added,
and copied back into the bucket, three small kernels for every parameter and micro-step. Here each of the three is one
multi-tensor kernel for a bucket. The numbers are the same to the last bit. What is paid for it: in bf16 the whole
bucket is cast at once, so that 4 bytes for each of its elements are taken while it is added up, not of one parameter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

NAME = "allreduce_and_copy_with_multiple_ranks"


def add_up_by_bucket(optimizer: Any) -> None:
    """Take the place of DeepSpeed's method of this name, which its reduction calls; other optimizers stay."""
    if not hasattr(optimizer, NAME):
        return

    def reduce_and_add(
        small_bucket: Sequence[Tensor],
        communication_data_type: torch.dtype,
        log: Any = None,
        divide: bool = True,
        process_group: Any = None,
        bucket_ranks: Sequence[int | frozenset[int]] = (),
        output_bucket: Sequence[Tensor | None] | None = None,
    ) -> None:
        """Arguments as DeepSpeed gives them. Collective."""
        group = optimizer.dp_process_group if process_group is None else process_group
        reduced = optimizer.allreduce_bucket(
            small_bucket, communication_data_type, log=log, divide=divide, process_group=group
        )
        rank = torch.distributed.get_rank(group)
        mine = [i for i, ranks in enumerate(bucket_ranks) if rank in _ranks(ranks)]
        _add(optimizer, reduced, small_bucket, output_bucket, mine)
        own = [small_bucket[i] for i in mine]
        if own:
            synced = optimizer.unflatten(reduced, small_bucket)
            torch._foreach_copy_(own, [synced[i] for i in mine])
        if optimizer.overlap_comm and reduced.is_cuda:
            for tensor in (reduced, *own):
                tensor.record_stream(optimizer.reduction_stream)

    setattr(optimizer, NAME, reduce_and_add)


def _ranks(ranks: int | frozenset[int]) -> frozenset[int]:
    return ranks if isinstance(ranks, frozenset) else frozenset({ranks})


def _add(
    optimizer: Any,
    reduced: Tensor,
    bucket: Sequence[Tensor],
    outputs: Sequence[Tensor | None] | None,
    mine: Sequence[int],
) -> None:
    """Add this rank's parts of the flat gradient to what they are accumulated in, in that dtype."""
    wanted = [i for i in mine if outputs is not None and outputs[i] is not None]
    if wanted:
        wide = optimizer.unflatten(reduced.to(outputs[wanted[0]].dtype), bucket)
        torch._foreach_add_([outputs[i] for i in wanted], [wide[i] for i in wanted])
