"""The lock of a run folder: one run at a time, killed owners, file systems without locks."""

from __future__ import annotations

import errno
import json
import os
import re
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from bevt_ds import UserError
from bevt_ds.config.parse import set_value
from bevt_ds.config.recipes import get_recipe
from bevt_ds.folders import MANIFEST
from bevt_ds.runtime.lock import LOCK, hold
from bevt_ds.runtime.run_dir import choose_folder, write_config
from tests.downstream.worlds import ALONE

HOLDER = """
import sys, pathlib
from bevt_ds.runtime.lock import hold
assert hold(pathlib.Path(sys.argv[1])) is None
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def held_by_another(tmp_path, monkeypatch):
    """runs/demo, empty, and the process that holds its lock."""
    monkeypatch.chdir(tmp_path)
    folder = Path("runs/demo")
    folder.mkdir(parents=True)
    command = [sys.executable, "-c", HOLDER, str(folder)]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "held\n"
    yield folder, other
    other.kill()
    other.communicate()


def test_run_lock_names_the_other_process(held_by_another):
    folder, other = held_by_another
    assert f"process {other.pid} on " in hold(folder)
    config = set_value(get_recipe("demo"), "output_dir", str(folder))
    with pytest.raises(UserError, match=f"in use by another run .process {other.pid}"):
        choose_folder(config, ALONE)


def test_second_run_with_resume_auto_is_refused(held_by_another):
    """Named or found by itself; once the first has been killed its lock is stale, and the run goes on."""
    folder, other = held_by_another
    named = replace(get_recipe("demo"), resume="auto", output_dir=str(folder))
    write_config(folder, named)
    (folder / "checkpoints" / "step-00000002").mkdir(parents=True)
    (folder / "checkpoints" / "step-00000002" / MANIFEST).write_text("{}")
    for config in (named, replace(named, output_dir="")):
        owner = rf"process {other.pid} on {re.escape(socket.gethostname())}, since 20\d\d-"
        with pytest.raises(UserError, match=rf"output_dir={folder} is in use by another run \({owner}"):
            choose_folder(config, ALONE)
    other.kill()
    other.wait()
    assert choose_folder(named, ALONE) == folder
    assert json.loads((folder / LOCK).read_text())["pid"] == os.getpid(), "the stale lock names its new owner"


def test_unnamed_run_takes_the_next_folder(held_by_another):
    assert choose_folder(get_recipe("demo"), ALONE) == Path("runs/demo-2")


def test_lock_of_a_killed_process_is_free(held_by_another):
    folder, other = held_by_another
    other.kill()
    other.wait()
    assert hold(folder) is None
    assert hold(folder) is None, "this process may ask again"


def test_lock_without_owner_facts_is_named(held_by_another):
    folder, _ = held_by_another
    (folder / ".lock").write_text("")
    assert hold(folder) == "another process"


def test_file_system_without_locks_is_named(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("bevt_ds.runtime.lock.fcntl.flock", refuse)
    with pytest.warns(UserWarning, match="has no file locks"):
        assert hold(tmp_path) is None
