"""The checkpoint folder: commits of several ranks, retention, refusals on resume. Faults: test_commit_faults.py."""

import os
import time
from dataclasses import replace
from pathlib import Path

import pytest

from bevt_ds.config.parse import set_value
from bevt_ds.config.recipes import get_recipe
from bevt_ds.errors import UserError
from bevt_ds.folders import MANIFEST, checkpoints
from bevt_ds.runtime import checkpoint, manifest
from bevt_ds.runtime import commit as committing
from bevt_ds.runtime.checkpoint import Facts, check_continues, find_damage, newest_valid, read_facts
from bevt_ds.runtime.commit import save
from bevt_ds.runtime.distributed import Ranks
from bevt_ds.runtime.manifest import read_manifest
from bevt_ds.runtime.run_dir import CHECKPOINTS, choose_folder, write_config
from tests.downstream.worlds import ALONE, on_ranks

FACTS = Facts(step=1, world=1, stage=2, config=get_recipe("demo"), data="abc", skips={"skips": []})


def write_files(folder: Path) -> None:
    (folder / "state").mkdir()
    (folder / "state" / "a.pt").write_bytes(bytes(range(256)))
    (folder / "state" / "b.pt").write_bytes(b"second" * 10)


def commit(root: Path, step: int, keep: int = 3) -> Path:
    root.parent.mkdir(parents=True, exist_ok=True)
    return save(root, replace(FACTS, step=step), [write_files], ALONE, keep)


def test_newest_whole_checkpoint_is_found_with_its_facts(tmp_path):
    for step in (2, 10, 7):
        commit(tmp_path, step)
    found, facts = newest_valid(tmp_path, ALONE)
    assert found.name == "step-00000010"
    assert facts == replace(FACTS, step=10)


def test_checkpoint_that_one_rank_cannot_see_is_damaged_for_all(tmp_path, monkeypatch):
    """A file server may show one machine what it does not yet show another."""
    for step in (1, 2):
        commit(tmp_path, step)
    seen = checkpoint._damage

    def seen_by(folder: Path, ranks: Ranks) -> list[str]:
        hidden = ranks.rank == 1 and folder.name.endswith("2")
        return seen(tmp_path / "not there" if hidden else folder, ranks)

    monkeypatch.setattr(checkpoint, "_damage", seen_by)
    assert on_ranks(2, lambda ranks: newest_valid(tmp_path, ranks)[1].step) == [1, 1]


def test_nothing_to_continue_from(tmp_path):
    assert newest_valid(tmp_path, ALONE) is None


def test_checkpoint_retention(tmp_path):
    for step in range(1, 6):
        commit(tmp_path, step, keep=2)
    assert [p.name for p in checkpoints(tmp_path)] == ["step-00000005", "step-00000004"]


def test_checkpoint_retention_keeps_the_lowest_loss(tmp_path):
    """A run that goes wrong with finite losses can be begun again from before it did."""
    for step, loss in enumerate((3.0, 2.0, 2.5, 40.0, 41.0), start=1):
        save(tmp_path, replace(FACTS, step=step, loss=loss), [write_files], ALONE, keep=2)
    assert [p.name[-1] for p in checkpoints(tmp_path)] == ["5", "4", "2"]
    (tmp_path / "step-00000002" / "manifest.json").write_text("torn")
    save(tmp_path, replace(FACTS, step=6, loss=30.0), [write_files], ALONE, keep=2)
    assert [p.name[-1] for p in checkpoints(tmp_path)] == ["6", "5"]


@pytest.mark.parametrize(
    ("now", "part"),
    [
        (replace(FACTS, data="xyz"), "other shards"),
        (replace(FACTS, config=set_value(FACTS.config, "optim.eps", 0.1)), "optim.eps"),
    ],
)
def test_checkpoint_of_another_configuration_is_refused(now, part):
    with pytest.raises(UserError, match=part):
        check_continues(FACTS, now, Path("runs/x/checkpoints/step-00000001"))


def test_checkpoint_resumes_on_any_layout_and_with_free_settings_except_earlier_schemas():
    elsewhere = replace(FACTS, world=2, stage=3, config=set_value(FACTS.config, "train.log_every", 1))
    check_continues(FACTS, elsewhere, Path("x"))
    earlier = replace(FACTS, schema=1)
    check_continues(earlier, earlier, Path("x"))
    with pytest.raises(UserError, match="earlier version.*ranks 1, ZeRO stage 2.*ranks 2, ZeRO stage 3.*as it was"):
        check_continues(earlier, elsewhere, Path("x"))


