"""Whole runs on a disk that refuses a file or vanishes: one line with what is kept, or the run goes on without it."""

from __future__ import annotations

import json
import os
import shutil
from errno import EACCES, ENOSPC, EROFS
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bevt_ds.config.command_line import run_program
from bevt_ds.disk import DiskError, cannot_write, told
from bevt_ds.eval.visualize import Panel, save_grid
from bevt_ds.exit_codes import DISK, FINISHED
from bevt_ds.runtime.commit import what_is_kept
from bevt_ds.runtime.console import CONSOLE, keep_console
from bevt_ds.runtime.run_dir import replace_folder, restore, write_json
from bevt_ds.train.pretraining import Pretraining
from bevt_ds.train.task import StreamsTask
from tests.downstream.worlds import ALONE
from tests.training.disk_runs import refusing
from tests.training.processes import launch

SLOW_SECONDS = 900  # ten engines, on a machine that may be busy
FULL = os.strerror(ENOSPC)
NOTHING = "No checkpoint is there yet: make room, and start again."
LAST = "Kept: step-00000048, step-00000024. Make room, then continue with resume=auto."


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Path, dict[str, list]]:
    folder = tmp_path_factory.mktemp("runs")
    output = launch(["-m", "tests.training.disk_runs", str(folder)], 1, SLOW_SECONDS)
    assert (folder / "ends.json").exists(), output
    return folder, json.loads((folder / "ends.json").read_text())


@pytest.mark.timeout(SLOW_SECONDS)
@pytest.mark.parametrize(
    ("name", "path", "kept"),
    [
        ("settings", "config.json", NOTHING),
        ("record", "run.json", NOTHING),
        ("commit", "checkpoints/step-00000024", NOTHING),
        ("export", "weights", LAST),
        ("last", "updates.json", LAST),
    ],
)
def test_what_a_run_cannot_write_is_one_line_with_what_is_kept(runs, name, path, kept):
    folder, ends = runs
    code, error, said = ends[name]
    assert code == DISK and "\n" not in error and "Traceback" not in said, said
    assert error.startswith(f"cannot write {folder / name / path}") and FULL in error and "free there" in error
    assert error.endswith(kept)


@pytest.mark.timeout(SLOW_SECONDS)
@pytest.mark.parametrize(
    ("name", "path", "without"),
    [("console", CONSOLE, "it"), ("board", "tensorboard", "TensorBoard"), ("bundle", "nonfinite/step-00000003", "it")],
)
def test_run_goes_on_without_what_it_can_do_without(runs, name, path, without):
    folder, ends = runs
    code, error, said = ends[name]
    assert (code, error) == (FINISHED, "") and "Traceback" not in said, said
    assert said.count(f"cannot write {folder / name / path}") == 1
    assert said.count(f"The run goes on without {without}.") == 1
    assert len((folder / name / "log.jsonl").read_text().splitlines()) == 48


@pytest.mark.timeout(SLOW_SECONDS)
def test_run_that_could_not_write_its_last_files_continues(runs):
    """Its last checkpoint is there, so that only they are made."""
    folder, ends = runs
    assert ends["export again"][:2] == [FINISHED, ""], ends
    assert (folder / "export" / "weights" / "line.pt").exists()


@pytest.mark.timeout(SLOW_SECONDS)
def test_run_whose_folder_vanishes_ends_with_one_line(runs):
    folder, ends = runs
    code, error, said = ends["vanished"]
    assert code == DISK and "\n" not in error and "Traceback" not in said, said
    assert f"cannot write {folder}/vanished/log.jsonl: it has been removed" in error and error.endswith(NOTHING)
    assert not (folder / "vanished").exists(), "it is not made again"


@pytest.mark.parametrize("part", ["panels", "step-00000001.png"])
def test_panel_that_cannot_be_drawn_is_named(tmp_path, part):
    path = tmp_path / "panels" / "step-00000001.png"

    def draw(engine: None, tokens: None, path: Path) -> None:
        path.parent.mkdir(exist_ok=True)
        save_grid([Panel("a", {"input": torch.zeros(4, 4, 3).numpy()})], path)

    targets = SimpleNamespace(fill=lambda batch: batch, draw=draw)
    task = SimpleNamespace(targets=targets, engine=None, ranks=ALONE)
    with refusing(part), pytest.raises(DiskError, match=f"cannot write {path}.*{FULL}; .* free there"):
        Pretraining.draw(task, torch.zeros(1), path)


