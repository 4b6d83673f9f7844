"""The online probe: its figures, agreement over ranks, and that it changes no bit of a run."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from bevt_ds.batch import Batch
from bevt_ds.config.recipes import demo
from bevt_ds.config.samples import DataConfig
from bevt_ds.config.schema import Config, OnlineProbeConfig, TrainConfig
from bevt_ds.config.validate import validate
from bevt_ds.errors import UserError
from bevt_ds.eval.online_probe import OnlineProbe, codebook_use
from bevt_ds.model.presets import create_model
from tests.downstream.worlds import on_ranks
from tests.training.conftest import shards, small  # noqa: F401 - fixtures
from tests.training.processes import run_ranks


@pytest.fixture
def config(labelled_shards) -> Config:
    data = DataConfig(frames=8, stride=2, size=64, token_size=32, short_side=(72, 80), workers=1, threads=1)
    probe = OnlineProbeConfig(2, f"{labelled_shards}/train-*.tar", f"{labelled_shards}/val-*.tar")
    return Config("test", data=data, train=TrainConfig(steps=5, micro_clips=2), probe=probe)


class StillEngine:
    """An engine as far as the probe sees it."""

    def __init__(self) -> None:
        self.module = create_model("tiny", vocab_size=8, window=(4, 4, 4))
        self.module.init_weights(torch.Generator().manual_seed(0))
        self.dtype = torch.float32

    @contextmanager
    def evaluating(self):
        self.module.eval()
        with torch.no_grad():
            yield
        self.module.train()


def targets(*ids: int) -> Batch:
    return Batch(None, SimpleNamespace(targets=torch.tensor(ids)))


def test_online_probe_agrees_over_ranks_and_keeps_the_generator(config):
    def work(ranks):
        probe = OnlineProbe(config, 8, ranks, config.train.steps)
        probe.count(targets(*([ranks.rank] * 6)))
        return probe.measure(engines[ranks.rank])

    engines = [StillEngine() for _ in range(3)]
    alone = on_ranks(1, work)[0]
    state = torch.get_rng_state()
    first, *others = on_ranks(3, work)
    assert torch.get_rng_state().equal(state)
    assert others == [{}, {}]
    assert (alone["probe_videos"], first["probe_videos"]) == (7, 7)
    assert first["probe_top1"] == alone["probe_top1"]
    assert first["feature_rank"] == pytest.approx(alone["feature_rank"], rel=1e-4)
    assert 1 < alone["feature_rank"] < 18
    assert (alone["codebook_use"], first["codebook_use"]) == (1 / 8, 3 / 8)
    assert first["codebook_perplexity"] == pytest.approx(3)


def test_codebook_counts_start_again_for_each_measurement(config):
    (probe,) = on_ranks(1, lambda ranks: OnlineProbe(config, 8, ranks, config.train.steps))
    engine = StillEngine()
    probe.count(targets(0, 1, 2, 3, -100))
    assert probe.measure(engine)["codebook_use"] == 0.5
    probe.count(targets(7, 7))
    assert probe.measure(engine)["codebook_use"] == 1 / 8


def test_codebook_use_has_known_values():
    assert codebook_use(torch.tensor([5, 5, 5, 5])) == {"codebook_use": 1.0, "codebook_perplexity": pytest.approx(4)}
    assert codebook_use(torch.tensor([9, 0, 0, 0])) == {"codebook_use": 0.25, "codebook_perplexity": pytest.approx(1)}


def test_online_probe_is_due_every_n_steps_and_at_the_end(config):
    (probe,) = on_ranks(1, lambda ranks: OnlineProbe(config, 8, ranks, config.train.steps))
    assert [step for step in range(5) if probe.due(step)] == [1, 3, 4]


@pytest.mark.parametrize("probe", [OnlineProbeConfig(every=5), OnlineProbeConfig(every=5, train="a.tar")])
def test_online_probe_needs_labelled_shards(probe):
    with pytest.raises(UserError, match="probe.train and probe.val"):
        validate(replace(demo(), probe=probe))


def test_online_probe_changes_no_bit_of_a_run(tmp_path, small, labelled_shards):  # noqa: F811
    """Probed on the way; then taken up in the middle and probed at the end only. Nothing may differ."""
    probe = {"probe.train": f"{labelled_shards}/train-*.tar", "probe.val": f"{labelled_shards}/val-*.tar"}
    settings = {**small, **probe, "model.drop_path": 0.3, "train.steps": 4, "train.checkpoint_every": 2}
    probed = run_ranks(tmp_path / "probed", {**settings, "probe.every": 2})
    assert probed.code == 0, probed.output
    middle = tmp_path / "probed" / "checkpoints" / "step-00000002"
    seldom = run_ranks(tmp_path / "seldom", {**settings, "probe.every": 100, "resume": middle})
    assert seldom.code == 0, seldom.output
    assert seldom.losses() == probed.losses()[2:]
    figures = ("probe_top1", "probe_videos", "feature_rank", "codebook_use", "codebook_perplexity")
    assert [all(line.get(name, 0) > 0 for name in figures[1:]) for line in probed.log()] == [False, True] * 2
    before, last = seldom.log()
    assert not any(name in before for name in figures)
    assert [last[name] for name in figures] == [probed.log()[-1][name] for name in figures]
