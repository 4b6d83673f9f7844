"""Faults of a commit, without an engine: a kill at any call, a disk that fills up, damage of any file, forged files."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bevt_ds import exit_codes
from bevt_ds.config.recipes import get_recipe
from bevt_ds.disk import DiskError
from bevt_ds.errors import UserError
from bevt_ds.folders import MANIFEST, checkpoints
from bevt_ds.runtime import commit
from bevt_ds.runtime.checkpoint import Facts, find_damage, newest_valid
from bevt_ds.runtime.commit import save
from bevt_ds.runtime.distributed import Ranks
from bevt_ds.runtime.manifest import read_manifest, self_digest
from bevt_ds.runtime.pieces import Snapshot
from tests.downstream.worlds import ALONE, on_ranks

FACTS = Facts(step=1, world=1, stage=2, config=get_recipe("demo"), data="abc", skips={})
FLIPS = 10_000
CALLS = ("mkdir", "fsync", "replace", "unlink", "rmdir", "open")  # of os, besides what a file writes


@pytest.fixture(autouse=True)
def _quick_disk(monkeypatch):
    """Hundreds of commits are written here, and no power fails: a call that waits for the disk comes back at once."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def write_part(folder: Path, rank: int = 0) -> None:
    """What a rank writes."""
    tensors = {f"weights/layer.{i}": torch.arange(40.0) + i + rank for i in range(3)}
    counters = {"updates": 1, "shapes": {f"layer.{i}": [40] for i in range(3)}}
    starts = {f"layer.{i}": 40 * rank for i in range(3)}
    Snapshot(tensors, starts, {"frozen": torch.ones(3)}, counters).write(folder / "state", rank)


def commit_step(root: Path, step: int, keep: int = 2, ranks: Ranks = ALONE, needed: int = 0) -> Path:
    facts = replace(FACTS, step=step, loss=-float(step))
    return save(root, facts, [lambda folder: write_part(folder, ranks.rank)], ranks, keep, needed)


# Kills


class Counted:
    """A file, or its writes: every call is one more point at which the process can be killed."""

    def __init__(self, file: Any, point: Callable[[], None]) -> None:
        self._file, self._point = file, point

    def write(self, data: Any) -> int:
        self._point()
        half = len(data) // 2
        self._file.write(data[:half])
        self._file.flush()
        self._point()  # half of it is there
        return half + self._file.write(data[half:])

    def __enter__(self) -> Counted:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@contextmanager
