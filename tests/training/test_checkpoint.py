"""The checkpoint folder without torch: damage, kills during a commit, retention, refusals on resume."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bevt_ds.config.parse import set_value
from bevt_ds.config.recipes import get_recipe
from bevt_ds.errors import UserError
from bevt_ds.folders import checkpoints
from bevt_ds.runtime import checkpoint, manifest
from bevt_ds.runtime.checkpoint import Facts, check_continues, find_damage, newest_valid, read_facts
from bevt_ds.runtime.commit import save
from bevt_ds.runtime.distributed import Ranks
from bevt_ds.runtime.run_dir import CHECKPOINTS, choose_folder, write_config
from tests.downstream.worlds import on_ranks

ALONE = Ranks(0, 1, torch.device("cpu"))
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


def test_checkpoints_are_ordered_by_step_whatever_their_times(tmp_path):
    for step, hours in ((2, 9), (10, 1), (7, 5)):
        os.utime(commit(tmp_path, step), (3600 * hours, 3600 * hours))
    assert newest_valid(tmp_path, ALONE)[1].step == 10


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


@pytest.mark.parametrize("damage", ["flip", "cut", "missing", "manifest", "manifest gone"])
def test_damaged_checkpoint_falls_back_to_the_previous_one(tmp_path, damage, capsys):
    commit(tmp_path, 1)
    newest = commit(tmp_path, 2)
    victim = newest / "state" / "a.pt"
    if damage == "flip":
        data = bytearray(victim.read_bytes())
        data[100] ^= 1
        victim.write_bytes(data)
    elif damage == "cut":
        victim.write_bytes(victim.read_bytes()[:-1])
    elif damage == "missing":
        victim.unlink()
    elif damage == "manifest":
        manifest = newest / "manifest.json"
        manifest.write_text(manifest.read_text().replace('"world": 1', '"world": 2'))
    else:
        (newest / "manifest.json").unlink()
    found, facts = newest_valid(tmp_path, ALONE)
    assert facts.step == 1
    assert "step-00000002 is damaged" in capsys.readouterr().out


def test_every_flipped_bit_of_a_checkpoint_is_found(tmp_path):
    folder = commit(tmp_path, 1)
    victim = folder / "state" / "a.pt"
    whole = victim.read_bytes()
    for bit in range(0, 8 * len(whole), 37):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        victim.write_bytes(data)
        assert find_damage(folder, ALONE) is not None
    victim.write_bytes(whole)
    assert find_damage(folder, ALONE) is None


def test_all_checkpoints_damaged_is_an_error(tmp_path):
    folder = commit(tmp_path, 1)
    (folder / "state" / "b.pt").write_bytes(b"")
    with pytest.raises(UserError, match="no checkpoint is whole"):
        newest_valid(tmp_path, ALONE)


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


def test_checkpoint_resumes_on_any_layout_except_earlier_schemas():
    elsewhere = replace(FACTS, world=2, stage=3)
    check_continues(FACTS, elsewhere, Path("x"))
    earlier = replace(FACTS, schema=1)
    check_continues(earlier, earlier, Path("x"))
    with pytest.raises(UserError, match="earlier version.*ranks 1, ZeRO stage 2.*ranks 2, ZeRO stage 3.*as it was"):
        check_continues(earlier, elsewhere, Path("x"))


def test_settings_without_effect_on_the_result_may_change_on_resume():
    now = replace(FACTS, config=set_value(FACTS.config, "train.log_every", 1))
    check_continues(FACTS, now, Path("x"))


def test_checkpoint_of_a_newer_schema_is_refused(tmp_path):
    folder = save(tmp_path, replace(FACTS, schema=manifest.SCHEMA + 1), [write_files], ALONE, 3)
    with pytest.raises(UserError, match="newer"):
        read_facts(folder)


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


def test_manifest_is_readable_json(tmp_path):
    folder = commit(tmp_path, 3)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["step"] == 3
    assert set(manifest["files"]) == {"state/a.pt", "state/b.pt"}
    shutil.rmtree(folder)
