"""`bevt compare`: settings and losses of runs, damaged and unfinished ones included."""

from __future__ import annotations

import json

import pytest

from bevt_ds import UserError, cli
from bevt_ds.report.compare import compare


def write_run(folder, settings, *lines):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "log.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture
def runs(tmp_path):
    a = {"recipe": "demo", "optim": {"lr": 1e-3, "betas": [0.9, 0.999]}, "train": {"steps": 10}}
    b = {"recipe": "demo", "optim": {"lr": 5e-4, "betas": [0.9, 0.999]}, "train": {"steps": 10}, "new": True}
    first = write_run(
        tmp_path / "a", a, '{"step": 4, "loss": 3.5, "mfu": null}\n', '{"step": 9, "loss": 2.5}\n', '{"st'
    )
    second = write_run(tmp_path / "b", b, '{"step": 9, "loss": 2.25, "acc": 0.5}\n')
    return first, second


def rows(text):
    return {line.split()[0]: line.split()[1:] for line in text.splitlines() if line}


def test_compare_shows_differing_settings_and_last_losses(runs):
    found = rows(compare(runs))
    assert found["optim.lr"] == ["0.001", "0.0005"]
    assert found["new"] == ["-", "True"]
    assert not {"recipe", "train.steps", "optim.betas"} & found.keys()
    assert found["loss"] == ["2.5", "2.25"]
    assert found["acc"] == ["-", "0.5"]
    assert found["mfu"] == ["-", "-"]


def test_compare_all_lists_equal_settings(runs, capsys):
    assert cli.main(["compare", "--all", *map(str, runs)]) == 0
    assert rows(capsys.readouterr().out)["train.steps"] == ["10", "10"]


def test_compare_of_equal_runs_and_an_empty_log(tmp_path):
    made = [write_run(tmp_path / name, {"recipe": "demo"}) for name in "ab"]
    assert compare(made) == "the settings are equal\n\nnothing is logged yet"


@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_compare_of_a_folder_that_is_not_a_run(tmp_path, content):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"config\.json"):
        compare([tmp_path])
