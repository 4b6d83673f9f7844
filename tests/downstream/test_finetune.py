"""Fine-tuning runs: exact resume at every ZeRO stage, ranks, moving average, run folder, user mistakes."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bevt_ds import BEVT, VideoClassifier
from bevt_ds.config.schema import FinetuneConfig
from bevt_ds.folders import weights_of
from bevt_ds.runtime.run_dir import read_config
from tests.downstream.finetune_jobs import run_jobs, words
from tests.training.processes import start_python
from tests.training.test_runs import wait_for_step

CI_STAGES, OTHER_STAGES = (2, 3), (0, 1)
UNLABELLED = Path(__file__).parents[1] / "data" / "shards" / "clips-000000.tar"
SIZES = {"embed_dim": 32, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 4, 8), "window": (2, 2, 2)}


@pytest.fixture(scope="module")
def settings(finetune_settings: dict[str, object]) -> dict[str, object]:
    """Four steps of four clips in two epochs, in the middle of the warm-up."""
    mixing = {"train.label_smoothing": 0.1, "train.mixup": 0.8, "train.cutmix": 1.0}
    length = {"train.epochs": 2, "train.global_clips": 4, "train.micro_clips": 2, "optim.warmup_epochs": 1.5}
    return {**finetune_settings, **mixing, **length, "train.val_every": 2, "train.checkpoint_every": 2}


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory) -> Path:
    """Weights of pretraining."""
    folder = tmp_path_factory.mktemp("pretrained")
    BEVT(**SIZES, vocab_size=16).save_pretrained(folder / "weights")
    return folder


def run_stages(folder: Path, stages: tuple[int, ...], settings: dict[str, object]) -> Path:
    """On two ranks: a run at each stage, and its continuation after a kill at step 2."""
    jobs = []
    for stage in stages:
        own = {"optim.ema": 0.1, "train.precision": "bf16" if stage == 1 else "fp32"}
        run = folder / f"zero{stage}"
        jobs.append({"words": words({**settings, **own, "output_dir": run}, stage)})
        again = words({**settings, **own, "output_dir": f"{run}-again", "resume": "auto"}, stage)
        jobs.append({"branch": [str(run), f"{run}-again", 2], "words": again})
    assert run_jobs(folder, jobs, world=2) == [0] * len(jobs)
    return folder


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory, settings) -> Path:
    return run_stages(tmp_path_factory.mktemp("two"), CI_STAGES, settings)


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory, settings, pretrained) -> tuple[Path, list[int | str]]:
    """On one rank: stage 2 as on two, other averages, a start from pretraining, and jobs that cannot be done."""
    folder = tmp_path_factory.mktemp("one")
    place = lambda name: {"output_dir": folder / name}  # noqa: E731
    quiet, names = {**settings, "data.val": ""}, folder / "names.txt"
    names.write_text("run\n")
    other = {**quiet, **place("pretrained"), "init_from": pretrained, "model.window": "4,2,2", "train.epochs": 1}
    jobs = [
        words({**settings, **place("run"), "optim.ema": 0.1}),
        words(other),
        words({**settings, **place("run"), "optim.ema": 0.1}),
        words({**settings, **place("run"), "resume": "auto"}),
        words({**settings, **place("sizes"), "init_from": pretrained, "model.name": "swin_t"}),
        words({**settings, **place("classes"), "data.classes": names}),
        words({**settings, **place("unlabelled"), "data.train": shutil.copy(UNLABELLED, folder)}),
        words({**quiet, **place("ema0"), "optim.ema": 0}),
        words({**quiet, **place("ema1"), "optim.ema": 0.999999}),
    ]
    return folder, run_jobs(folder, [{"words": line} for line in jobs])


def log(run: Path, key: str = "loss") -> list[dict]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if key in line]


def facts(run: Path) -> list[tuple]:
    """Everything of the log that must not depend on when or how often a run was stopped."""
    keys = ("step", "loss", "acc", "lr", "grad_norm")
    validated = [{k: v for k, v in line.items() if k != "time"} for line in log(run, "val_top1")]
    return [tuple(line[k] for k in keys) for line in log(run)] + [tuple(line.values()) for line in validated]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(weights_of(str(run)) / "model.safetensors")


@pytest.mark.parametrize("stage", CI_STAGES)
def test_killed_finetuning_continues_bit_for_bit(two_ranks, stage):
    assert_continued(two_ranks / f"zero{stage}", two_ranks / f"zero{stage}-again")


@pytest.mark.slow
def test_killed_finetuning_continues_at_zero_0_and_1(tmp_path, settings):
    """Without ZeRO in fp32, and ZeRO-1 in bf16."""
    run_stages(tmp_path, OTHER_STAGES, settings)
    for stage in OTHER_STAGES:
        assert_continued(tmp_path / f"zero{stage}", tmp_path / f"zero{stage}-again")


@pytest.mark.slow
def test_finetuning_killed_between_checkpoints_continues_exactly(tmp_path, settings):
    """SIGKILL between two checkpoints, whenever it happens to strike."""
    long = {**settings, "train.epochs": 4, "optim.ema": 0.1}
    assert run_jobs(tmp_path, [{"words": words({**long, "output_dir": tmp_path / "whole"})}], world=2) == [0]
    line = words({**long, "output_dir": tmp_path / "killed", "resume": "auto"})
    ranks = start_python(["bevt_ds/finetune.py", *line], world=2)
    wait_for_step(tmp_path / "killed" / "log.jsonl", 4, ranks)
    for rank in ranks:
        rank.send_signal(signal.SIGKILL)
        rank.communicate()
    assert run_jobs(tmp_path, [{"words": line}], world=2) == [0]
    assert_continued(tmp_path / "whole", tmp_path / "killed", steps=8)


def assert_continued(whole: Path, again: Path, steps: int = 4) -> None:
    """The same log and weights, to the last bit."""
    assert len(log(whole)) == steps
    assert facts(again) == facts(whole)
    assert all(tensor.equal(weights(whole)[name]) for name, tensor in weights(again).items())


def test_finetuning_losses_do_not_depend_on_ranks(two_ranks, one_rank):
    """Mixing included: rank 1 of 2 mixes what the second micro-batch of 1 does."""
    for one, two in zip(log(one_rank[0] / "run"), log(two_ranks / "zero2"), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=2e-4)
        assert two["acc"] == one["acc"]


def test_finetuning_losses_are_equal_at_all_zero_stages(two_ranks):
    for a, b in zip(log(two_ranks / "zero2"), log(two_ranks / "zero3"), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-4)


def test_moving_average_does_not_change_training(one_rank):
    """So does validation, which only one of the runs has."""
    folder, results = one_rank
    assert results[7:] == [0, 0]
    assert [line["loss"] for line in log(folder / "ema0")] == [line["loss"] for line in log(folder / "run")]


def test_exported_weights_are_the_moving_average(one_rank):
    """An average that forgets at once is the weights themselves, name by name; a slow one is on the way there."""
    raw, instant, slow = (weights(one_rank[0] / name) for name in ("ema0", "ema1", "run"))
    for name, tensor in raw.items():
        torch.testing.assert_close(instant[name], tensor, rtol=1e-4, atol=1e-6)
    moved = [n for n in raw if not torch.allclose(slow[n], raw[n], rtol=1e-4, atol=1e-6)]
    assert len(moved) > len(raw) / 2


def test_finetuning_run_folder_contents(one_rank):
    folder, results = one_rank
    run = folder / "run"
    assert results[0] == 0
    assert read_config(run, FinetuneConfig).train.label_smoothing == 0.1
    validation = log(run, "val_top1")
    assert [line["step"] for line in validation] == [3]
    assert {line["val_videos"] for line in validation} == {7}
    summary = json.loads((run / "summary.json").read_text())
    best = max(line["val_top1"] for line in validation)
    assert summary["best"]["top1"] == best == json.loads((run / "best" / "scores.json").read_text())["top1"]
    assert list((run / "tensorboard").glob("events*"))
    for name in ("weights", "best"):
        assert VideoClassifier.from_pretrained(run / name).arch["classes"] == ("run", "sit", "walk")


def test_finetuning_starts_from_pretraining_with_another_window(one_rank, pretrained):
    folder, results = one_rank
    assert results[1] == 0
    start, end = load_file(pretrained / "weights" / "model.safetensors"), weights(folder / "pretrained")
    name = "encoder.layers.0.blocks.0.mlp.fc1.weight"
    assert (end[name] - start[name]).abs().max() < 0.01  # two steps of at most 1e-3 each; unrelated weights differ more
    assert end["head.weight"].shape == (3, 256)


@pytest.mark.parametrize(
    ("job", "parts"),
    [
        (2, ["which a new run would overwrite"]),
        (3, ["another configuration", "optim.ema"]),
        (4, ["embed_dim=32", "model.name=swin_t has 96", "say model.name=tiny"]),
        (5, ["which is none of the 1 classes"]),
        (6, ["has no label", "clips-000000.tar"]),
    ],
)
def test_finetuning_mistakes_are_named_before_training_starts(one_rank, job, parts):
    result = one_rank[1][job]
    assert isinstance(result, str), result
    for part in parts:
        assert part in result
