"""Commits in the background: one at a time, ended on exit, and failures reach all ranks after the same step."""

from __future__ import annotations

import errno
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bevt_ds.config.recipes import get_recipe
from bevt_ds.disk import DiskError
from bevt_ds.errors import UserError
from bevt_ds.runtime.background import Commits
from bevt_ds.runtime.checkpoint import Facts, newest_valid
from bevt_ds.runtime.commit import save
from bevt_ds.runtime.distributed import Ranks
from tests.downstream.worlds import on_ranks

FACTS = Facts(step=1, world=2, stage=2, config=get_recipe("demo"), data="abc", skips={})
PATIENCE = 60  # seconds for what should take no time


def begin(commits: Commits, root: Path, step: int, own: Ranks, gate: threading.Event | None = None) -> None:
    """Start a commit, whose writing waits for the gate."""

    def write(folder: Path) -> None:
        if gate:
            assert gate.wait(PATIENCE)
        (folder / f"rank-{own.rank}").write_text(str(step))

    commits.begin()
    commits.start(lambda ranks: save(root, replace(FACTS, step=step), [write], ranks, keep=3))


def test_steps_go_on_while_a_commit_is_written(tmp_path):
    gate = threading.Event()

    def work(ranks: Ranks) -> None:
        with Commits(ranks) as commits:
            begin(commits, tmp_path, 1, ranks, gate)
            for _ in range(5):
                commits.poll()
                assert ranks.sum_counts([1]) == [2], "collectives of the training, next to those of the commit"
            assert not list(tmp_path.glob("step-*"))
            assert commits.figures() == {}
            ranks.barrier()
            gate.set()

    on_ranks(2, work)
    assert newest_valid(tmp_path, Ranks(0, 1, torch.device("cpu")))[1].step == 1, "leaving the block waits"


def test_time_of_a_commit_and_of_the_wait_are_told_once(tmp_path):
    def work(ranks: Ranks) -> None:
        with Commits(ranks) as commits:
            begin(commits, tmp_path, 1, ranks)
            commits.wait()
            figures = commits.figures()
            assert 0 <= figures["commit_stall"] <= figures["commit_seconds"] < PATIENCE
            assert commits.figures() == {}

    on_ranks(2, work)


def test_commits_are_written_one_at_a_time(tmp_path):
    at_work = []

    def work(ranks: Ranks) -> None:
        def write(folder: Path) -> None:
            at_work.append(1)
            time.sleep(0.05)
            (folder / f"rank-{ranks.rank}").write_text(str(len(at_work)))
            at_work.pop()

        with Commits(ranks) as commits:
            for step in range(1, 6):
                commits.begin()
                assert not at_work
                ranks.barrier()
                facts = replace(FACTS, step=step)
                commits.start(lambda apart, facts=facts: save(tmp_path, facts, [write], apart, keep=9))

    on_ranks(2, work)
    assert len(list(tmp_path.glob("step-*"))) == 5 and not list(tmp_path.glob(".tmp*"))


def test_failed_commit_is_raised_on_all_ranks_after_the_same_step(tmp_path):
    def work(ranks: Ranks) -> tuple[int, str]:
        def write(folder: Path) -> None:
            if ranks.rank == 1:
                raise OSError(errno.ENOSPC, "No space left on device")

        done = 0
        with pytest.raises(DiskError) as caught, Commits(ranks) as commits:
            commits.begin()
            commits.start(lambda apart: save(tmp_path, FACTS, [write], apart, keep=3))
            for done in range(10_000):  # noqa: B007  (it is told)
                commits.poll()
                ranks.barrier()
        return done, str(caught.value)

    first, second = on_ranks(2, work)
    assert first == second and "No space left on device" in first[1]
    assert not list(tmp_path.iterdir())


def test_what_ended_the_training_is_not_hidden_by_a_failed_commit(tmp_path):
    def refuse(_: Ranks) -> None:
        raise DiskError("full")

    with pytest.raises(UserError, match="diverged"), Commits(Ranks(0, 1, torch.device("cpu"))) as commits:
        commits.begin()
        commits.start(refuse)
        raise UserError("diverged")
    with pytest.raises(DiskError, match="full"), Commits(Ranks(0, 1, torch.device("cpu"))) as commits:
        commits.begin()
        commits.start(refuse)
        raise KeyboardInterrupt
