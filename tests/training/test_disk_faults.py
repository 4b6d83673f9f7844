"""Disk faults outside commits (full, read-only, gone): each ends all ranks with one line, or is warned of."""

from __future__ import annotations

import errno
import io
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bevt_ds import exit_codes
from bevt_ds.disk import DiskError, in_words, writing
from bevt_ds.model.tensor_file import write_tensors
from bevt_ds.runtime.console import CONSOLE, Tee
from bevt_ds.runtime.distributed import Ranks
from bevt_ds.runtime.run_log import RunLog, keep_before
from bevt_ds.runtime.run_record import RunRecord
from tests.downstream.worlds import ALONE, on_ranks
from tests.training.processes import ROOT, environment


class FullFile(io.RawIOBase):
    """A file on a disk with so many bytes left."""

    def __init__(self, path: Path, left: int) -> None:
        self.name, self._left, self._file = str(path), left, path.open("ab", buffering=0)

    def write(self, data: bytes) -> int:
        if not self._left:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        part = bytes(data)[: self._left]
        self._left -= len(part)
        return self._file.write(part)

    def fileno(self) -> int:
        return self._file.fileno()


@pytest.mark.parametrize("left", [0, 10, 100])
def test_log_line_on_a_full_disk_ends_all_ranks_with_one_message(tmp_path, left):
    def work(ranks: Ranks) -> list[str]:
        with RunLog(tmp_path, ranks, 0) as log:
            if ranks.is_main:
                log._file = FullFile(log._path, left)
            with pytest.raises(DiskError) as caught:
                for step in range(9):
                    log.write(step, {"loss": 1.0})
        assert caught.value.exit_code == exit_codes.DISK
        return [str(caught.value)]

    first, second = on_ranks(2, work)
    assert first == second
    assert f"cannot write {tmp_path}/log.jsonl: No space left on device; " in first[0] and "free there" in first[0]
    with RunLog(tmp_path, ALONE, 9) as log:  # a run that goes on finds whole lines, and its own after them
        log.write(9, {"loss": 2.0})
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [*range(len(lines) - 1), 9]


def test_log_that_has_been_removed_is_named(tmp_path):
    with RunLog(tmp_path, ALONE, 0) as log:
        log.write(0, {"loss": 1.0})
        shutil.rmtree(tmp_path)
        with pytest.raises(DiskError, match=r"log.jsonl: it has been removed; .* does not exist"):
            log.write(1, {"loss": 1.0})


def test_log_continues_when_tensorboard_cannot_be_written(tmp_path, capsys):
    (tmp_path / "tensorboard").write_text("in the way")
    with RunLog(tmp_path, ALONE, 0) as log:
        log.write(0, {"loss": 1.0})
        log.write_image(0, tmp_path / "none.png")
    said = capsys.readouterr().out
    assert said.count("goes on without TensorBoard") == 1 and f"cannot write {tmp_path}/tensorboard" in said
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 1


SMALL_FILES = """
import resource, signal, sys, torch
from pathlib import Path
from bevt_ds.runtime.distributed import Ranks
from bevt_ds.runtime.run_log import RunLog
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
with RunLog(Path(sys.argv[1]), Ranks(0, 1, torch.device("cpu")), 0) as log:
    log.write(0, {"loss": 1.0})
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    for step in range(1, 250):
        log.write(step, {f"n{i}": 1.0 for i in range(4)})
"""


def test_tensorboard_failure_leaves_no_traceback(tmp_path):
    """Its writer has a thread of its own, which would print one."""
    words = [sys.executable, "-c", SMALL_FILES, str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=environment(), timeout=300)
    said = done.stdout + done.stderr
    assert done.returncode == 0 or "DiskError" in said, said
    assert said.count("goes on without TensorBoard") == 1, said
    assert "_AsyncWriterThread" not in said and "Exception in thread" not in said, said


def test_unwritable_console_log_is_warned_of_once(tmp_path):
    screen = io.StringIO()
    tee = Tee(screen, FullFile(tmp_path / CONSOLE, 6))
    for word in ("first", "second", "third"):
        print(word, file=tee)
    assert screen.getvalue().count("The run goes on without it.") == 1
    assert screen.getvalue().splitlines()[-1] == "third"
    assert (tmp_path / CONSOLE).read_text() == "first\n"


def test_torn_line_of_the_log_is_named_and_dropped(tmp_path, capsys):
    path = tmp_path / "log.jsonl"
    lines = ['{"step": 0}', '{"step": 1, "lo', "[1]", '{"step": "2"}', "\0\0", '{"step": 2}', '{"step": 5}']
    path.write_text("\n".join([*lines, '{"step": 3, "cut']))
    keep_before(path, 5)
    assert path.read_text() == '{"step": 0}\n{"step": 2}\n'
    said = capsys.readouterr().out
    assert [f"line {n} is damaged" in said for n in range(1, 9)] == [n in (2, 3, 4, 5) for n in range(1, 9)]


def test_run_record_raises_the_first_failure(tmp_path):
    """The record of the end cannot be written either; the message is that of the cause."""
    with pytest.raises(DiskError, match="the cause"), RunRecord(tmp_path, ALONE, 0):
        shutil.rmtree(tmp_path)
        raise DiskError("the cause")


@pytest.mark.parametrize("position", range(0, 64, 9))
def test_saving_weights_on_a_full_disk_is_one_line(tmp_path, position):
    """The library's own writer raises an exception without the file's name there."""
    tensors = {"a": torch.ones(1000), "b": torch.zeros(10, dtype=torch.int64)}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    write_tensors(tmp_path / "whole", tensors, {})
    size = (tmp_path / "whole").stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (position * size // 64, before[1]))
    try:
        said = pytest.raises(DiskError, match="cannot write .*/part: File too large; .* free there")
        with said, writing(tmp_path / "part"):
            write_tensors(tmp_path / "part", tensors, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_byte_sizes_in_words():
    assert [in_words(n) for n in (0, 999, 1000, 1_500_000_000, 10**18)] == [
        "0 bytes",
        "999 bytes",
        "1.0 kB",
        "1.5 GB",
        "1000000.0 TB",
    ]
