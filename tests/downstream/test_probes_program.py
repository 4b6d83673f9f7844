"""`bevt probe`: every kind of probe on a pretraining run's encoder; ranks differ by rounding only."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import torch

from bevt_ds.config.parse import config_fields, to_dict
from bevt_ds.config.recipes import demo, finetune_demo
from bevt_ds.config.samples import ReadingConfig
from bevt_ds.config.schema import ProbeRunConfig
from bevt_ds.errors import UserError
from bevt_ds.eval import probe_run as probing
from bevt_ds.model.presets import create_model
from bevt_ds.probe import main, starting_point
from tests.downstream.worlds import main_on_ranks

SIZE = ["data.size=64", "views.short_side=72", "views.micro_videos=2", "probe.least_steps=10", "probe.batch=4"]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """What a pretraining run leaves, as far as a probe reads it."""
    folder = tmp_path_factory.mktemp("runs") / "demo"
    model = create_model("tiny", vocab_size=8, window=(4, 4, 4))
    model.init_weights(torch.Generator().manual_seed(0))
    model.save_pretrained(folder / "weights")
    (folder / "config.json").write_text(json.dumps(to_dict(demo())))
    (folder / "log.jsonl").write_text("")
    return folder


def probed(run: Path, shards: Path, world: int, *more: str, val: str = "val") -> None:
    """The program on so many ranks of this process, tested on the split `val`."""
    splits = [f"data.train={shards}/train-*.tar", f"data.val={shards}/{val}-*.tar"]
    main_on_ranks(world, probing, main, [f"weights={run}", *splits, *SIZE, *more])


@pytest.mark.parametrize("kind", ["attentive", "linear", "knn"])
def test_probe_command_on_ranks_differs_by_rounding_only(tmp_path, run, labelled_shards, kind):
    for world in (1, 2):
        probed(run, labelled_shards, world, f"probe.kind={kind}", f"output_dir={tmp_path}/{world}")
    alone, both = (pyarrow.parquet.read_table(tmp_path / name / "predictions.parquet") for name in "12")
    assert alone["key"].equals(both["key"])
    one, two = (np.array(table["probabilities"].to_pylist()) for table in (alone, both))
    np.testing.assert_allclose(one, two, atol=1e-4)
    assert one.shape == (7, 3)
    values = json.loads((tmp_path / "1" / "scores.json").read_text())
    assert (values["videos"], values["training_videos"], values["config"]["probe"]["kind"]) == (7, 11, kind)


def test_knn_probe_of_the_training_set_is_perfect(tmp_path, run, labelled_shards):
    arguments = ["probe.kind=knn", "probe.k=1", f"output_dir={tmp_path}"]
    probed(run, labelled_shards, 1, *arguments, val="train")
    assert json.loads((tmp_path / "scores.json").read_text())["top1"] == 1


def test_probe_takes_the_sampling_of_the_run(run, tmp_path):
    data, views = demo().data, starting_point(str(run)).views
    probed_data = starting_point(str(run)).data
    assert (probed_data.frames, probed_data.stride, probed_data.size) == (data.frames, data.stride, data.size)
    assert all(getattr(probed_data, f.key) == getattr(data, f.key) for f in config_fields(ReadingConfig))
    assert (views.clips, views.crops, views.short_side) == (1, 1, data.short_side[0])
    original = starting_point("somebody/elses.pth")
    assert (original.data.frames, original.data.stride, original.data.size) == (16, 8, 224)

    tuned = replace(finetune_demo(), output_dir="there")
    (tmp_path / "config.json").write_text(json.dumps(to_dict(tuned)))
    (tmp_path / "log.jsonl").write_text("")
    assert starting_point(str(tmp_path)).data == tuned.data


@pytest.mark.parametrize(
    ("word", "part"),
    [
        ("data.train=", "data.train is empty"),
        ("recipe=demo", "probe.py has no recipe"),
        ("probe.kind=forest", "attentive, linear, knn"),
        ("probe.k=0", "at least 1"),
        ("data.workers=0", "data.workers=0: must be at least 1"),
        ("weights=", "weights= is missing"),
        ("weights=runs/none", "weights=runs/none: no such file"),
    ],
)
def test_probe_mistakes_are_named(tmp_path, word, part):
    given = {"weights": str(tmp_path), "data.train": "a.tar", "data.val": "b.tar"}
    key, _, value = word.partition("=")
    with pytest.raises(UserError, match=part):
        main([f"{k}={v}" for k, v in (given | {key: value}).items()])


def test_probe_help_lists_every_field(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f" {field.key}=" in text for field in config_fields(ProbeRunConfig) if field.key != "recipe")
