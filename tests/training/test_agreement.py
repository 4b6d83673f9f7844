"""Weights that differ between ranks, exports that are not finite, and a loss scale that can fall no further."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from deepspeed.runtime.fp16 import loss_scaler
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from bevt_ds.errors import UserError
from bevt_ds.exit_codes import NON_FINITE
from bevt_ds.runtime.agreement import RanksDifferError, checksums, describe, require_agreement
from bevt_ds.runtime.distributed import Ranks
from bevt_ds.runtime.guard import Guard
from bevt_ds.train.nonfinite import describe as describe_step
from bevt_ds.train.nonfinite import plain, require_finite_export
from tests.downstream.worlds import on_ranks


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 2)).to(torch.bfloat16)


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("world", [2, 3])
def test_rank_whose_weights_differ_by_a_bit_is_named(world, stage):
    models = [network() for _ in range(world)]

    def work(ranks: Ranks) -> str:
        model = models[ranks.rank]
        engine = SimpleNamespace(module=model, stage=stage)
        require_agreement(engine, ranks, 4)
        if ranks.rank == 1:
            model[2].weight.data.view(torch.int16)[1, 2] ^= 1
        with pytest.raises(RanksDifferError) as caught:
            require_agreement(engine, ranks, 5)
        assert caught.value.exit_code == NON_FINITE
        return str(caught.value)

    said = on_ranks(world, work)
    assert len(set(said)) == 1
    others = "the others" if world > 2 else "rank 0 (it cannot be said which of them is right)"
    assert f"after step 5 the weights of rank 1 differ from those of {others}, in 2.weight: nothing is saved" in said[0]


def test_what_is_split_between_ranks_is_not_compared():
    models = [network(), network()]

    def work(ranks: Ranks) -> None:
        model = models[ranks.rank]
        model[0].weight.data += ranks.rank
        require_agreement(SimpleNamespace(module=model, stage=3), ranks, 1)

    on_ranks(2, work)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_checksum_changes_with_every_bit(dtype):
    values = torch.randn(5, generator=torch.Generator().manual_seed(1)).to(dtype)
    words = {2: torch.int16, 4: torch.int32}[values.element_size()]
    before, seen = int(checksums([values])), set()
    for bit in range(8 * values.element_size()):
        changed = values.clone()
        changed.view(words)[3] ^= -(1 << bit) if bit == 8 * values.element_size() - 1 else 1 << bit
        seen.add(int(checksums([changed])))
    assert len(seen) == 8 * values.element_size() and before not in seen


def test_message_names_several_ranks_and_parameters():
    said = describe(
        list("abcde"), [(1, 2, 3, 4, 5), (0, 0, 0, 0, 5), (1, 2, 3, 4, 5), (1, 2, 3, 4, 6), (1, 2, 3, 4, 5)], 9
    )
    assert "of ranks 1, 3 differ from those of the others, in a, b, c and 2 more" in said


def test_weights_that_are_not_finite_are_not_exported():
    """Only rank 0 has them; all ranks stop."""

    def work(ranks: Ranks) -> str:
        weights = {"a": torch.ones(3), "b": torch.tensor([1.0, math.inf])} if ranks.is_main else {}
        require_finite_export({"a": torch.ones(2), "n": torch.ones(1, dtype=torch.int64)}, ranks, 2)
        with pytest.raises(UserError, match="after step 3 b of the weights are not finite: not exported"):
            require_finite_export(weights, ranks, 3)

    on_ranks(2, work)


class Overflowing:
    """Stands for DeepSpeed's fp16 optimizer: every step overflows."""

    overflow = True

    def __init__(self) -> None:
        self.loss_scaler = loss_scaler.DynamicLossScaler(
            8, 100, min_scale=1, delayed_shift=1, consecutive_hysteresis=False
        )

    def _update_scale(self, overflow: bool) -> None:
        self.loss_scaler.update_scale(overflow)


def test_loss_scale_at_its_lowest_is_a_fault_that_names_step_and_tensor(monkeypatch):
    """While the scale can fall, an overflow is in the ordinary way; DeepSpeed itself would raise at the lowest."""
    monkeypatch.setattr(loss_scaler.dist, "get_rank", lambda: 1)  # asked before it prints
    model, optimizer = nn.Linear(2, 1, bias=False), Overflowing()
    ds = SimpleNamespace(module=model, optimizer=optimizer, zero_optimization_stage=lambda: 2)
    guard, scaling, scales = Guard(ds, lambda parameter: torch.full_like(parameter, math.inf)), [], []
    for _ in range(6):
        guard.before_step()
        optimizer._update_scale(True)
        verdict = guard.after_step()
        scaling.append(verdict.scaling)
        scales.append(guard.loss_scale)
        assert verdict.is_skipped()
    assert scales == [8, 4, 2, 1, 1, 1] and scaling == [True] * 3 + [False] * 3
    norms = {name: plain(norm) for name, norm in verdict.norms().items()}
    report = {"step": 5, "losses": [[1.0]], "keys": [[["a/1"]]], "norms": norms}
    assert describe_step(report) == (
        "step 5 is skipped: the loss is finite, its gradient is not, in weight; samples: a/1."
    )


class Reads(TorchDispatchMode):
    """Counts what a GPU would make the host wait for: numbers read out of tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default)
        return function(*args, **(kwargs or {}))


def test_guard_reads_nothing_from_the_device_before_the_update():
    """At stage 0 the decision is the optimizer's; the flag is copied, not waited for."""
    model = nn.Linear(4, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    engine = SimpleNamespace(
        module=model, optimizer=optimizer, zero_optimization_stage=lambda: 0, gradient_clipping=lambda: 0.0
    )
    guard = Guard(engine, None)
    model(torch.ones(3, 4)).sum().backward()
    with Reads() as reads:
        guard.before_step()
        checksums(model.parameters())
        assert reads.count == 0
        assert float(guard.total) > 0
        assert reads.count == 1
