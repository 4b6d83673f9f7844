"""The commands and code of the documents run, as far as they can without the data that they speak of."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch

import bevt_ds
from bevt_ds.help_text import USAGE
from bevt_ds.pretrain import main

ROOT = Path(__file__).parents[1]
TEXTS = {path.name: path.read_text() for path in (ROOT / "README.md", ROOT / "docs" / "pretraining.md")}
TEXTS["--help"] = USAGE


def pretrain_commands() -> list[str]:
    """Every whole `deepspeed bevt_ds/pretrain.py ...` command of the documents, continued lines joined."""
    found = []
    for text in TEXTS.values():
        joined = re.sub(r"\s*\\\n\s*", " ", text)
        found += re.findall(r"^\s*deepspeed bevt_ds/pretrain\.py (?!\[)([^\n#]*?)\s*(?:#.*)?$", joined, re.MULTILINE)
    return sorted(set(found))


def test_there_are_commands_to_check():
    assert len(pretrain_commands()) >= 3


@pytest.mark.parametrize("command", pretrain_commands())
def test_command_resolves(command, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert main([*shlex.split(command), "dry_run=true"]) == 0
    assert "parameters" in capsys.readouterr().out


def test_readme_code_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bevt_ds.create_model("tiny", vocab_size=32).save_pretrained("runs/joint/weights")
    code = re.search(r"```python\n(.*?)```", TEXTS["README.md"], re.DOTALL)[1]
    names = {"clip": torch.randn(1, 3, 4, 64, 64), "mask": torch.ones(1, 2, 4, 4, dtype=torch.bool)}
    exec(code, names)
    assert names["features"].shape == (1, 4 * 4 * 4, 256)
    assert names["maps"].shape == (1, 256, 2, 2, 2)
