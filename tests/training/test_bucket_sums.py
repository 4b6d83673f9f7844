"""A bucket of gradients filled and added up at once, against DeepSpeed's own method: equal bits, fewer operators."""

import weakref
from types import SimpleNamespace

import pytest
import torch
from deepspeed.runtime.zero import stage_1_and_2
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from benchmarks.step_parts import count_operators
from bevt_ds.runtime.bucket_sums import NAME, TAKE, add_up_by_bucket, fill_by_bucket

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


class Filled(stage_1_and_2.DeepSpeedZeroOptimizer):
    """What DeepSpeed's method uses of its optimizer; of each bucket that is reduced, keeps the values."""

    def __init__(self, overlap: bool):
        self.contiguous_gradients, self.overlap_comm = True, overlap
        self.cpu_offload = self.zenflow = self._offload_gradient_safety_enabled = self.use_grad_accum_attribute = False
        self.reduce_bucket_size, self.extra_large_param_to_reduce, self.reduced = 20, {}, []
        self.ipg_buckets = {torch.bfloat16: stage_1_and_2.IPGBucket()}
        buffers = [torch.zeros(20, dtype=torch.bfloat16) for _ in range(1 + overlap)]
        self.ipg_buckets[torch.bfloat16].buffer = buffers

    get_param_comm_dtype = staticmethod(lambda parameter: torch.bfloat16)
    report_ipg_memory_usage = _maybe_reduce_autoep_folding_tp_gradient = staticmethod(lambda *_: None)

    def reduce_ipg_grads(self, comm_dtype=None):
        bucket = self.ipg_buckets[torch.bfloat16]
        large = self.extra_large_param_to_reduce.pop(torch.bfloat16, None)
        whole = bucket.buffer[bucket.index][: bucket.elements].clone() if large is None else large.grad.flatten()
        self.reduced.append((whole, bucket.index, list(bucket.params), [g.clone() for g in bucket.grads]))
        bucket.clear()


def fill(replaced: bool, overlap: bool) -> tuple[Filled, int]:
    """Parameters of 3x4 and 8 numbers, of one and of more than a bucket, whose gradients come in this order."""
    optimizer, draw = Filled(overlap), torch.Generator().manual_seed(0)
    if replaced:
        fill_by_bucket(optimizer)
    shapes = [(3, 4), (8,), (1,), (5, 5), (12,), (2, 3), (20,), (0,), (4,)]
    parameters = [torch.nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16)) for shape in shapes]
    optimizer.param_id = {id(p): i for i, p in enumerate(parameters)}
    optimizer.params_already_reduced = [False] * len(shapes)
    for number, p in enumerate(parameters):
        p.param_idx_in_group, p.grad = number, torch.randn(p.shape, generator=draw).bfloat16()

    def run():
        for p in parameters:
            getattr(optimizer, TAKE)(p, 0)
        optimizer.reduce_ipg_grads()

    return optimizer, count_operators(run)


@pytest.mark.parametrize("overlap", [False, True])
def test_a_bucket_is_filled_at_once_with_what_deepspeed_copies_one_by_one(overlap):
    """The same buckets in the same order, in buffers that take turns where reduction overlaps; fewer copies."""
    (theirs, before), (ours, after) = fill(False, overlap), fill(True, overlap)
    assert len(ours.reduced) == len(theirs.reduced) > 3
    for own, other in zip(ours.reduced, theirs.reduced, strict=True):
        assert own[0].equal(other[0]) and own[1:3] == other[1:3]
        assert all(a.equal(b) for a, b in zip(own[3], other[3], strict=True))
    assert before - after == 7 - 5, "of seven gradients that have a place in five buckets"


def test_no_gradient_is_held_while_its_bucket_is_reduced():
    """A plan counts on the place in the bucket alone."""
    optimizer = Filled(overlap=False)
    made, held, reduce = [], [], optimizer.reduce_ipg_grads
    optimizer.reduce_ipg_grads = lambda comm_dtype=None: (held.extend(x() for x in made), reduce(comm_dtype))
    fill_by_bucket(optimizer)
    parameters = [torch.nn.Parameter(torch.zeros(5, dtype=torch.bfloat16)) for _ in range(2)]
    optimizer.param_id = {id(p): i for i, p in enumerate(parameters)}
    optimizer.params_already_reduced = [False] * 2
    for number, p in enumerate(parameters):
        p.param_idx_in_group, p.grad = number, torch.ones_like(p)
        made.append(weakref.ref(p.grad.untyped_storage()))
        getattr(optimizer, TAKE)(p, 0)
    optimizer.reduce_ipg_grads()
    assert held == [None, None]


def test_a_gradient_that_comes_twice_is_deepspeeds_error():
    optimizer, _ = fill(True, False)
    optimizer.params_already_reduced[0], optimizer.param_names = True, {}
    parameter = torch.nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
    parameter.grad, optimizer.param_id[id(parameter)] = torch.zeros_like(parameter), 0
    with pytest.raises(AssertionError, match="already been reduced"):
        getattr(optimizer, TAKE)(parameter, 0)
