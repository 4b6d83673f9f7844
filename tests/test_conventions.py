"""Rules of the code base that a machine can hold: imports one way, file sizes, no machine's paths, true docs."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted([*(ROOT / "bevt_ds").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])
DOCS = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md"), ROOT / "CONTRIBUTING.md"])

PURE = {"config", "errors", "rng", "overrides", "recipes", "validate", "ds_config", "flops", "help_text", "entry"}
MAY_IMPORT = {  # package -> which of our modules it may import; entries and the trainer may import everything
    "kernels": {"kernels"},
    "model": {"model", "kernels", "batch", "rng", "errors"},
    "data": {"data", "config", "batch", "rng", "errors", "validate"},
}
NEVER = {
    "kernels": {"deepspeed", "nvidia", "webdataset", "timm", "av"},
    "model": {"deepspeed", "nvidia", "webdataset", "av"},
    "data": {"deepspeed", "timm", "triton"},
}
DATA_FLOORS = [  # a folder of data, or one of its own files, imports from its own floor and those before it
    {"limits", "masks", "timing", "delivery"},
    {"plan"},
    {"reading", "decoding"},
    {"ledger", "pixels"},
    {"stream", "decoder_choice"},
    {"loader"},
    {"labelled", "packing"},
]


def imports(path: Path) -> set[str]:
    """Dotted names that a file imports; relative ones made absolute."""
    package = "bevt_ds.kernels" if path.parent.name == "kernels" else ".".join(path.relative_to(ROOT).parent.parts)
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {module} if module != "bevt_ds" else {f"bevt_ds.{alias.name}" for alias in node.names}
    return found


def home(path: Path) -> str:
    """The layer that a file belongs to: kernels, model, data, or its own name at the top level."""
    parts = path.relative_to(ROOT).parts
    return "kernels" if parts[0] == "kernels" else parts[1].removesuffix(".py")


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path):
    layer, names = home(path), imports(path)
    ours = {name.split(".")[1] for name in names if name.startswith("bevt_ds.")}
    theirs = {name.split(".")[0] for name in names if not name.startswith("bevt_ds")}
    if layer in MAY_IMPORT:
        assert ours <= MAY_IMPORT[layer]
        assert not theirs & NEVER[layer]
    if layer in PURE:
        assert ours <= PURE
        assert not theirs & {"torch", "deepspeed", "nvidia"}
    if layer != "engine":
        assert "deepspeed" not in theirs
    assert not ours & {"pretrain", "finetune", "evaluate", "probe"}, "nothing imports an entry"
    assert not theirs & {path.stem for path in (ROOT / "bevt_ds").glob("*.py")}, "a sibling by its bare name"
    assert "kernels" not in theirs


def test_folders_of_data_stand_on_each_other():
    floor = {name: i for i, names in enumerate(DATA_FLOORS) for name in names}
    for path in (ROOT / "bevt_ds" / "data").rglob("*.py"):
        own = floor.get(path.relative_to(ROOT / "bevt_ds" / "data").parts[0].removesuffix(".py"))
        theirs = {name.split(".")[2] for name in imports(path) if name.startswith("bevt_ds.data.")}
        assert all(floor[name] <= own for name in theirs), path
        assert not {"labelled", "packing"} <= {path.parent.name, *theirs}, path


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_stay_short(path):
    assert len(path.read_text().splitlines()) <= 500


def test_cheap_imports_stay_cheap():
    """A decode worker and `--help` must not pay for torch."""
    heavy = ("torch", "deepspeed", "nvidia.dali", "triton")
    modules = "bevt_ds, bevt_ds.rng, bevt_ds.config, bevt_ds.pretrain, bevt_ds.shards_cli, bevt_ds.data.decoding.worker"
    code = f"import sys, {modules}; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


def test_repository_names_no_machine():
    tracked = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT, check=True).stdout.split()
    words = [f"{ROOT.parent}{os.sep}", "pypi" + ".org"]
    for name in tracked:
        path = ROOT / name
        if path.is_file() and path.suffix not in (".tar", ".safetensors", ".png", ".pkl"):
            text = path.read_text(errors="ignore")
            assert not [word for word in words if word in text], name


def test_nothing_large_is_tracked():
    tracked = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT, check=True).stdout.split()
    assert [name for name in tracked if (ROOT / name).is_file() and (ROOT / name).stat().st_size > 1_000_000] == []


@pytest.mark.parametrize("path", DOCS, ids=lambda p: p.name)
def test_documents_name_files_that_exist(path):
    text = path.read_text()
    links = re.findall(r"\]\((?!http|#)([^)#]+)", text)
    named = re.findall(r"(?:deepspeed|python|torchrun) ((?:bevt_ds|benchmarks|tests)/[\w/]+\.py)", text)
    named += re.findall(r"ds_configs/\w+\.json", text)
    for name in named:
        assert (ROOT / name).exists(), name
    for name in links:
        assert (path.parent / name).exists(), name


def test_make_targets_in_documents_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for path in DOCS:
        for target in re.findall(r"(?:^|`)make ([a-z-]+)", path.read_text(), re.MULTILINE):
            assert target in targets, (path.name, target)


def test_module_commands_in_documents_exist():
    for path in DOCS:
        for module in re.findall(r"python -m ((?:bevt_ds|benchmarks|tests)[\w.]*)", path.read_text()):
            parts = module.replace("bevt_ds.kernels", "kernels").split(".")
            assert Path(ROOT, *parts).with_suffix(".py").exists() or Path(ROOT, *parts).is_dir(), module
