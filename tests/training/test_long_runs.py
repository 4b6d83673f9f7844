"""2,000 steps leave memory, threads and open files as they were."""

from __future__ import annotations

import pytest

from tests.training.long_run import STEPS, STRIDE
from tests.training.processes import launch_rows

SECONDS = 3600  # on a machine that may be busy
GROWTH = 2 << 20  # bytes between steps 1,000 and 2,000; before, torch keeps the last collectives


@pytest.mark.timeout(SECONDS)
def test_two_thousand_steps_with_log_lines_and_commits_leave_nothing_behind(tmp_path):
    rows = launch_rows("long_run", tmp_path, 1, seconds=SECONDS)
    assert [row["step"] for row in rows] == list(range(STRIDE, STEPS + 1, STRIDE)), rows
    half, last = rows[len(rows) // 2 - 1], rows[-1]
    assert last["memory"] - half["memory"] < GROWTH, rows
    assert last["threads"] <= half["threads"] and last["files"] <= half["files"], rows
