"""Commands and code in the documents run, as far as they can without data."""

from __future__ import annotations

import inspect
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import bevt_ds
from bevt_ds import evaluate, finetune, pretrain, probe
from bevt_ds.config.command_line import parse_arguments
from bevt_ds.config.parse import apply_overrides, parse_overrides
from bevt_ds.config.recipes import get_recipe
from bevt_ds.config.schema import EvaluateConfig, FinetuneConfig, ProbeRunConfig
from bevt_ds.model.presets import create_classifier
from bevt_ds.shards import cli as shards_cli
from bevt_ds.shards.synthetic.draw_worker import encode_mp4

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "docs/pretraining.md", "docs/finetuning.md", "docs/evaluation.md", "docs/data.md")
TEXTS = {Path(page).name: (ROOT / page).read_text() for page in PAGES}
TEXTS |= {"pretrain.py --help": pretrain.USAGE, "finetune.py --help": finetune.USAGE}
TEXTS |= {"evaluate.py --help": evaluate.USAGE, "probe.py --help": probe.USAGE}
API = (ROOT / "docs" / "api.md").read_text()
INTEROP = (ROOT / "docs" / "interop.md").read_text()
ENTRIES = {"pretrain": pretrain.main, "finetune": finetune.main}
TESTS = {"evaluate": EvaluateConfig, "probe": ProbeRunConfig}


def commands(entry: str) -> list[str]:
    """Every whole `deepspeed bevt_ds/ENTRY.py ...` command of the documents, continued lines joined."""
    found = []
    for text in TEXTS.values():
        joined = re.sub(r"\s*\\\n\s*", " ", text)
        found += re.findall(rf"^\s*deepspeed bevt_ds/{entry}\.py (?!\[)([^\n#]*?)\s*(?:#.*)?$", joined, re.MULTILINE)
    return sorted(set(found))


def test_documents_contain_commands():
    assert len(commands("pretrain")) >= 3
    assert len(commands("finetune")) >= 3
    assert len(commands("evaluate")) >= 3
    assert len(commands("probe")) >= 3


@pytest.mark.parametrize(("entry", "command"), [(entry, c) for entry in ENTRIES for c in commands(entry)])
def test_documented_command_resolves(entry, command, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    code = ENTRIES[entry]([*shlex.split(command), "dry_run=true"])
    printed = capsys.readouterr().out
    stops = [line for line in printed.splitlines() if line.startswith("would stop")]
    assert all(re.search("no file matches|no such file|do not exist", line) for line in stops), stops
    assert code == (2 if stops else 0)  # the examples' shards and weights are not in the repository
    assert "parameters" in printed


@pytest.mark.parametrize(("entry", "command"), [(entry, c) for entry in TESTS for c in commands(entry)])
def test_documented_test_command_words_are_known(entry, command):
    """These need weights to resolve; the words and their types can be checked without."""
    arguments = parse_arguments(shlex.split(command), default_recipe="finetune_k400", default_json="none")
    assert get_recipe(arguments.recipe, FinetuneConfig)
    config = apply_overrides(TESTS[entry](), parse_overrides(arguments.overrides, TESTS[entry]))
    assert config.weights


def shards_commands():
    joined = [
        re.sub(r"\s*\\\n\s*", " ", path.read_text()) for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))
    ]
    return sorted({line for text in joined for line in re.findall(r"^\$? ?bevt shards ([^\n]*)", text, re.MULTILINE)})


@pytest.mark.parametrize("command", shards_commands())
def test_shards_command_is_parsed(command, monkeypatch):
    """It has no unknown option: what each verb does has its own tests."""
    calls = []
    monkeypatch.setattr(shards_cli.argparse.ArgumentParser, "error", lambda self, message: pytest.fail(message))
    for verb in ("_pack", "_index", "_check", "_stats", "_draw"):
        monkeypatch.setattr(shards_cli, verb, lambda arguments, verb=verb: calls.append(verb))
    monkeypatch.setattr(shards_cli, "ensure_demo_shards", calls.append)
    assert shards_cli.main(shlex.split(command, comments=True)) == 0
    assert len(calls) == 1


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


def test_pipeline_code_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bevt_ds.create_model("tiny", vocab_size=32).save_pretrained("runs/joint/weights")
    create_classifier("tiny", 2, classes=("left", "right")).save_pretrained("runs/ssv2/weights")
    frames = np.random.default_rng(0).integers(0, 256, (70, 64, 64, 3), np.uint8)
    Path("clip.mp4").write_bytes(encode_mp4(frames))
    Image.fromarray(frames[0]).save("image.jpg")
    names = {"frames": frames}
    exec(re.search(r"```python\n(.*?)```", INTEROP, re.DOTALL)[1], names)
    assert names["pooled"].shape == (256,) and names["tokens"].shape == (7, 7, 256)
    assert names["shares"].keys() == names["same"].keys() == {"left", "right"}


@pytest.fixture(scope="module")
def after_api(tmp_path_factory):
    """What the names of api.md's code stand for after all of it has run."""
    names, frames = {}, np.random.default_rng(0).integers(0, 256, (20, 64, 64, 3), np.uint8)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("api"))
        Path("clip.mp4").write_bytes(encode_mp4(frames))
        Image.fromarray(frames[0]).save("image.jpg")
        exec("\n".join(re.findall(r"```python\n(.*?)```", API, re.DOTALL)), names)
    return names


@pytest.mark.parametrize("name", bevt_ds.__all__)
def test_public_name_is_documented(name):
    """A docstring, a section of api.md with the signature as it is, and code that uses the name."""
    value = getattr(bevt_ds, name)
    section = re.search(rf"^## `{name}`\n(.*?)(?=^## |\Z)", API, re.MULTILINE | re.DOTALL)
    assert section and f"bevt_ds.{name}" in API
    if callable(value):
        assert inspect.getdoc(value)
    if callable(value) and value is not bevt_ds.UserError:
        signature = inspect.signature(value)
        plain = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in signature.parameters.values()]
        wanted = str(signature.replace(parameters=plain, return_annotation=inspect.Signature.empty))
        assert f"`{name}{wanted}`" in " ".join(section[1].split())


def test_api_code_gives_what_it_says(after_api):
    shapes = {"clip": (1, 3, 16, 224, 224), "image": (1, 3, 224, 224), "features": (1, 16 * 14 * 14, 256)}
    shapes |= {"tokens": (1, 256, 8, 7, 7), "logits": (1, 2), "pooled": (256,), "view": (1, 3, 112, 112)}
    shapes |= {"ids": (1, 14, 14), "again": (256,)}
    assert {name: tuple(after_api[name].shape) for name in shapes} == shapes
    assert [tuple(x.shape) for x in after_api["maps"]] == [(1, 128, 8, 14, 14), (1, 256, 8, 7, 7)]
    assert after_api["channels"] == [128, 256] and isinstance(after_api["same"], bevt_ds.VideoClassifier)
    assert {name for name, _ in after_api["best"]} == {"left", "right"}
    assert after_api["loss"].isfinite() and "clip[None] makes a batch of one" in after_api["message"]
