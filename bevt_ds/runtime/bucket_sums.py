"""A bucket of gradients is filled, and what is reduced of it is added up, in a few operators.

DeepSpeed 0.19.8 works parameter by parameter at stages 1 and 2: each gradient is copied into the bucket, and once it is
reduced cast to fp32, added to the partition, and copied back, four small kernels for every parameter and micro-step.
Here each of the four is one multi-tensor kernel for a bucket. The numbers are the same to the last bit. What is paid
for it: gradients stay until their bucket is full, as many bytes as the bucket has; and in bf16 the whole bucket is cast
at once, so that 4 bytes for each of its elements are taken while it is added up, not of one parameter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

NAME = "allreduce_and_copy_with_multiple_ranks"
TAKE, REDUCE = "reduce_independent_p_g_buckets_and_remove_grads", "reduce_ipg_grads"


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


def fill_by_bucket(optimizer: Any) -> None:
    """Copy gradients into their bucket when it is full, not each as it comes; other optimizers stay.

    Takes the place of DeepSpeed's methods TAKE, of which it is the rest, and REDUCE. Those on the host stay as well:
    their events tell when a single copy is done.
    """
    if not hasattr(optimizer, NAME) or not optimizer.contiguous_gradients or optimizer.cpu_offload:
        return
    take, reduce = getattr(optimizer, TAKE), getattr(optimizer, REDUCE)
    # By the stream that made it: a place in the bucket, a gradient.
    waiting: dict[Any, list[tuple[Tensor, Tensor]]] = {}

    def take_later(parameter: nn.Parameter, group: int) -> None:
        """Arguments as DeepSpeed gives them. Collective where the bucket is full."""
        dtype, number = optimizer.get_param_comm_dtype(parameter), optimizer.get_param_id(parameter)
        bucket, size = optimizer.ipg_buckets[dtype], parameter.numel()
        if not 0 < size <= optimizer.reduce_bucket_size or optimizer.params_already_reduced[number]:
            return take(parameter, group)  # has no bucket, or is an error
        if bucket.elements + size > optimizer.reduce_bucket_size:
            optimizer.reduce_ipg_grads(comm_dtype=dtype)
            if optimizer.overlap_comm:
                bucket.index = 1 - bucket.index
        gradient = optimizer.get_gradient_for_reduction(parameter)
        place = bucket.buffer[bucket.index].narrow(0, bucket.elements, size)
        stream = torch.cuda.current_stream() if gradient.is_cuda else None
        waiting.setdefault(stream, []).append((place, gradient.detach().view(-1)))
        gradient.data = place.view_as(gradient)
        if stream and optimizer.overlap_comm:
            bucket.copy_streams.add(stream)
        bucket.elements += size
        bucket.grads.append(gradient)
        bucket.params.append((group, parameter.param_idx_in_group, number))

    def fill() -> None:
        for stream, copies in waiting.items():
            with torch.cuda.stream(stream):  # None: where it is
                torch._foreach_copy_(*map(list, zip(*copies, strict=True)))
        waiting.clear()

    def fill_and_reduce(*args: Any, **kwargs: Any) -> None:
        fill()  # a function of its own, whose variables hold no gradient while the bucket is reduced
        reduce(*args, **kwargs)

    setattr(optimizer, TAKE, take_later)
    setattr(optimizer, REDUCE, fill_and_reduce)
