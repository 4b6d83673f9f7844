"""The checkpoint commit: fsync before the rename, and barriers between ranks."""

import os
import time
from pathlib import Path

from bevt_ds.config.recipes import get_recipe
from bevt_ds.folders import MANIFEST
from bevt_ds.runtime import commit
from bevt_ds.runtime.checkpoint import Facts, find_damage, newest_valid
from bevt_ds.runtime.commit import save
from bevt_ds.runtime.distributed import Ranks
from bevt_ds.runtime.manifest import read_manifest
from tests.downstream.worlds import on_ranks

LATE = 0.3  # seconds by which a rank lags behind, long enough for the others to run ahead if nothing stops them
FACTS = Facts(step=1, world=2, stage=2, config=get_recipe("demo"), data="abc", skips={})


def record_disk_calls(monkeypatch) -> list[tuple[str, str]]:
    """("sync", path) of every fsync and ("rename", target) of every rename from now on, in order."""
    calls, fsync, rename = [], os.fsync, os.replace

    def recorded_fsync(handle: int) -> None:
        calls.append(("sync", os.readlink(f"/proc/self/fd/{handle}")))
        fsync(handle)

    def recorded_rename(source, target) -> None:
        calls.append(("rename", str(target)))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "replace", recorded_rename)
    return calls


def write_files(folder: Path) -> None:
    (folder / "state").mkdir()
    for name in ("a.pt", "b.pt"):
        (folder / "state" / name).write_bytes(name.encode() * 100)


def test_checkpoint_files_are_fsynced_before_the_rename(tmp_path, monkeypatch):
    calls = record_disk_calls(monkeypatch)
    (final,) = on_ranks(1, lambda ranks: save(tmp_path, FACTS, [write_files], ranks, keep=2))
    renamed = calls.index(("rename", str(final)))
    aside = tmp_path / f".tmp-{final.name}"
    synced = {path for call, path in calls[:renamed] if call == "sync"}
    assert {str(aside / "state" / "a.pt"), str(aside / "state" / "b.pt"), str(aside)} <= synced
    assert {str(aside / "state"), str(aside / MANIFEST)} <= synced
    assert ("sync", str(tmp_path)) in calls[renamed:], "the folder that holds the new name"


def own_file(ranks: Ranks, folder: Path) -> None:
    """What each rank writes."""
    (folder / f"rank-{ranks.rank}.pt").write_bytes(bytes(1000))


def test_commit_waits_for_a_slow_rank(tmp_path):
    """Rank 1 writes late: the manifest that rank 0 seals names its file all the same."""

    def work(ranks: Ranks) -> None:
        def write(folder: Path) -> None:
            time.sleep(LATE * ranks.rank)
            own_file(ranks, folder)

        save(tmp_path, FACTS, [write], ranks, keep=2)

    on_ranks(2, work)
    found, facts = on_ranks(1, lambda ranks: newest_valid(tmp_path, ranks))[0]
    assert facts == FACTS
    assert set(read_manifest(found)["files"]) == {"rank-0.pt", "rank-1.pt"}


def test_no_rank_writes_before_the_folder_exists(tmp_path, monkeypatch):
    begin = commit._begin

    def late(aside: Path, needed: int) -> None:
        time.sleep(LATE)
        begin(aside, needed)

    monkeypatch.setattr(commit, "_begin", late)
    on_ranks(2, lambda ranks: save(tmp_path, FACTS, [lambda folder: own_file(ranks, folder)], ranks, keep=2))


def test_no_rank_goes_on_before_the_checkpoint_exists(tmp_path, monkeypatch):
    publish = commit._publish

    def late(aside: Path, final: Path, manifest: str) -> None:
        time.sleep(LATE)
        publish(aside, final, manifest)

    monkeypatch.setattr(commit, "_publish", late)

    def work(ranks: Ranks) -> str | None:
        final = save(tmp_path, FACTS, [lambda folder: own_file(ranks, folder)], ranks, keep=2)
        return None if (final / MANIFEST).is_file() else "missing"

    assert on_ranks(2, work) == [None, None]
    assert on_ranks(2, lambda ranks: find_damage(tmp_path / "step-00000001", ranks)) == [None, None]
