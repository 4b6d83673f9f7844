"""Twenty steps of fine-tuning, moving average included, that go on with other ZeRO stages, micro-batches and ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bevt_ds.folders import weights_of
from tests.downstream.finetune_jobs import run_jobs, words

STEPS = 20
SECONDS = 1800  # for all runs of a test, on a machine that may be busy
SAME = 1e-6  # relative, losses in fp32
CLOSE = 1e-5  # of weights and their average, which are moved by up to 1e-2


@pytest.fixture
def settings(finetune_settings: dict[str, object]) -> dict[str, object]:
    """No mixing, which ties the micro-batch; six clips a step, a validation at the end."""
    length = {"train.epochs": STEPS, "train.global_clips": 6, "train.micro_clips": 1, "optim.warmup_epochs": 3}
    kept = {"train.val_every": STEPS, "train.checkpoint_every": 1, "train.keep_checkpoints": STEPS, "optim.ema": 0.1}
    return {**finetune_settings, **length, **kept}


def line(settings: dict[str, object], folder: Path, stage: int = 2, **more: object) -> list[str]:
    """The words of a run at a ZeRO stage."""
    return words({**settings, **more, "output_dir": folder}, stage)


def link(settings: dict[str, object], before: Path, folder: Path, step: int, stage: int = 2, **more: object) -> dict:
    """A run that goes on with what another had done after `step` steps."""
    return {"branch": [str(before), str(folder), step], "words": line(settings, folder, stage, **more, resume="auto")}


def assert_same(run: Path, whole: Path) -> None:
    """Every loss, and the average of the weights, of which the run wrote the last part itself."""
    ours, theirs = ([json.loads(text) for text in (f / "log.jsonl").read_text().splitlines()] for f in (run, whole))
    ours, theirs = ([entry for entry in lines if "loss" in entry] for lines in (ours, theirs))
    assert [entry["step"] for entry in ours] == list(range(STEPS))
    assert [entry["loss"] for entry in ours] == pytest.approx([entry["loss"] for entry in theirs], rel=SAME)
    assert [entry["lr"] for entry in ours] == [entry["lr"] for entry in theirs]
    averages, expected = (load_file(weights_of(str(f)) / "model.safetensors") for f in (run, whole))
    for name, tensor in expected.items():
        torch.testing.assert_close(averages[name], tensor, rtol=0, atol=CLOSE, msg=name)


@pytest.mark.timeout(SECONDS)
def test_stage_and_micro_batch_change_in_a_run_and_nothing_else(tmp_path, settings):
    """Stages 2, 3 and 0 in turn, and micro-batches of one and six clips of the same six, on one rank."""
    whole = tmp_path / "whole"
    jobs = [
        {"words": line(settings, whole)},
        link(settings, whole, tmp_path / "stage3", 7, stage=3),
        link(settings, tmp_path / "stage3", tmp_path / "stage0", 14, stage=0),
        link(settings, whole, tmp_path / "micro6", 12, **{"train.micro_clips": 6}),
    ]
    assert run_jobs(tmp_path, jobs, seconds=SECONDS) == [0] * len(jobs)
    assert_same(tmp_path / "stage0", whole)
    assert_same(tmp_path / "micro6", whole)


@pytest.mark.slow
@pytest.mark.timeout(5 * SECONDS)
def test_number_of_ranks_changes_in_a_run_and_nothing_else(tmp_path, settings):
    """1, 2, 3 and 1 ranks in turn; the stage goes from 2 to 3 to 0 on the way."""
    whole, before = tmp_path / "whole", tmp_path / "whole"
    assert run_jobs(tmp_path, [{"words": line(settings, whole)}], 1, SECONDS) == [0]
    for number, (world, stage) in enumerate(((2, 2), (3, 3), (1, 0)), 1):
        folder = tmp_path / f"{number}-of-{world}"
        assert run_jobs(tmp_path, [link(settings, before, folder, 5 * number, stage)], world, SECONDS) == [0]
        before = folder
    assert_same(before, whole)
