"""Reduced gradients of a bucket added up at once, against DeepSpeed's own method: equal bits, fewer operators."""

from types import SimpleNamespace

import pytest
import torch
from deepspeed.runtime.zero import stage_1_and_2
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from benchmarks.step_parts import count_operators
from bevt_ds.runtime.bucket_sums import NAME, add_up_by_bucket

OWNERS = [0, frozenset({0, 1}), 1, 0, frozenset({1}), 0]  # which ranks have a part of each parameter


def optimizer_of() -> SimpleNamespace:
    """What DeepSpeed's method uses of its optimizer; the reduction over ranks doubles the gradient."""
    own = SimpleNamespace(dp_process_group=None, overlap_comm=False, reduction_stream=None)
    own.allreduce_bucket = lambda bucket, *_, **__: _flatten_dense_tensors(bucket) * 2
    own.unflatten = _unflatten_dense_tensors
    own._add_to_grad_partition_buffer = stage_1_and_2.DeepSpeedZeroOptimizer._add_to_grad_partition_buffer
    theirs = getattr(stage_1_and_2.DeepSpeedZeroOptimizer, NAME)
    setattr(own, NAME, lambda *args, **kwargs: theirs(own, *args, **kwargs))
    return own


def gradients(dtype: torch.dtype, kept: bool) -> tuple[list[torch.Tensor], list[torch.Tensor | None]]:
    """A bucket, and what its parts are added to: not every one is, and with accumulation they hold something."""
    draw = torch.Generator().manual_seed(0)
    bucket = [torch.randn(7 + i, generator=draw).to(dtype) for i in range(len(OWNERS))]
    outputs = [torch.randn(7 + i, generator=draw) if kept and i != 3 else None for i in range(len(OWNERS))]
    return bucket, outputs


@pytest.mark.parametrize("rank", [0, 1, 2])
@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_bucket_is_added_up_to_the_bits_of_deepspeed(dtype, kept, rank, monkeypatch):
    """A rank without a part changes nothing."""
    for module in (stage_1_and_2.dist, torch.distributed):
        monkeypatch.setattr(module, "get_rank", lambda group=None: rank)
    found = []
    for replaced in (False, True):
        optimizer = optimizer_of()
        if replaced:
            add_up_by_bucket(optimizer)
        bucket, outputs = gradients(dtype, kept)
        getattr(optimizer, NAME)(bucket, dtype, bucket_ranks=OWNERS, output_bucket=outputs)
        found.append([*bucket, *outputs])
    for theirs, ours in zip(*found, strict=True):
        assert (theirs is None and ours is None) or torch.equal(theirs, ours)


def test_a_bucket_takes_as_many_operators_as_one_parameter(monkeypatch):
    """Of DeepSpeed three for each parameter: a cast, a sum, a copy."""
    for module in (stage_1_and_2.dist, torch.distributed):
        monkeypatch.setattr(module, "get_rank", lambda group=None: 0)
    counts = []
    for replaced in (False, True):
        optimizer, parts = optimizer_of(), 20
        if replaced:
            add_up_by_bucket(optimizer)
        bucket = [torch.ones(4, dtype=torch.bfloat16) for _ in range(parts)]
        outputs = [torch.zeros(4) for _ in range(parts)]
        run = getattr(optimizer, NAME)
        arguments = {"bucket_ranks": [0] * parts, "output_bucket": outputs}
        counts.append(count_operators(lambda run=run, a=arguments, b=bucket: run(b, torch.bfloat16, **a)))
    before, after = counts
    assert before - after == 3 * 20 - 3


def test_other_optimizers_stay_as_they_are():
    plain = SimpleNamespace(step=print)
    add_up_by_bucket(plain)
    assert vars(plain) == {"step": print}