def points(reach: Callable[[], None]) -> Iterator[None]:
    """Call `reach` before and after every call to the file system that changes something."""
    kept = {name: getattr(os, name) for name in CALLS} | {"io": io.open}

    def around(real: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            reach()
            result = real(*args, **kwargs)
            reach()
            return result

        return call

    def opened(*args: Any, **kwargs: Any) -> Any:
        mode = args[1] if len(args) > 1 else kwargs.get("mode", "r")
        file = kept["io"](*args, **kwargs)
        return Counted(file, reach) if "w" in mode else file

    for name in CALLS:
        setattr(os, name, around(kept[name]))
    io.open = opened
    try:
        yield
    finally:
        for name in CALLS:
            setattr(os, name, kept[name])
        io.open = kept["io"]


def killed_at(point: int, work: Callable[[], object]) -> bool:
    """Do `work` in a child that is killed at its `point`-th call; whether it came so far."""
    child = os.fork()
    if child == 0:
        left = point

        def reach() -> None:
            nonlocal left
            left -= 1
            if left < 0:
                os._exit(9)  # no handler, no `finally`, nothing flushed

        with points(reach):
            work()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def test_kill_at_every_file_system_call_of_a_commit(tmp_path):
    """The commit before or the new one is whole; the next commit works, and sweeps what was left. Only one is kept."""
    point = 0
    while True:
        root = tmp_path / str(point)
        commit_step(root, 1, keep=1)
        if not killed_at(point, lambda root=root: commit_step(root, 2, keep=1)):
            break
        assert newest_valid(root, ALONE)[1].step in (1, 2), point
        commit_step(root, 3, keep=1)
        assert newest_valid(root, ALONE)[1].step == 3
        assert [path.name for path in root.iterdir() if path.name.startswith(".tmp")] == []
        shutil.rmtree(root)
        point += 1
    assert point > 55, "the calls are no longer seen"
    assert newest_valid(root, ALONE)[1].step == 2


def test_kill_while_the_same_step_is_replaced(tmp_path):
    """The commit before stays, whatever happens to the damaged one that is replaced."""
    point = 0
    while True:
        root = tmp_path / str(point)
        commit_step(root, 1)
        (commit_step(root, 2) / MANIFEST).unlink()
        if not killed_at(point, lambda root=root: commit_step(root, 2)):
            break
        assert newest_valid(root, ALONE)[1].step in (1, 2), point
        shutil.rmtree(root)
        point += 1
    assert newest_valid(root, ALONE)[1].step == 2


def test_rank_that_dies_in_a_commit_leaves_the_one_before(tmp_path):
    """On two ranks: what one of them cannot do, both give up."""
    on_ranks(2, lambda ranks: commit_step(tmp_path, 1, ranks=ranks))

    def work(ranks: Ranks) -> str:
        def write(folder: Path) -> None:
            if ranks.rank == 1:
                raise OSError(errno.EIO, "Input/output error", str(folder / "state"))
            write_part(folder, ranks.rank)

        with pytest.raises(DiskError) as caught:
            save(tmp_path, replace(FACTS, step=2), [write], ranks, keep=2)
        return str(caught.value)

    first, second = on_ranks(2, work)
    assert first == second
    assert "step-00000002" in first and "Input/output error" in first and "Kept: step-00000001" in first
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


# Disks


@pytest.mark.parametrize("position", range(64))
def test_disk_that_fills_up_anywhere_costs_no_commit(tmp_path, monkeypatch, position):
    commit_step(tmp_path, 1)
    total = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    left, real = position * total // 64, io.open

    class Filling(Counted):
        def write(self, data: Any) -> int:
            nonlocal left
            data = data.encode() if isinstance(data, str) else bytes(data)
            if len(data) > left:
                self._file.write(data[:left])
                left = 0
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            left -= len(data)
            return self._file.write(data)

    def opened(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        return Filling(real(file, "wb"), lambda: None) if "w" in mode else real(file, mode, *args, **kwargs)

    monkeypatch.setattr(io, "open", opened)
    with pytest.raises(DiskError) as caught:
        commit_step(tmp_path, 2)
    monkeypatch.undo()
    assert caught.value.exit_code == exit_codes.DISK
    message = str(caught.value)
    assert "\n" not in message and "step-00000002: No space left on device" in message and "free there" in message
    assert "Kept: step-00000001. Make room, then continue with resume=auto." in message
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert newest_valid(tmp_path, ALONE)[1].step == 1
    commit_step(tmp_path, 2)
    assert newest_valid(tmp_path, ALONE)[1].step == 2


def test_free_space_is_checked_before_a_commit(tmp_path):
    commit_step(tmp_path, 1)
    with pytest.raises(DiskError, match=r"step-00000002: it needs 1000000.0 TB; .* free there.*Kept: step-00000001"):
        commit_step(tmp_path, 2, needed=10**18)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


@pytest.mark.parametrize("code", [errno.EDQUOT, errno.EROFS, errno.EIO, errno.EACCES, errno.ESTALE])
@pytest.mark.parametrize("call", ["mkdir", "fsync", "replace"])
def test_disk_errors_other_than_full_cost_no_commit(tmp_path, monkeypatch, code, call):
    commit_step(tmp_path, 1)

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, call, refuse)
    with pytest.raises(DiskError, match=f"step-00000002: {os.strerror(code)}.*Kept: step-00000001"):
        commit_step(tmp_path, 2)
    monkeypatch.undo()
    assert newest_valid(tmp_path, ALONE)[1].step == 1


def test_vanished_folder_is_named(tmp_path):
    root = tmp_path / "run" / "checkpoints"
    with pytest.raises(DiskError, match=f"{tmp_path}/run/checkpoints does not exist.*No checkpoint is there yet"):
        commit_step(root, 1)
    assert not root.parent.exists(), "a folder that someone has removed is not made again"


# Damage


def damage(path: Path, kind: str) -> str:
    """Do something to a file of a commit; returns a part of what must be said of it."""
    data = path.read_bytes()
    if kind == "cut":
        path.write_bytes(data[:-1])
    elif kind == "bit":
        path.write_bytes(bytes([data[0] ^ 1]) + data[1:])
        return "has changed" if path.name != MANIFEST else "is not JSON"
    elif kind == "removed":
        path.unlink()
        return "is missing" if path.name != MANIFEST else f"has no {MANIFEST}"
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "link":
        shutil.move(path, path.parents[3] / "elsewhere")
        path.symlink_to(path.parents[3] / "elsewhere")
        return "is a link" if path.name != MANIFEST else f"has no {MANIFEST}"
    else:
        path.write_bytes(data + b"x")
    return f"has {path.stat().st_size:,} bytes, not {len(data):,}" if path.name != MANIFEST else "is not JSON"


@pytest.mark.parametrize("kind", ["cut", "bit", "removed", "empty", "link", "larger"])
def test_damage_of_any_commit_file_falls_back_to_the_commit_before(tmp_path, kind, capsys):
    root = tmp_path / "deeper" / "checkpoints"
    root.parent.mkdir()
    commit_step(root, 1)
    whole = commit_step(root, 2)
    names = [path.relative_to(whole) for path in whole.rglob("*") if path.is_file()]
    assert len(names) == 4
    shutil.copytree(whole, tmp_path / "copy")
    for name in names:
        said = damage(whole / name, kind)
        _, facts = newest_valid(root, ALONE)
        printed = capsys.readouterr().out
        assert facts.step == 1
        assert "step-00000002 is damaged" in printed and name.name in printed and said in printed, printed
        shutil.rmtree(whole)
        shutil.copytree(tmp_path / "copy", whole)
    assert newest_valid(root, ALONE)[1].step == 2


def test_added_files_and_links_are_named(tmp_path):
    whole = commit_step(tmp_path, 1)
    (whole / "state" / "zero_to_fp32.py").write_text("import os")
    (whole / "more").symlink_to(tmp_path)
    assert find_damage(whole, ALONE) == "more is a link; state/zero_to_fp32.py was added"


def test_bit_flips_anywhere_are_found(tmp_path):
    """10,000 random (file, bit) of a commit, its manifest among them."""
    whole, rng, found = commit_step(tmp_path, 1), random.Random(0), 0
    files = {path: path.read_bytes() for path in sorted(whole.rglob("*")) if path.is_file()}
    sizes = [len(data) for data in files.values()]
    for path in rng.choices(list(files), sizes, k=FLIPS):
        bit = rng.randrange(8 * len(files[path]))
        data = bytearray(files[path])
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        found += find_damage(whole, ALONE) is not None
        path.write_bytes(files[path])
    assert found == FLIPS
    assert find_damage(whole, ALONE) is None


def test_no_whole_commit_refuses_a_fresh_start(tmp_path):
    for step in (1, 2):
        (commit_step(tmp_path, step) / MANIFEST).unlink()
    with pytest.raises(UserError, match="no checkpoint is whole. Move the folder away to start again from step 0"):
        newest_valid(tmp_path, ALONE)


def test_damaged_commit_does_not_count_for_retention(tmp_path):
    """A damaged later one neither saves itself nor costs the one just written."""
    commit_step(tmp_path, 1, keep=1)
    (commit_step(tmp_path, 9, keep=2) / "state" / "counters.json").unlink()
    commit_step(tmp_path, 2, keep=1)
    assert newest_valid(tmp_path, ALONE)[1].step == 2
    commit_step(tmp_path, 9, keep=1)
    assert newest_valid(tmp_path, ALONE)[1].step == 9
    assert [path.name[-1] for path in checkpoints(tmp_path)] == ["9"]


@pytest.mark.parametrize("world", [1, 2])
def test_nothing_is_removed_for_a_commit_that_the_disk_gives_back_otherwise(tmp_path, monkeypatch, world):
    """All ranks say so, and the run would continue from the one before."""
    commit_step(tmp_path, 1, keep=1)
    publish = commit._publish

    def publish_and_spoil(aside: Path, final: Path, text: str) -> None:
        publish(aside, final, text)
        (final / "state" / "counters.json").write_text("0")

    monkeypatch.setattr(commit, "_publish", publish_and_spoil)

    def work(ranks: Ranks) -> str:
        with pytest.raises(DiskError) as caught:
            commit_step(tmp_path, 2, keep=1, ranks=ranks)
        return str(caught.value)

    (said,) = set(on_ranks(world, work))
    assert said.startswith(f"{tmp_path}/step-00000002 is not as it was written: state/counters.json has")
    assert said.endswith("Kept: step-00000001; resume=auto continues there.")
    monkeypatch.undo()
    assert newest_valid(tmp_path, ALONE)[1].step == 1
    commit_step(tmp_path, 2, keep=1)
    assert [path.name[-1] for path in checkpoints(tmp_path)] == ["2"]


def test_file_times_and_pointers_do_not_choose_the_commit(tmp_path):
    for step in (2, 10, 7):
        commit_step(tmp_path, step, keep=3)
    os.utime(tmp_path / "step-00000002", (2**31, 2**31))
    for content in ("", "\0\0", "step-00000002", "step-99999999", "x" * 1_000_000):
        (tmp_path / "latest").write_text(content)
        assert newest_valid(tmp_path, ALONE)[1].step == 10
    (tmp_path / "latest").unlink()
    (tmp_path / "latest").symlink_to("/")
    assert newest_valid(tmp_path, ALONE)[1].step == 10


FORGED = {
    "files a list": {"files": []},
    "files text": {"files": "x"},
    "entry a list": {"files": {"a": []}},
    "size text": {"files": {"a": {"size": "1", "sha256": ""}}},
    "up": {"files": {"../../x": {"size": 1, "sha256": ""}}},
    "up inside": {"files": {"state/../../x": {"size": 1, "sha256": ""}}},
    "absolute": {"files": {"/etc/passwd": {"size": 1, "sha256": ""}}},
    "doubled": {"files": {"state//counters.json": {"size": 1, "sha256": ""}}},
    "nothing": {"files": {"": {"size": 1, "sha256": ""}}},
    "NUL": {"files": {"a\0b": {"size": 1, "sha256": ""}}},
    "step text": {"step": "1"},
    "step a truth": {"step": True},
    "another step": {"step": 7},
    "world missing": {"world": None},
    "config a list": {"config": []},
    "skips a list": {"skips": []},
    "changes text": {"changes": "x"},
    "loss text": {"loss": "low"},
    "schema text": {"schema": "2"},
    "schema new": {"schema": 99},
}


@pytest.mark.parametrize("name", FORGED)
def test_forged_manifest_is_named(tmp_path, name, capsys):
    """Whoever makes a manifest can make its digest too."""
    commit_step(tmp_path, 1)
    forged = commit_step(tmp_path, 2)
    manifest = read_manifest(forged) | FORGED[name]
    (forged / MANIFEST).write_text(json.dumps(manifest | {"digest": self_digest(manifest)}))
    assert newest_valid(tmp_path, ALONE)[1].step == 1
    assert "step-00000002 is damaged" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["", "[" * 100_000, "null", "[]", '{"digest": 1}', "\0", "1" * 5000])
def test_invalid_manifest_is_named(tmp_path, text):
    folder = commit_step(tmp_path, 1)
    (folder / MANIFEST).write_text(text)
    assert MANIFEST in find_damage(folder, ALONE)


def test_manifest_of_any_size_is_not_read_into_memory(tmp_path):
    folder = commit_step(tmp_path, 1)
    with (folder / MANIFEST).open("r+b") as file:
        file.truncate(1 << 34)
    assert "more than 67,108,864 bytes" in find_damage(folder, ALONE)


def test_manifest_digest_is_that_of_the_file(tmp_path):
    folder = commit_step(tmp_path, 1)
    for name, entry in read_manifest(folder)["files"].items():
        assert entry["sha256"] == hashlib.sha256((folder / name).read_bytes()).hexdigest()
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < commit.RESERVE
