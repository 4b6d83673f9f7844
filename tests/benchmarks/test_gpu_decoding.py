"""The script that measures decoding on a GPU keeps to its budget; its commands are stand-ins here."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_decoding.sh"
GOALS = ["videos", "rates", "images", "shards", "weights", "train-nvdec"]
ALL = [*GOALS, "limit", "tests", "decode", "soak", "train-split", "train-cpu"]


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """In which the programs that the script starts only note what they are asked, and pytest fails."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("python", "deepspeed"):
        (programs / name).write_text(f'#!/bin/sh\necho {name} "$@" >>{tmp_path}/asked\n[ "$2" != pytest ]\n')
        (programs / name).chmod(0o755)
    return {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "BEVT_COMMIT": "0" * 40, "REHEARSE": "0"}


def run(environment: dict[str, str], out: Path, *steps: str) -> tuple[list[str], list[int], list[str], int]:
    """The steps that ran, the limits of each in seconds, those left out, and the exit code."""
    done = subprocess.run(["bash", SCRIPT, out, *steps], env=environment, capture_output=True, text=True)
    found = re.findall(r"^(\S+): \d+ s of (\d+), exit code", done.stdout, re.MULTILINE)
    left_out = done.stdout.splitlines()[-1].removeprefix("left out: ").split()
    return [name for name, _ in found], [int(limit) for _, limit in found], left_out, done.returncode


def test_every_step_runs_the_goals_first_and_one_that_fails_stops_no_other(
    environment: dict[str, str], tmp_path: Path
) -> None:
    names, limits, left_out, code = run(environment, tmp_path / "out")
    assert names == ALL and left_out == ["nothing"] and code == 1
    assert sum(limits[: ALL.index("train-split")]) <= 720, "all but two of the trainings fit, however long each takes"
    asked = (tmp_path / "asked").read_text()
    assert "--row ours, NVDEC, packed, fps=" in asked and "data.decoder=nvdec train.steps=300" in asked


def test_what_does_not_fit_into_the_budget_is_left_out_and_named(environment: dict[str, str], tmp_path: Path) -> None:
    names, _, left_out, _ = run({**environment, "BUDGET": "70"}, tmp_path / "out")
    assert set(left_out) == {"rates", "train-nvdec", "tests", "decode", "soak", "train-split", "train-cpu"}
    assert names == [name for name in ALL if name not in left_out]


def test_steps_can_be_run_by_name(environment: dict[str, str], tmp_path: Path) -> None:
    assert run(environment, tmp_path / "out", "limit", "images")[0] == ["images", "limit"]
