"""The study (benchmarks/study.py): shards, restarts, and the conclusions of its page."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
from webdataset import WebDataset

from benchmarks import report, study
from benchmarks.pages_data import best_rate, measured
from benchmarks.pages_data import study as page_of_study
from benchmarks.study_baseline import copied
from benchmarks.study_data import prepare
from benchmarks.study_motion import COURSES
from benchmarks.study_runs import ARMS, Scale, masked_accuracy
from bevt_ds.errors import UserError

TINY = Scale(
    unlabelled=16,
    labels=2,
    validated=1,
    tested=2,
    pretrain_steps=1,
    finetune_epochs=1,
    rates=(1e-3, 1e-2),
    seeds=(0, 1),
)


def row(arm: str, seed: int, lr: float, val: float, test: float) -> dict:
    scores = {"val": val, "test": test, "classes": dict.fromkeys(COURSES, test)}
    return {
        "arm": arm,
        "seed": seed,
        "lr": lr,
        **scores,
        "scale": asdict(TINY),
        "provenance": {"cpu": "a", "commit": "c"},
    }


def rows_of(accuracies: dict[str, tuple[float, ...]]) -> list[dict]:
    return [row(arm, seed, 1e-3, 0.5, test) for arm, tests in accuracies.items() for seed, test in enumerate(tests)]


def test_study_shards_are_balanced_and_made_once(tmp_path):
    counts = {"unlabelled": 8, "pictures": 8, "train0": 16, "test": 8}
    prepare(tmp_path, counts)
    manifests = {split: json.loads((tmp_path / f"{split}-manifest.json").read_text()) for split in counts}
    assert {split: manifest["samples"] for split, manifest in manifests.items()} == counts
    assert manifests["train0"]["labels"] == dict.fromkeys(sorted(COURSES), 2)
    assert manifests["unlabelled"]["labels"] == manifests["pictures"]["labels"] == {}
    assert manifests["test"]["codecs"] == {"h264": 8}
    made = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    prepare(tmp_path, counts)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == made


def test_study_splits_are_disjoint(tmp_path):
    counts = {"unlabelled": 8, "train0": 8, "train1": 8, "val": 8, "test": 8}
    prepare(tmp_path, counts)
    shards = [str(tmp_path / f"{split}-000000.tar") for split in counts]
    clips = [sample["mp4"] for sample in WebDataset(shards, shardshuffle=False)]
    assert len(set(clips)) == sum(counts.values())


def test_finished_parts_of_a_study_are_not_repeated(tmp_path, monkeypatch):
    asked = []

    def finetune(folder, scale, arm, seed, lr):
        asked.append((arm, seed, lr))
        return {"val": lr, "test": 0.5, "classes": dict.fromkeys(COURSES, 0.5)}

    monkeypatch.setattr(study, "prepare", lambda *_: None)
    monkeypatch.setattr(study, "pretrain", lambda *_: "done")
    monkeypatch.setattr(study, "masked_accuracy", lambda folder, arm: {"steps": [1], "image": [0.1]})
    monkeypatch.setattr(study, "copy_accuracy", lambda: 0.5)
    monkeypatch.setattr(study, "finetune", finetune)
    study.carry_out(study.Study(tmp_path, TINY))
    first = {(arm, 0, lr) for arm in ARMS for lr in TINY.rates}
    assert sorted(asked) == sorted(first | {(arm, 1, 1e-2) for arm in ARMS}), "the rate with the better validation"
    study.carry_out(study.Study(tmp_path, TINY))
    assert len(asked) == 9
    curves = {r["pretraining"]: r.get("copying") for r in study.Study(tmp_path, TINY).rows() if "pretraining" in r}
    assert curves == {"joint": 0.5, "images": None}
    assert len(study.Study(tmp_path, TINY).rows()) == 9 + 2


def test_study_folder_of_another_scale_is_refused(tmp_path):
    study.Study(tmp_path, TINY)
    with pytest.raises(UserError, match="another scale"):
        study.Study(tmp_path, replace(TINY, labels=3))


def test_failed_command_ends_the_study(tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("pretrain ended with code 2")

    monkeypatch.setattr(study, "prepare", lambda *_: None)
    monkeypatch.setattr(study, "pretrain", fail)
    with pytest.raises(RuntimeError, match="code 2"):
        study.carry_out(study.Study(tmp_path, TINY))


def test_study_chooses_the_rate_without_test_clips():
    rows = [row("joint", 0, 1e-3, val=0.6, test=0.2), row("joint", 0, 1e-2, val=0.5, test=0.9)]
    rows += [row("joint", 1, 1e-3, val=0.1, test=0.3), row("joint", 1, 1e-2, val=0.9, test=0.9)]
    assert best_rate(rows, "joint") == 1e-3


@pytest.mark.parametrize(
    ("joint", "verdict"),
    [
        ((0.7, 0.8), "its worst seed is better"),
        ((0.5, 0.9), "ahead in the mean"),
        ((0.3, 0.9), "not ahead"),
    ],
)
def test_study_page_names_the_better_one(tmp_path, joint, verdict):
    rows = rows_of({"scratch": (0.2, 0.3), "images": (0.6, 0.6), "joint": joint})
    (tmp_path / "study.jsonl").write_text("".join(f"{json.dumps(r)}\n" for r in rows))
    text = report.write(tmp_path / "study.jsonl")
    assert verdict in text and text == (tmp_path / "study.md").read_text()
    assert f"({min(joint):.1%} to {max(joint):.1%})" in text
    assert (tmp_path / "study.png").stat().st_size > 1000


def test_study_page_has_a_table_for_each_number_of_labels():
    few = rows_of(dict.fromkeys(ARMS, (0.5,)))
    many = [{**r, "scale": {**r["scale"], "labels": 30}} for r in few]
    text = page_of_study(many + few).markdown()
    assert text.index("## 2 training clips") < text.index("## 30 training clips")


def test_study_page_shows_the_pretraining_curve():
    """A curve is drawn, not taken for a result."""
    curve = {"pretraining": "joint", "steps": [600, 1200], "video": [0.3, 0.625], "image": [0.2, 0.4], "copying": 0.5}
    rows = [{**curve, "provenance": {"commit": "c"}}, *rows_of(dict.fromkeys(ARMS, (0.5,)))]
    text = page_of_study(rows).markdown()
    assert "| joint (BEVT) | 1,200 | 62.5% | 50.0% | 40.0% |" in text


@pytest.mark.parametrize("count", [2, 30, 45])
def test_study_masked_accuracy_is_a_mean_over_the_log(tmp_path, count):
    (tmp_path / "images").mkdir()
    rows = [{"step": 50 * i + 49, "acc_image": i / count, "loss": 1.0} for i in range(count)]
    (tmp_path / "images" / "log.jsonl").write_text("".join(f"{json.dumps(r)}\n" for r in rows))
    curve = masked_accuracy(tmp_path, "images")
    assert curve["steps"][-1] == 50 * count and len(curve["steps"]) == min(count, 20) and "video" not in curve
    lengths = np.diff([0, *curve["steps"]]) / 50
    assert np.average(curve["image"], weights=lengths) == pytest.approx(np.mean(np.arange(count) / count), abs=1e-4)


def test_copy_baseline_is_right_where_nothing_moves():
    ids, mask = np.zeros((4, 1, 2), int), np.zeros((4, 1, 2), bool)
    ids[2:, 0, 1], mask[1:3, 0, :] = 1, True
    assert copied(ids, mask).tolist() == [True, True, True, True]
    ids[2, 0, 0] = 5
    assert copied(ids, mask).tolist() == [True, True, False, True]


def test_study_groups_are_means_of_their_classes():
    rows = rows_of(dict.fromkeys(ARMS, (0.5,)))
    for r in rows:
        r["classes"] |= {"slow": 1.0, "fast": 0.0, "up": 0.9}
    values = measured(rows)["joint"]
    assert values["speed"] == [0.5] and values["direction"] == [pytest.approx(0.6)] and values["order"] == [0.5]


@pytest.mark.slow
def test_study_runs_with_the_project_commands(tmp_path):
    tiny = study.Study(tmp_path, replace(TINY, rates=(1e-3,), seeds=(0,)))
    study.carry_out(tiny)
    assert {(r["arm"], r["seed"]) for r in tiny.rows() if "arm" in r} == {(arm, 0) for arm in ARMS}
    assert {r["pretraining"]: r["steps"] for r in tiny.rows() if "pretraining" in r} == {"joint": [1], "images": [1]}