def test_summary_that_cannot_be_written_is_named_and_the_old_one_stays(tmp_path):
    path = tmp_path / "summary.json"
    write_json(path, {"before": 1})
    task = SimpleNamespace(setup=SimpleNamespace(folder=tmp_path), ranks=ALONE)
    with refusing("summary.json"), pytest.raises(DiskError, match=f"cannot write {path}"):
        StreamsTask.write_summary(task, {"video": 1}, "")
    assert json.loads(path.read_text()) == {"before": 1} and len(list(tmp_path.iterdir())) == 1


def test_folder_that_cannot_be_replaced_stays(tmp_path):
    final = tmp_path / "best"

    def write(text: str, folder: Path) -> None:
        folder.mkdir()
        (folder / "a").write_text(text)

    replace_folder(final, lambda folder: write("one", folder))
    with refusing(".tmp-best/a"), pytest.raises(OSError, match=FULL):
        replace_folder(final, lambda folder: write("two", folder))
    assert (final / "a").read_text() == "one" and list(tmp_path.iterdir()) == [final]
    replace_folder(final, lambda folder: write("two", folder))
    assert (final / "a").read_text() == "two" and list(tmp_path.iterdir()) == [final]


def test_folder_is_there_again_after_a_kill_while_it_was_replaced(tmp_path):
    """Between its two renames; after the second, the new one stays."""
    final, before = tmp_path / "best", tmp_path / ".tmp-before-best"
    before.mkdir()
    (before / "a").write_text("one")
    restore(final)
    assert (final / "a").read_text() == "one" and list(tmp_path.iterdir()) == [final]
    shutil.copytree(final, before)
    (final / "a").write_text("two")
    restore(final)
    assert (final / "a").read_text() == "two" and list(tmp_path.iterdir()) == [final]


def test_failure_that_nothing_foresaw_says_what_is_kept(tmp_path):
    def kept() -> str:
        return what_is_kept(tmp_path)

    for code in (ENOSPC, EROFS):
        with pytest.raises(DiskError, match=f"cannot write /a/b: {os.strerror(code)}.*{NOTHING}"), told(tmp_path, kept):
            raise OSError(code, os.strerror(code), "/a/b")
    with pytest.raises(DiskError, match=f"first {NOTHING}"), told(tmp_path, kept):
        raise DiskError("first")
    with pytest.raises(DiskError, match="^first Kept: it.$"), told(tmp_path, kept):
        raise DiskError("first", "Kept: it.")
    with pytest.raises(PermissionError), told(tmp_path, kept):  # may be a bug
        raise OSError(EACCES, "no", "/a/b")


def test_full_disk_of_any_command_is_one_line(capsys):
    def full(words: list[str]) -> int:
        raise OSError(ENOSPC, FULL, "/a/b")

    assert run_program(full, []) == DISK
    assert capsys.readouterr().err.startswith(f"error: cannot write /a/b: {FULL}; ")


def test_folder_in_the_way_of_the_console_log_is_warned_of(tmp_path, capsys, monkeypatch):
    (tmp_path / CONSOLE).mkdir()
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(f"sys.{name}", getattr(__import__("sys"), name))  # put back at the end
    keep_console(tmp_path)
    print("on it goes")
    said = capsys.readouterr().out
    assert said.count(f"cannot write {tmp_path / CONSOLE}") == 1 and said.endswith("on it goes\n")


def test_copy_of_a_folder_that_fails_is_one_line(tmp_path):
    """shutil.copytree tells of every file."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "file").write_text("x")
    with refusing("b/file"), pytest.raises(shutil.Error) as caught:
        shutil.copytree(tmp_path / "a", tmp_path / "b")
    said = cannot_write(tmp_path / "b", caught.value)
    assert said.startswith(f"cannot write {tmp_path / 'b'}: [Errno {ENOSPC}] {FULL}") and "[(" not in said


def test_size_that_was_needed_is_said(tmp_path):
    with pytest.raises(DiskError, match=r"it needs 1.5 MB, .* free there"), ALONE.writing(tmp_path / "a", 1_500_000):
        raise OSError(ENOSPC, FULL)
