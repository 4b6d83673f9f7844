"""Recovery after a failure: overrides on resume, skipped samples, non-finite weights."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from bevt_ds.config.parse import set_value
from bevt_ds.config.recipes import get_recipe
from bevt_ds.errors import UserError
from bevt_ds.exit_codes import NON_FINITE
from bevt_ds.runtime.checkpoint import Facts, read_facts
from bevt_ds.runtime.continuing import go_on, require_steps
from bevt_ds.runtime.engine import Engine
from bevt_ds.runtime.optim import learning_rate
from bevt_ds.runtime.run_dir import CHECKPOINTS, read_config, write_config
from bevt_ds.train.nonfinite import require_good
from tests.downstream.worlds import ALONE
from tests.training.processes import run_ranks

DEMO = replace(get_recipe("demo"), resume="auto")
SKIPS = {"skips": [[0, 9, 1, 0, "timed out"]], "decoder": {"VIDEO": "cpu"}}


def start_at(step: int, **facts) -> tuple[Path, Facts]:
    return Path("commit"), replace(Facts(step, 1, 2, DEMO, "abc", SKIPS), **facts)


def test_resume_keeps_settings_that_are_not_given(tmp_path):
    """The command of the first start, given again, takes back nothing that was overridden in between."""
    lower = set_value(DEMO, "optim.lr", 1e-5)
    config, changes, _ = go_on(lower, {"optim.lr"}, tmp_path, start_at(4))
    assert config.optim.lr == 1e-5
    assert changes == ({"step": 4, "key": "optim.lr", "from": DEMO.optim.lr, "to": 1e-5},)
    write_config(tmp_path, config, changes)
    assert json.loads((tmp_path / "changes.json").read_text()) == list(changes)

    before_a_commit, again, _ = go_on(DEMO, {"train.steps"}, tmp_path, start_at(4))
    assert (before_a_commit, again) == (config, changes)
    after_it, once, _ = go_on(DEMO, set(), tmp_path, start_at(8, config=config, changes=changes))
    assert (after_it, once) == (config, changes)
    back, twice, _ = go_on(DEMO, {"optim.lr"}, tmp_path, start_at(8, config=config, changes=changes))
    assert back.optim.lr == DEMO.optim.lr
    assert [change["step"] for change in twice] == [4, 8]


def test_another_seed_forgets_skipped_positions(tmp_path):
    _, _, skips = go_on(DEMO, set(), tmp_path, start_at(4))
    assert skips == SKIPS
    _, _, skips = go_on(set_value(DEMO, "train.seed", 7), {"train.seed"}, tmp_path, start_at(4))
    assert skips == {**SKIPS, "skips": []}


def test_skipped_samples_are_recorded_once_and_kept(tmp_path):
    skipping = set_value(DEMO, "train.skip_steps", 3)
    config, changes, _ = go_on(skipping, {"train.skip_steps"}, tmp_path, start_at(4))
    assert (config.train.skip_steps, len(changes)) == (3, 1)
    same, changes, _ = go_on(skipping, {"train.skip_steps"}, tmp_path, start_at(6, config=config, changes=changes))
    assert (same.train.skip_steps, len(changes)) == (3, 1)
    fewer = set_value(DEMO, "train.skip_steps", 2)
    with pytest.raises(UserError, match="passed over the samples of 3 steps"):
        go_on(fewer, {"train.skip_steps"}, tmp_path, start_at(6, config=config))


def test_run_cannot_end_before_its_current_step():
    require_steps(6, 6)
    with pytest.raises(UserError, match="has done 6 steps.*end after 5"):
        require_steps(6, 5)


def stub_engine(spoilt: str) -> Engine:
    """An engine without DeepSpeed: a weight and its AdamW, with a NaN or an infinity somewhere."""
    engine, module = Engine.__new__(Engine), nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    module.register_buffer("codes", torch.ones(2))
    if spoilt == "weight":
        module.weight.data[0, 1] = float("nan")
    elif spoilt == "buffer":
        module.codes[1] = float("nan")
    elif spoilt:
        optimizer.state[module.weight][spoilt][0, 0] = float("inf")
    says = {"zero_optimization_stage": lambda self: 0, "zero_cpu_offload": lambda self: False}
    engine.ranks, engine.ds = ALONE, type("DeepSpeed", (), {"module": module, "optimizer": optimizer, **says})()
    return engine


@pytest.mark.parametrize("spoilt", ["", "weight", "buffer", "exp_avg", "exp_avg_sq"])
def test_non_finite_weights_are_not_saved(spoilt):
    engine = stub_engine(spoilt)
    with pytest.raises(UserError, match="the loss of step 3 is nan.*resume=auto.*optim.lr"):
        require_good(engine, float("nan"), 3)
    if not spoilt:
        require_good(engine, 1.0, 3)
        return
    with pytest.raises(UserError, match="after step 3.*not finite.*resume=auto.*optim.lr"):
        require_good(engine, 1.0, 3)


def test_advice_after_a_nan_works_as_written(tmp_path, small):
    settings = {**small, "train.checkpoint_every": 2, "train.keep_checkpoints": 1, "train.steps": 4}
    run = run_ranks(tmp_path / "run", settings)
    assert run.code == 0, run.output
    broken = {**settings, "resume": "auto", "train.steps": 12, "optim.lr": 1e30}
    run = run_ranks(run.folder, broken)
    errors = [line for line in run.output.splitlines() if line.startswith("error: ")]
    assert run.code == NON_FINITE and len(errors) == 1, run.output
    assert "6 steps in a row" in errors[0] and "resume=auto and a lower optim.lr" in errors[0], run.output
    kept = sorted((run.folder / CHECKPOINTS).glob("step-*"))
    assert kept and all(abs(read_facts(commit).loss) < 100 for commit in kept)

    advice = {"optim.lr": 1e-3, "train.precision": "bf16", "train.skip_steps": 3, "train.seed": 5}
    run = run_ranks(run.folder, {**broken, **advice, "train.steps": 6})
    assert run.code == 0, run.output
    step = int(kept[-1].name[-8:])
    assert f"continuing from step {step}" in run.output
    assert f"from step {step} on, train.skip_steps: 0 -> 3" in run.output
    facts = read_facts(run.folder / CHECKPOINTS / "step-00000006")
    recorded = {change["key"]: change["to"] for change in facts.changes}
    assert recorded.items() >= advice.items()
    assert json.loads((run.folder / "changes.json").read_text()) == list(facts.changes)
    assert read_config(run.folder).train.seed == 5
    optim = facts.config.optim  # the schedule of more steps is as if there had been so many from the start
    expected = learning_rate(5, optim=optim, steps=6, warmup=optim.warmup_steps)
    assert run.log()[-1]["lr"] == pytest.approx(expected) != learning_rate(5, optim, 12, optim.warmup_steps)
    assert [line["step"] for line in run.log()] == list(range(6))


def test_skipping_steps_uses_samples_of_later_steps(tmp_path, small):
    """With hardly any learning rate, step 0 of a run that skips one step has the loss of the other's step 1."""
    still = {**small, "optim.lr": 1e-12, "train.steps": 2}
    plain = run_ranks(tmp_path / "plain", still)
    skipping = run_ranks(tmp_path / "skipping", {**still, "train.steps": 1, "train.skip_steps": 1})
    assert (plain.code, skipping.code) == (0, 0), plain.output + skipping.output
    losses = [(line["loss_video"], line["loss_image"]) for line in plain.log()]
    assert (skipping.log()[0]["loss_video"], skipping.log()[0]["loss_image"]) == pytest.approx(losses[1], rel=1e-5)
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)
