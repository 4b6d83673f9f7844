"""Which losses are spikes: a plain definition in numpy, on one rank and on two."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from bevt_ds.config.parse import set_value
from bevt_ds.config.recipes import get_recipe
from bevt_ds.config.validate import validate
from bevt_ds.errors import UserError
from bevt_ds.runtime.distributed import Ranks
from bevt_ds.train.spikes import FEWEST, FILE, WINDOW, Spikes
from tests.downstream.worlds import ALONE, on_ranks

DEVIATIONS, PARTS = 4.0, 4
STEPS = np.random.default_rng(0).normal(3.0, 0.5, (WINDOW + 50, PARTS))  # the losses of micro-batches
STEPS[40, 2] = STEPS[90, 0] = 9.0
STEPS[50, 1] = math.nan
STEPS[5, 3] = 9.0  # too early to be judged


def expected() -> list[list[bool]]:
    """Of each micro-batch of each step, whether it is a spike."""
    known, found = [], []
    for losses in STEPS:
        before = np.array(known[-WINDOW:])
        limit = before.mean() + DEVIATIONS * before.std() if len(before) >= FEWEST else math.inf
        found.append([bool(loss > limit) for loss in losses])
        if not any(found[-1]) and np.isfinite(losses).all():
            known.append(losses)
    return found


def judge(spikes: Spikes, ranks: Ranks, steps: range) -> list[list[bool]]:
    """What this rank says of its micro-batches."""
    own = []
    for step in steps:
        shares = [torch.tensor(STEPS[step, i] / PARTS) for i in range(ranks.rank, PARTS, ranks.world)]
        marked = [spikes.mark(share) for share in shares]
        own.append([bool(m.isnan() and not s.isnan()) for m, s in zip(marked, shares, strict=True)])
        assert all(m == s for m, s, bad in zip(marked, shares, own[-1], strict=True) if not bad and not s.isnan())
        spikes.after_step()
    return own


@pytest.mark.parametrize("world", [1, 2])
def test_spikes_are_those_of_the_definition(world):
    def work(ranks: Ranks) -> list[list[bool]]:
        return judge(Spikes(DEVIATIONS, PARTS, ranks), ranks, range(len(STEPS)))

    found = np.zeros(STEPS.shape, dtype=bool)
    for rank, own in enumerate(on_ranks(world, work)):
        found[:, rank::world] = own
    assert found.tolist() == expected()
    assert [tuple(place) for place in np.argwhere(found)] == [(40, 2), (90, 0)]


@pytest.mark.parametrize("stop", [3, 39, 40, 170])
def test_resumed_run_judges_by_the_losses_before(tmp_path, stop):
    before = Spikes(DEVIATIONS, PARTS, ALONE)
    first = judge(before, ALONE, range(stop))
    before.saved()(tmp_path)
    assert len(json.loads((tmp_path / FILE).read_text())) <= WINDOW
    rest = judge(Spikes(DEVIATIONS, PARTS, ALONE, tmp_path), ALONE, range(stop, len(STEPS)))
    assert first + rest == expected()


def test_checkpoint_without_losses_is_gone_on_from(tmp_path):
    assert Spikes(DEVIATIONS, PARTS, ALONE, tmp_path).limit == math.inf


def test_spikes_in_fp16_are_refused():
    stage_2 = {"zero_optimization": {"stage": 2}}
    config = set_value(set_value(get_recipe("demo"), "train.max_spike", 6.0), "train.precision", "fp16")
    with pytest.raises(UserError, match="train.max_spike with train.precision=fp16"):
        validate(config, stage_2)
    validate(set_value(config, "train.precision", "fp32"), stage_2)