def test_checkpoint_of_a_newer_schema_is_refused(tmp_path):
    folder = save(tmp_path, replace(FACTS, schema=manifest.SCHEMA + 1), [write_files], ALONE, 3)
    with pytest.raises(UserError, match="newer"):
        read_facts(folder)


# The commit: fsync before the rename, and barriers between ranks

LATE = 0.3  # seconds by which a rank lags behind, long enough for the others to run ahead if nothing stops them


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


def test_checkpoint_files_are_fsynced_before_the_rename(tmp_path, monkeypatch):
    calls = record_disk_calls(monkeypatch)
    final = commit(tmp_path, 1)
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
    found, _ = newest_valid(tmp_path, ALONE)
    assert set(read_manifest(found)["files"]) == {"rank-0.pt", "rank-1.pt"}


def test_no_rank_writes_before_the_folder_exists(tmp_path, monkeypatch):
    begin = committing._begin

    def late(aside: Path, needed: int) -> None:
        time.sleep(LATE)
        begin(aside, needed)

    monkeypatch.setattr(committing, "_begin", late)
    on_ranks(2, lambda ranks: save(tmp_path, FACTS, [lambda folder: own_file(ranks, folder)], ranks, keep=2))


def test_no_rank_goes_on_before_the_checkpoint_exists(tmp_path, monkeypatch):
    publish = committing._publish

    def late(aside: Path, final: Path, manifest: str) -> None:
        time.sleep(LATE)
        publish(aside, final, manifest)

    monkeypatch.setattr(committing, "_publish", late)

    def work(ranks: Ranks) -> str | None:
        final = save(tmp_path, FACTS, [lambda folder: own_file(ranks, folder)], ranks, keep=2)
        return None if (final / MANIFEST).is_file() else "missing"

    assert on_ranks(2, work) == [None, None]
    assert on_ranks(2, lambda ranks: find_damage(tmp_path / "step-00000001", ranks)) == [None, None]


# The run's folder


def test_run_folder_is_not_overwritten(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = get_recipe("demo")
    for expected in ("runs/demo", "runs/demo-2", "runs/demo-3"):
        folder = choose_folder(config, ALONE)
        assert str(folder) == expected
        write_config(folder, config)
    commit(Path("runs/demo-2") / CHECKPOINTS, 1)
    assert str(choose_folder(set_value(config, "resume", "auto"), ALONE)) == "runs/demo-2"
    with pytest.raises(UserError, match="holds config.json"):
        choose_folder(set_value(config, "output_dir", "runs/demo"), ALONE)


@pytest.mark.parametrize("name", ["weights", "samples.png", "checkpoints"])
def test_foreign_files_in_the_run_folder_are_not_overwritten(tmp_path, name):
    (tmp_path / name).mkdir()
    for resume in ("never", "auto"):
        config = set_value(set_value(get_recipe("demo"), "output_dir", str(tmp_path)), "resume", resume)
        with pytest.raises(UserError, match=name):
            choose_folder(config, ALONE)


def test_run_does_not_continue_in_the_folder_of_another(tmp_path):
    config = get_recipe("demo")
    for run in ("a", "b"):
        folder = choose_folder(set_value(config, "output_dir", str(tmp_path / run)), ALONE)
        write_config(folder, config)
        for step in (1, 2):
            commit(folder / CHECKPOINTS, step)
    resume = lambda name, folder: set_value(  # noqa: E731
        set_value(config, "resume", str(tmp_path / name / CHECKPOINTS / "step-00000002")), "output_dir", str(folder)
    )
    assert choose_folder(resume("a", tmp_path / "a"), ALONE) == tmp_path / "a"
    assert choose_folder(resume("a", tmp_path / "c"), ALONE) == tmp_path / "c"
    with pytest.raises(UserError, match="holds checkpoints"):
        choose_folder(resume("a", tmp_path / "b"), ALONE)
    older = set_value(resume("a", tmp_path / "a"), "resume", str(tmp_path / "a" / CHECKPOINTS / "step-00000001"))
    with pytest.raises(UserError, match="gone on to step-00000002"):
        choose_folder(older, ALONE)


def test_resume_auto_refuses_another_configuration_before_the_first_checkpoint(tmp_path):
    config = set_value(set_value(get_recipe("demo"), "output_dir", str(tmp_path)), "resume", "auto")
    write_config(choose_folder(config, ALONE), config)
    assert choose_folder(config, ALONE) == tmp_path
    with pytest.raises(UserError, match="optim.eps"):
        choose_folder(set_value(config, "optim.eps", 0.5), ALONE)


def test_unwritable_run_folder_is_named(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(UserError, match="cannot write"):
        choose_folder(set_value(get_recipe("demo"), "output_dir", str(blocked / "run")), ALONE)
