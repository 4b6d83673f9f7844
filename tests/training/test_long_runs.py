"""2,000 steps leave memory, threads and open files as they were."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from tests.training.long_run import STEPS, STRIDE, held
from tests.training.processes import launch, start_ranks, wait_for

SECONDS = 3600  # on a machine that may be busy
GROWTH = 2 << 20  # bytes between steps 1,000 and 2,000; before, torch keeps the last collectives


def require_flat(rows: list[dict], growth: int = GROWTH) -> None:
    """rows: what is held at steps in order, the first once everything has begun."""
    first, last = rows[0], rows[-1]
    assert last["memory"] - first["memory"] < growth, rows
    assert last["threads"] <= first["threads"] and last["files"] <= first["files"], rows


@pytest.mark.timeout(SECONDS)
def test_two_thousand_steps_with_log_lines_and_commits_leave_nothing_behind(tmp_path):
    output = launch(["-m", "tests.training.long_run", str(tmp_path)], 1, SECONDS)
    path = tmp_path / "run" / "held.jsonl"
    assert path.exists(), output
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(STRIDE, STEPS + 1, STRIDE)), output
    require_flat(rows[len(rows) // 2 - 1 :])


def steps_done(run: Path) -> int:
    log = run / "log.jsonl"
    return log.read_bytes().count(b"\n") if log.exists() else 0


@pytest.mark.slow
@pytest.mark.timeout(SECONDS)
def test_two_thousand_steps_of_pretraining_leave_nothing_behind(tmp_path, small):
    """A process with its loader and a decode worker, on one image a step."""
    own = {"train.steps": 2500, "train.global_clips": 0, "train.global_images": 1, "train.micro_images": 1}
    own |= {"train.checkpoint_every": 2500}  # no commit, which has a thread and files, when one looks
    own |= {"data.size": 32, "data.token_size": 16, "data.short_side": 40, "data.workers": 1, "data.threads": 1}
    (rank,) = start_ranks({**small, **own, "output_dir": tmp_path / "run"}, 1)
    rows, due, deadline = [], 500, time.monotonic() + SECONDS
    while rank.poll() is None and due <= 2000:
        assert time.monotonic() < deadline, rows
        if (done := steps_done(tmp_path / "run")) >= due:
            rows.append({"step": done} | held(str(rank.pid)))
            due = done + 500
        time.sleep(0.05)
    (output,) = wait_for([rank], SECONDS)
    assert rank.returncode == 0 and len(rows) > 3, output
    require_flat(rows, 4 * GROWTH)
