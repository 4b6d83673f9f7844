"""Pretraining on features of a frozen network: a small run that learns, exact resume, our own weights as teacher."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from bevt_ds import UserError, pretrain
from bevt_ds.config.recipes import get_recipe
from bevt_ds.config.targets import TeacherConfig
from bevt_ds.config.validate import missing_inputs, validate
from tests.training.processes import SMALL, Finished, run_ranks

FEATURES = {
    "target": "features",
    "teacher.name": "resnet10t",
    "data.holdout": 0.3,
    "optim.lr": 5e-3,
    "train.steps": 16,
    "train.checkpoint_every": 12,
    "train.eval_batches": 1,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory, shards) -> Finished:
    """16 steps of both streams, a checkpoint after 12."""
    run = run_ranks(tmp_path_factory.mktemp("features") / "run", {**SMALL, **shards, **FEATURES})
    assert run.code == 0, run.output
    return run


def test_run_on_features_learns_and_says_what_from(run):
    first, last = run.log()[0], run.log()[-1]
    assert all(last[name] < 0.7 * first[name] for name in ("loss_video", "loss_image"))
    assert last["loss"] == pytest.approx(last["loss_video"] + last["loss_image"]) and "acc_video" not in last
    assert "targets: 256 features of resnet10t, random weights: none were named" in run.output
    summary = json.loads((run.folder / "summary.json").read_text())
    for stream in ("video", "image"):
        values = summary[stream]
        assert values["gain"] == pytest.approx(1 - values["loss"] / values["mean_loss"])
    assert "mean feature's loss" in run.output
    arch = json.loads((run.folder / "weights" / "config.json").read_text())["arch"]
    assert arch["target_dim"] == 256 and "vocab_size" not in arch
    for name in ("samples.png", "panels/step-00000012.png"):
        assert Image.open(run.folder / name).width > 500


def test_stopped_run_on_features_continues_bit_for_bit(run, tmp_path, shards):
    """The teacher is made again, from its seed."""
    folder = shutil.copytree(run.folder, tmp_path / "run")
    for path in (folder / "checkpoints" / "step-00000016", folder / "weights"):
        shutil.rmtree(path)
    again = run_ranks(folder, {**SMALL, **shards, **FEATURES, "resume": "auto"})
    assert again.code == 0 and "continuing from step 12" in again.output, again.output
    assert again.losses() == run.losses()
    one, two = (load_file(f / "weights" / "model.safetensors") for f in (run.folder, folder))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_own_run_is_a_teacher_for_two_ranks_as_for_one(run, tmp_path, small):
    settings = {**small, "target": "features", "teacher.weights": run.folder, "train.steps": 2}
    one, two = (run_ranks(tmp_path / str(world), settings, world) for world in (1, 2))
    for done in (one, two):
        assert done.code == 0, done.output
    assert f"targets: 128 features of a Video Swin, weights of {run.folder}" in one.output
    for a, b in zip(one.losses(), two.losses(), strict=True):
        assert b == pytest.approx(a, rel=2e-4)
    (start,) = json.loads((one.folder / "run.json").read_text())["starts"]
    assert start["teacher"]["file"].endswith("weights/model.safetensors") and "tokenizer" not in start


# Without a run


def test_settings_of_targets_that_cannot_be(tmp_path):
    demo = get_recipe("demo")
    features = replace(demo, target="features")
    with pytest.raises(UserError, match="target=features needs a frozen network: teacher.name"):
        validate(features)
    named = TeacherConfig(name="resnet10t")
    validate(replace(features, teacher=named))
    with pytest.raises(UserError, match=r"teacher.name=resnet10t: a teacher makes no ids: say target=features"):
        validate(replace(demo, teacher=named))
    for teacher, what in (
        (replace(named, weights="none.pth"), "teacher.weights=none.pth: no such file."),
        (TeacherConfig(weights="none"), "teacher.weights=none: no such file or folder."),
    ):
        assert list(missing_inputs(replace(features, teacher=teacher))) == [what]


def test_dry_run_on_features_opens_the_teacher(small, tmp_path, capsys):
    words = [f"{key}={value}" for key, value in {**small, "output_dir": tmp_path / "run"}.items()]
    assert pretrain.main([*words, "target=features", "teacher.name=resnet10t", "dry_run=true"]) == 0
    output = capsys.readouterr().out
    assert "no recompute, no teacher" in output and "+ teacher" not in output
    assert pretrain.main([*words, "target=features", "teacher.name=resnet10x", "dry_run=true"]) == 2
    assert "no network 'resnet10x' in timm" in capsys.readouterr().out
