"""Eight SIGKILLs of runs on two ranks, at all ZeRO stages, half of them in a commit: nothing is lost."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch

from tests.training.killed_runs import KILLS, STEPS
from tests.training.preloaded import Forked
from tests.training.processes import start_python
from tests.waiting import until

SLOW_SECONDS = 1800  # nine starts, on a machine that may be busy


def curve(folder: Path) -> list[tuple]:
    lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines]


def end(ranks: list[Forked]) -> str:
    """Wait until all have ended or one is killed, upon which a launcher kills the others; what they said."""
    until(lambda: any(codes := [rank.poll() for rank in ranks]) or None not in codes, told=ranks[0].output.read_text)
    for rank in ranks:
        rank.kill()
    return "\n".join(rank.communicate()[0] for rank in ranks)


@pytest.mark.timeout(SLOW_SECONDS)
def test_runs_killed_at_any_stage_and_in_commits_end_as_if_never_killed(tmp_path):
    for number in range(len(KILLS) + 1):
        ranks = start_python(["-m", "tests.training.killed_runs", str(tmp_path), str(number)], world=2)
        said = end(ranks)
        codes = [rank.returncode for rank in ranks]
        if number == len(KILLS):
            assert codes == [0, 0], said
        else:  # a rank that is to die a moment later may end by itself, because the other is lost
            assert -signal.SIGKILL in (codes[rank] for rank in KILLS[number].ranks), said
    for number, kill in enumerate(KILLS):
        killed, whole = tmp_path / f"{number}", tmp_path / f"{kill.stage}-{kill.precision}-whole"
        assert curve(killed) == curve(whole), kill
        weights = [torch.load(folder / "weights" / "line.pt")["line.weight"] for folder in (killed, whole)]
        assert torch.equal(*weights) and weights[0].abs().sum() > 0, kill
        assert json.loads((killed / "updates.json").read_text()) == len(curve(killed)) == STEPS, kill
        assert not list(killed.glob("checkpoints/.tmp*")), kill
