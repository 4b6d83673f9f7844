"""`bevt evaluate`: result files, the same bits on any number of ranks, coverage, user mistakes."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from bevt_ds.config.parse import config_fields, to_dict
from bevt_ds.config.recipes import demo, finetune_demo
from bevt_ds.config.schema import EvaluateConfig
from bevt_ds.data.reading.index import load_shard
from bevt_ds.errors import UserError
from bevt_ds.eval import multi_view as evaluation
from bevt_ds.evaluate import main, starting_point
from bevt_ds.model.classifier import VideoClassifier
from bevt_ds.model.presets import create_classifier, create_model
from tests.downstream.worlds import main_on_ranks
from tests.training.processes import ROOT, SECONDS, environment

NAMES = ("run", "sit", "walk")
VIDEOS = 7  # in val-*.tar
SIZE = ["views.short_side=72", "views.micro_videos=1"]


def classifier(names=NAMES) -> VideoClassifier:
    model = create_classifier("tiny", len(names), classes=names, window=(2, 2, 2))
    model.init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.head.weight.mul_(200)  # predictions that differ
    return model


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """What a fine-tuning run leaves, as far as evaluation reads it."""
    folder = tmp_path_factory.mktemp("runs") / "demo"
    classifier().save_pretrained(folder / "weights")
    (folder / "config.json").write_text(json.dumps(to_dict(finetune_demo())))
    (folder / "log.jsonl").write_text("")
    return folder


def words(run: Path, labelled_shards: Path, *more: str) -> list[str]:
    return [f"weights={run}", f"data.val={labelled_shards}/val-*.tar", "views.clips=2", "views.crops=3", *SIZE, *more]


def evaluated(arguments: list[str], world: int = 1) -> None:
    main_on_ranks(world, evaluation, main, arguments)


def read(folder: Path) -> tuple[pyarrow.Table, dict]:
    return pyarrow.parquet.read_table(folder / "predictions.parquet"), json.loads((folder / "scores.json").read_text())


@pytest.fixture(scope="module")
def alone(tmp_path_factory, run, labelled_shards) -> Path:
    """The results of one rank."""
    folder = tmp_path_factory.mktemp("alone")
    evaluated(words(run, labelled_shards, f"output_dir={folder}"))
    return folder


def test_evaluation_writes_metrics_predictions_and_confusion(alone, run):
    table, values = read(alone)
    hits = sum(row["label"] == row["prediction"] for row in table.to_pylist())
    assert (values["top1"], values["videos"]) == (hits / VIDEOS, VIDEOS)
    assert "top5" not in values, "there are three classes"
    assert [(c["name"], c["videos"]) for c in values["classes"]] == [("run", 2), ("sit", 2), ("walk", 3)]
    assert len({tuple(p) for p in table["probabilities"].to_pylist()}) == VIDEOS, (
        "videos must differ, or nothing is shown"
    )
    assert values["config"]["weights"] == str(run)
    assert Image.open(alone / "confusion.png").width > 300


def test_one_and_three_ranks_predict_the_same_bits(alone, tmp_path, run, labelled_shards):
    evaluated(words(run, labelled_shards, f"output_dir={tmp_path}"), 3)
    (one, first), (three, second) = read(alone), read(tmp_path)
    assert one.equals(three, check_metadata=True)
    assert {k: first[k] for k in first if k != "config"} == {k: second[k] for k in second if k != "config"}


@pytest.mark.dist
def test_evaluation_under_a_launcher_with_two_ranks(alone, tmp_path, run, labelled_shards):
    """Two processes; threads and instructions may differ from this one's, hence the tolerance."""
    arguments = words(run, labelled_shards, f"output_dir={tmp_path}")
    command = [Path(sys.executable).with_name("torchrun"), "--standalone", "--nproc_per_node=2", "bevt_ds/evaluate.py"]
    done = subprocess.run(
        [*command, *arguments], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=SECONDS
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "7 of 7 expected (100.0%)" in done.stdout
    (one, first), (two, second) = read(alone), read(tmp_path)
    assert (first["top1"], first["classes"]) == (second["top1"], second["classes"])
    difference = np.subtract(one["probabilities"].to_pylist(), two["probabilities"].to_pylist())
    assert np.abs(difference).max() < 1e-4


def test_results_go_next_to_the_run(run, labelled_shards):
    for number in (1, 2):
        evaluated(words(run, labelled_shards)[:2] + SIZE)
        assert (run / f"eval-{number}" / "scores.json").is_file()


def test_evaluation_takes_the_configuration_of_the_run(run):
    config = starting_point(str(run / "weights"), "")
    demo = finetune_demo()
    assert (config.recipe, config.data, config.views) == (demo.recipe, demo.data, demo.views)
    assert config.precision == demo.train.precision
    assert starting_point(str(run), "finetune_ssv2").views.clips == 1


def test_coverage_counts_missing_and_damaged_videos(tmp_path, run, labelled_shards, capsys):
    """A damaged video, and twelve that are stated beyond those of the shards."""
    for tar in labelled_shards.glob("val-*.tar"):
        shutil.copy(tar, tmp_path)
    damage(tmp_path / "val-000000.tar", "clip-01")
    arguments = [
        f"weights={run}",
        f"data.val={tmp_path}/val-*.tar",
        "data.expected_val=19",
        f"output_dir={tmp_path}/out",
    ]
    evaluated([*arguments, *SIZE])
    printed = capsys.readouterr().out
    assert "6 of 19 expected (31.6%)" in printed
    assert "3 of 3 occur" in printed
    assert read(tmp_path / "out")[1]["expected"] == 19
    assert "clip-01" in (tmp_path / "out" / "bad_samples.jsonl").read_text()


def damage(tar: Path, key: str) -> None:
    """Overwrite the middle of a video, after the tar was indexed."""
    shard = load_shard(str(tar))
    member = shard.member(shard.keys.index(key))
    with tar.open("r+b") as file:
        file.seek(member.offset + member.size // 2)
        file.write(bytes(64))


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"weights": ""}, "weights= is missing"),
        ({"weights": "nowhere"}, "weights=nowhere: no such file"),
        ({"weights": "nowhere", "data.val": ""}, "weights=nowhere: no such file"),  # not what else a run would say
        ({"data.val": ""}, "data.val is empty"),
        ({"data.size": "60"}, "multiple of 32"),
        ({"data.workers": "0"}, "data.workers=0: must be at least 1"),
        ({"views.crops": "2"}, "expected one of 1, 3"),
        ({"views.clip": "2"}, "views.clips"),
        ({"precision": "fp16"}, "needs a GPU"),
        ({"data.classes": "README.md"}, "data.classes=README.md"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_evaluation_mistakes_are_named(run, labelled_shards, change, part):
    settings = {"weights": str(run), "data.val": f"{labelled_shards}/val-*.tar"} | change
    with pytest.raises(UserError, match=re.escape(part)):
        evaluated([f"{key}={value}" for key, value in settings.items()])


def test_kernels_that_cannot_run_are_refused(run, labelled_shards, monkeypatch):
    def refuse(kernels, device):
        raise RuntimeError(f"kernels={kernels} cannot run on {device.type}")

    monkeypatch.setattr(evaluation, "resolve", refuse)
    with pytest.raises(UserError, match="kernels=triton cannot run on cpu"):
        evaluated(words(run, labelled_shards, "kernels=triton"))


def test_pretraining_run_is_not_a_classifier(tmp_path, labelled_shards):
    (tmp_path / "config.json").write_text(json.dumps(to_dict(demo())))
    (tmp_path / "log.jsonl").write_text("")
    with pytest.raises(UserError, match="no classifier: fine-tune it first"):
        evaluated(words(tmp_path, labelled_shards))
    create_model("tiny", vocab_size=8).save_pretrained(tmp_path / "exported")
    with pytest.raises(UserError, match="no classifier: fine-tune it first"):
        evaluated(words(tmp_path / "exported", labelled_shards))


def test_labels_are_checked_against_the_classifier(tmp_path, labelled_shards):
    classifier(("run", "sit", "walked")).save_pretrained(tmp_path / "weights")
    arguments = [f"weights={tmp_path}/weights", "recipe=finetune_demo", f"data.val={labelled_shards}/val-*.tar"]
    with pytest.raises(UserError, match="'walk', which is none of the 3 classes 'run', 'sit', 'walked'"):
        evaluated(arguments)


def test_mixed_names_and_numbers_as_labels_are_refused(tmp_path, run, pack_labelled):
    """The weights know both the name and the number: without a word one of the two would be a mistake."""
    pattern = pack_labelled(tmp_path, "val", ["walk", "1"])
    with pytest.raises(UserError, match="numbers in some samples and names in others.*clip-00.*'walk'.*clip-01.*'1'"):
        evaluated([f"weights={run}", f"data.val={pattern}"])


@pytest.mark.parametrize(
    ("lines", "part"),
    [("run\nsit\nwalk\nfly\n", "names 4 classes, the classifier has 3"), ("sit\nrun\nwalk\n", "'sit' where .* 'run'")],
)
def test_class_names_are_checked_against_the_classifier(tmp_path, run, labelled_shards, lines, part):
    (tmp_path / "names.txt").write_text(lines)
    with pytest.raises(UserError, match=part):
        evaluated(words(run, labelled_shards, f"data.classes={tmp_path}/names.txt"))


def test_evaluation_results_are_not_overwritten(alone, run, labelled_shards):
    with pytest.raises(UserError, match="holds scores.json already"):
        evaluated(words(run, labelled_shards, f"output_dir={alone}"))


def test_evaluate_help_lists_every_field(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f" {field.key}=" in text for field in config_fields(EvaluateConfig) if field.key != "recipe")
