"""Runs with DeepSpeed's engine that are asked to stop, or lose a rank: the regression of stoppable.py, two ranks."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bevt_ds.exit_codes import FINISHED, RANK_LOST, STOPPED
from tests.training.preloaded import Forked
from tests.training.processes import start_python, wait_for
from tests.training.stoppable import HELD_STEP, MEASURED_STEP
from tests.waiting import until

STEPS = 30


class Run:
    """A run in tmp_path/run, started as often as a test wants; see stoppable.py for what holds it."""

    def __init__(self, place: Path) -> None:
        self.place, self.folder = place, place / "run"
        self.ranks: list[Forked] = []

    def start(self, **options: object) -> list[Forked]:
        words = ["-m", "tests.training.stoppable", str(self.folder), json.dumps(options)]
        self.ranks = start_python(words, 2)
        return self.ranks

    def end(self) -> tuple[list[int], list[str]]:
        """Exit code and output of each rank."""
        outputs = wait_for(self.ranks)
        return [rank.returncode for rank in self.ranks], outputs

    def hold(self, gate: str) -> None:
        (self.place / gate).touch()

    def release(self, gate: str) -> None:
        (self.place / gate).unlink()

    def wait_until_held(self, gate: str) -> None:
        self.until((self.place / f"{gate}.reached").exists)

    def until(self, holds: Callable[[], object]) -> None:
        until(holds, self.ranks)

    def log(self) -> list[tuple]:
        return [(line["step"], line["loss"], line["grad_norm"]) for line in self.lines() if "loss" in line]

    def measured(self) -> list[int]:
        return [line["step"] for line in self.lines() if "measured" in line]

    def lines(self) -> list[dict]:
        return [json.loads(line) for line in (self.folder / "log.jsonl").read_text().splitlines()]

    def commits(self) -> list[int]:
        return sorted(int(path.name[-8:]) for path in (self.folder / "checkpoints").glob("step-*"))


@pytest.fixture
def run(tmp_path) -> Iterator[Run]:
    made = Run(tmp_path)
    yield made
    for rank in made.ranks:
        rank.kill()


def test_a_stopped_run_continues_as_if_it_had_not_stopped(run, tmp_path):
    """Stopped in a measurement, and in the middle of a step, by a signal to one rank: all commit, one says so."""
    run.hold("measurement")
    ranks = run.start(steps=STEPS)
    run.wait_until_held("measurement")
    ranks[0].send_signal(signal.SIGTERM)
    assert_stopped(run, "SIGTERM (rank 0)", MEASURED_STEP + 1)
    assert run.measured() == []

    run.release("measurement")
    run.hold("step-0")
    ranks = run.start(steps=STEPS, resume="auto")
    run.wait_until_held("step-0")
    ranks[1].send_signal(signal.SIGUSR1)
    run.release("step-0")
    assert_stopped(run, "SIGUSR1 (rank 1)", HELD_STEP + 1)
    assert run.measured() == [MEASURED_STEP]

    run.start(steps=STEPS, resume="auto")
    codes, outputs = run.end()
    assert codes == [FINISHED] * 2, outputs
    whole = Run(tmp_path / "whole")
    whole.place.mkdir()
    whole.start(steps=STEPS)
    assert whole.end()[0] == [FINISHED] * 2
    assert (run.log(), run.measured()) == (whole.log(), whole.measured())


def assert_stopped(run: Run, by: str, least: int) -> None:
    codes, outputs = run.end()
    assert codes == [STOPPED] * 2, outputs
    done = run.commits()[-1]
    assert done >= least and len(run.log()) == done
    assert f"stopped by {by}; {done} steps are committed; resume=auto continues" in outputs[0]
    assert "stopped" not in outputs[1] and "Traceback" not in outputs[0] + outputs[1]


@pytest.mark.parametrize(
    ("signals", "options", "words"),
    [(2, {}, "stopped at once by SIGTERM, after SIGTERM"), (1, {"grace_seconds": 1}, "train.grace_seconds=1")],
    ids=["second_signal", "grace"],
)
def test_a_commit_that_is_not_waited_for_does_no_harm(run, signals, options, words):
    run.start(**options)
    run.until(lambda: (run.folder / "checkpoints").exists() and run.commits())
    run.hold("save")
    before = run.commits()
    run.ranks[0].send_signal(signal.SIGTERM)
    run.wait_until_held("save")
    while signals == 2 and run.ranks[0].poll() is None:
        run.ranks[0].send_signal(signal.SIGTERM)
        time.sleep(0.5)
    codes, outputs = run.end()
    assert codes == [STOPPED] * 2, outputs
    assert words in outputs[0] and "the commits are whole" in outputs[0]
    assert run.commits()[-1] >= before[-1]

    last = run.commits()[-1]
    run.release("save")
    run.start(steps=last + 1, resume="auto")
    codes, outputs = run.end()
    assert codes[0] in (0, 1) and f"continuing from step {last}" in outputs[0], outputs


@pytest.mark.parametrize("lost", [0, 1])
@pytest.mark.parametrize(
    ("number", "options", "words"),
    [
        (signal.SIGKILL, {}, "has ended without a word"),
        (signal.SIGSTOP, {"rank_deadline": 10}, "has not answered"),
    ],
    ids=["killed", "frozen"],
)
def test_the_other_rank_names_the_lost_one_and_ends(run, lost, number, options, words):
    """Also that the frozen process is gone afterwards: its exit code is of a kill."""
    run.start(**options)
    run.until(lambda: (run.folder / "log.jsonl").exists() and run.log())
    run.ranks[lost].send_signal(number)
    codes, outputs = run.end()
    assert codes[lost] == -signal.SIGKILL and codes[1 - lost] == RANK_LOST, outputs
    said = outputs[1 - lost]
    assert f"error: rank {lost} {words}" in said and ", in step " in said
    assert "Thread 0x" in said and "loop.py" in said  # the stacks


def test_a_rank_that_gets_no_further_shows_its_own_stacks(run):
    run.hold("step-1")
    run.start(rank_deadline=10)
    codes, outputs = run.end()
    assert codes == [RANK_LOST] * 2, outputs
    assert all("error: rank 1 has got no further since" in output for output in outputs)
    assert all(f"in step {HELD_STEP}, step" in output for output in outputs)
    assert 'stoppable.py", line' in outputs[1] and "in hold" in outputs[1]
