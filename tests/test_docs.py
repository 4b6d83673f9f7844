"""The commands and code of the documents run, as far as they can without the data that they speak of."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch

import bevt_ds
from bevt_ds import evaluate, finetune, pretrain, probe
from bevt_ds.config.command_line import parse_arguments
from bevt_ds.config.parse import apply_overrides, parse_overrides
from bevt_ds.config.recipes import get_recipe
from bevt_ds.config.schema import EvaluateConfig, FinetuneConfig, ProbeRunConfig
from bevt_ds.model.presets import create_classifier
from bevt_ds.shards.synthetic.draw_worker import encode_mp4

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "docs/pretraining.md", "docs/finetuning.md", "docs/evaluation.md")
TEXTS = {Path(page).name: (ROOT / page).read_text() for page in PAGES}
TEXTS |= {"pretrain.py --help": pretrain.USAGE, "finetune.py --help": finetune.USAGE}
TEXTS |= {"evaluate.py --help": evaluate.USAGE, "probe.py --help": probe.USAGE}
ENTRIES = {"pretrain": pretrain.main, "finetune": finetune.main}
TESTS = {"evaluate": EvaluateConfig, "probe": ProbeRunConfig}


def commands(entry: str) -> list[str]:
    """Every whole `deepspeed bevt_ds/ENTRY.py ...` command of the documents, continued lines joined."""
    found = []
    for text in TEXTS.values():
        joined = re.sub(r"\s*\\\n\s*", " ", text)
        found += re.findall(rf"^\s*deepspeed bevt_ds/{entry}\.py (?!\[)([^\n#]*?)\s*(?:#.*)?$", joined, re.MULTILINE)
    return sorted(set(found))


def test_there_are_commands_to_check():
    assert len(commands("pretrain")) >= 3
    assert len(commands("finetune")) >= 3
    assert len(commands("evaluate")) >= 3
    assert len(commands("probe")) >= 3


@pytest.mark.parametrize(("entry", "command"), [(entry, c) for entry in ENTRIES for c in commands(entry)])
def test_command_resolves(entry, command, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert ENTRIES[entry]([*shlex.split(command), "dry_run=true"]) == 0
    assert "parameters" in capsys.readouterr().out


@pytest.mark.parametrize(("entry", "command"), [(entry, c) for entry in TESTS for c in commands(entry)])
def test_words_of_a_test_are_known(entry, command):
    """These need weights to resolve; the words and their types can be checked without."""
    arguments = parse_arguments(shlex.split(command), default_recipe="finetune_k400", default_json="none")
    assert get_recipe(arguments.recipe, FinetuneConfig)
    config = apply_overrides(TESTS[entry](), parse_overrides(arguments.overrides, TESTS[entry]))
    assert config.weights


def test_readme_code_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bevt_ds.create_model("tiny", vocab_size=32).save_pretrained("runs/joint/weights")
    create_classifier("tiny", 2, classes=("left", "right")).save_pretrained("runs/ssv2/weights")
    frames = np.random.default_rng(0).integers(0, 256, (20, 64, 64, 3), np.uint8)
    Path("clip.mp4").write_bytes(encode_mp4(frames))
    code = re.search(r"```python\n(.*?)```", TEXTS["README.md"], re.DOTALL)[1]
    names = {"mask": torch.ones(1, 8, 14, 14, dtype=torch.bool)}
    exec(code, names)
    assert names["features"].shape == (1, 16 * 14 * 14, 256)
    assert names["maps"].shape == (1, 256, 8, 7, 7)
    assert names["pooled"].shape == (256,)
    assert {name for name, _ in names["best"]} == {"left", "right"}


def test_finetuning_code_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    create_classifier("tiny", 2, classes=("left", "right")).save_pretrained("runs/ssv2/best")
    names = {"clip": torch.randn(1, 3, 4, 64, 64)}
    exec(re.search(r"```python\n(.*?)```", TEXTS["finetuning.md"], re.DOTALL)[1], names)
    assert names["logits"].shape == (1, 2)
    assert names["names"] == ("left", "right")
