"""`bevt checkpoint`: what is there, whether it is whole, what differs, and the weights of one."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from bevt_ds import cli
from bevt_ds.config.parse import set_value
from bevt_ds.config.recipes import get_recipe
from bevt_ds.exit_codes import DISK, NON_FINITE
from bevt_ds.folders import MANIFEST
from bevt_ds.model.tensor_file import write_tensors
from bevt_ds.runtime.checkpoint import Facts
from bevt_ds.runtime.commit import save
from bevt_ds.runtime.pieces import SavedPieces, Snapshot
from tests.downstream.worlds import ALONE
from tests.training.disk_runs import refusing

FACTS = Facts(step=1, world=1, stage=2, config=get_recipe("demo"), data="abc", skips={}, loss=2.5)
SHAPES = {"a.weight": [2, 3], "b": [4]}


def commit(root: Path, facts: Facts = FACTS, **changed: Tensor) -> Path:
    """A checkpoint with an average; `changed` are tensors other than usual, by KIND_NAME."""
    kinds = ("weights", "exp_avg", "exp_avg_sq", "average")
    tensors = {
        f"{k}/{n}": torch.full((6 if n[0] == "a" else 4,), float(i)) for i, k in enumerate(kinds) for n in SHAPES
    }
    tensors |= {key.replace("__", "/"): value for key, value in changed.items()}
    snapshot = Snapshot(tensors, dict.fromkeys(SHAPES, 0), {"frozen": torch.ones(2)}, {"shapes": SHAPES})

    def write_weights(folder: Path) -> None:
        (folder / "weights").mkdir()
        (folder / "weights" / "config.json").write_text("{}")
        with SavedPieces(folder / "state") as saved:
            write_tensors(folder / "weights" / "model.safetensors", saved.weights(), {})

    root.mkdir(parents=True, exist_ok=True)
    stages = [lambda folder: snapshot.write(folder / "state", 0), write_weights]
    return save(root / "checkpoints", facts, stages, ALONE, keep=9)


def run(capsys, *words: object) -> tuple[int, str]:
    code = cli.main(["checkpoint", *map(str, words)])
    return code, capsys.readouterr().out


def test_checkpoints_of_a_run_are_listed_and_verified(tmp_path, capsys):
    run_folder = tmp_path / "run"
    for step in (1, 2, 3):
        commit(run_folder, replace(FACTS, step=step, loss=None if step == 3 else 2.5))
    code, text = run(capsys, "ls", run_folder)
    rows = [line.split() for line in text.splitlines()]
    assert code == 0 and len(rows) == 4
    assert [row[:6] for row in rows[1:]] == [
        ["step-00000003", "3", "1", "2", "fp32", "-"],
        ["step-00000002", "2", "1", "2", "fp32", "2.5000"],
        ["step-00000001", "1", "1", "2", "fp32", "2.5000"],
    ]
    assert run(capsys, "verify", run_folder)[0] == 0

    second, first = (run_folder / "checkpoints" / f"step-0000000{n}" for n in (2, 1))
    data = bytearray((second / "state" / "rank-00000.safetensors").read_bytes())
    data[-1] ^= 1
    (second / "state" / "rank-00000.safetensors").write_bytes(data)
    (first / MANIFEST).unlink()
    code, text = run(capsys, "ls", run_folder)
    assert code == 1 and f"has no {MANIFEST}" in text.splitlines()[3] and text.splitlines()[2].endswith("there")
    code, text = run(capsys, "verify", run_folder)
    lines = text.splitlines()
    assert code == 1 and lines[0].endswith(": whole")
    assert "step-00000002: state/rank-00000.safetensors has changed" in lines[1] and "has no" in lines[2]
    assert run(capsys, "verify", run_folder / "checkpoints" / "step-00000003")[0] == 0
    assert run(capsys, "verify", second)[0] == 1


def test_differences_of_two_checkpoints_are_shown(tmp_path, capsys):
    first = commit(tmp_path / "a")
    assert run(capsys, "diff", first, tmp_path / "a") == (0, "no difference\n")
    other = set_value(FACTS.config, "optim.lr", 0.5)
    changed = {"exp_avg__b": torch.tensor([1.0, 1.0, 1.0, 3.5]), "weights__b": torch.full((4,), float("nan"))}
    second = commit(tmp_path / "b", replace(FACTS, world=4, config=other), **changed)
    code, text = run(capsys, "diff", first, second)
    rows = [line.split() for line in text.splitlines()]
    assert code == 1
    assert ["world", "1", "4"] in rows and ["optim.lr", str(FACTS.config.optim.lr), "0.5"] in rows
    assert (
        "2 of 9 tensors differ" in text
        and ["exp_avg/b", "2.5"] in rows
        and ["weights/b", "only", "in", "one"] not in rows
    )
    assert "step" not in {row[0] for row in rows if row}


def test_checkpoints_of_an_earlier_version_differ_by_their_weights(tmp_path, capsys):
    first = commit(tmp_path / "a", replace(FACTS, schema=1))
    second = commit(tmp_path / "b", replace(FACTS, schema=1), average__b=torch.full((4,), 3.5))
    code, text = run(capsys, "diff", first, second)
    assert code == 1 and "1 of 3 tensors differ" in text and text.split()[-2:] == ["b", "0.5"]


@pytest.mark.parametrize(("options", "value"), [([], 3.0), (["--raw"], 0.0)])
def test_weights_of_a_checkpoint_are_exported(tmp_path, capsys, options, value):
    """What is exported is the average where the run keeps one, unless --raw."""
    commit(tmp_path / "run")
    code, text = run(capsys, "export", tmp_path / "run", tmp_path / "out", *options)
    assert code == 0 and "step-00000001" in text
    got = load_file(tmp_path / "out" / "model.safetensors")
    assert {name: list(tensor.shape) for name, tensor in got.items()} == {**SHAPES, "frozen": [2]}
    assert torch.equal(got["a.weight"], torch.full((2, 3), value))
    assert (tmp_path / "out" / "config.json").read_text() == "{}"


@pytest.mark.parametrize(("options", "kind"), [([], "average"), (["--raw"], "weights")])
def test_checkpoint_that_is_not_finite_is_not_exported(tmp_path, capsys, options, kind):
    """A run commits none, but an earlier version may have."""
    commit(tmp_path / "run", **{f"{kind}__b": torch.tensor([1.0, float("inf"), 1.0, 1.0])})
    out = tmp_path / "out"
    assert cli.main(["checkpoint", "export", str(tmp_path / "run"), str(out), *options]) == NON_FINITE
    assert "step-00000001: b of the weights are not finite: nothing is written" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_export_on_a_full_disk_leaves_nothing(tmp_path, capsys):
    folder, out = commit(tmp_path / "run"), tmp_path / "out"
    with refusing("model.safetensors"):
        assert cli.main(["checkpoint", "export", str(folder), str(out)]) == DISK
    said = capsys.readouterr().err
    assert f"cannot write {out}: " in said and f"Kept: {folder}." in said and said.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_mistakes_of_the_checkpoint_command_are_named(tmp_path, capsys):
    folder = commit(tmp_path / "run")
    (tmp_path / "there").mkdir()
    old = commit(tmp_path / "old", replace(FACTS, schema=1))
    for words, part in (
        (["ls", tmp_path], "is no run with checkpoints"),
        (["export", folder, tmp_path / "there"], "exists"),
        (["export", old, tmp_path / "out", "--raw"], "earlier version"),
    ):
        assert cli.main(["checkpoint", *map(str, words)]) == 2
        assert part in capsys.readouterr().err
    (folder / "state" / "counters.json").write_text("{}")
    assert cli.main(["checkpoint", "export", str(folder), str(tmp_path / "new")]) == 2
    assert "counters.json has" in capsys.readouterr().err and not (tmp_path / "new").exists()
    shutil.rmtree(tmp_path / "old")
    assert json.loads((folder / MANIFEST).read_text())["step"] == 1
