"""Conventions of the code base: import layers, file sizes, no machine paths, documents that name what exists."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CONFIGURATIONS = {"config", "recipe", "optim", "train", "views"}  # names of arguments
SOURCES = sorted([*(ROOT / "bevt_ds").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])
DOCS = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md"), ROOT / "CONTRIBUTING.md"])

LAYERS = [  # a folder, or a file of bevt_ds itself, imports from the lines before its own
    {"rng", "errors", "exit_codes", "folders", "launcher", "progress", "disk", "tokenizer_names"},
    {"config"},
    {"batch", "kernels"},
    {"model", "data"},
    {"runtime"},
    {"shards", "eval", "plan"},
    {"train", "doctor", "report", "interop"},
    {"cli", "pretrain", "train_tokenizer", "finetune", "evaluate", "probe"},
]
APART = [{"model", "config"}, {"kernels", "config"}]  # beyond those of one line, but the first
NEVER = {  # what a layer does without
    "config": {"torch", "deepspeed", "nvidia", "triton", "av"},
    "kernels": {"deepspeed", "nvidia", "webdataset", "timm", "av"},
    "model": {"deepspeed", "nvidia", "webdataset", "av"},
    "data": {"deepspeed", "timm", "triton"},
    "plan": {"deepspeed", "nvidia", "webdataset", "av"},
    "shards": {"torch", "deepspeed", "triton", "timm"},
}
DATA_LAYERS = [  # the same within data/
    {"limits", "masks"},
    {"plan"},
    {"reading", "decoding"},
    {"ledger", "side_stream", "pixels", "holdout", "tokens"},
    {"stream", "decoder_choice", "labels"},
    {"graph_stream"},
    {"open_stream"},
    {"loader", "process"},
    {"files", "labelled_reader", "labelled_loader", "view_reader"},
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
    """The folder that a file belongs to, or its own name at the top level."""
    parts = path.relative_to(ROOT).parts
    return "kernels" if parts[0] == "kernels" else parts[1].removesuffix(".py")


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_down_the_layers(path):
    own, names = home(path), imports(path)
    ours = {name.split(".")[1] for name in names if name.startswith("bevt_ds.")}
    theirs = {name.split(".")[0] for name in names if not name.startswith("bevt_ds")}
    if own != "__init__":
        depth = {name: i for i, layer in enumerate(LAYERS) for name in layer}
        below = set().union(*LAYERS[: max(depth[own], 1)])
        assert ours - {own} <= below, ours - {own} - below
        assert not [pair for pair in APART if own in pair and ours & pair - {own}]
    assert not theirs & NEVER.get(own, set())
    if not path.name.startswith("engine"):
        assert "deepspeed" not in theirs
    assert own == "cli" or not ours & LAYERS[-1], "nothing imports a command"
    assert not theirs & {path.stem for path in (ROOT / "bevt_ds").glob("*.py")}, "a sibling by its bare name"
    assert "kernels" not in theirs


def test_imports_run_down_the_layers_of_data():
    depth = {name: i for i, names in enumerate(DATA_LAYERS) for name in names}
    for path in (ROOT / "bevt_ds" / "data").rglob("*.py"):
        own = path.relative_to(ROOT / "bevt_ds" / "data").parts[0].removesuffix(".py")
        theirs = {name.split(".")[2] for name in imports(path) if name.startswith("bevt_ds.data.")}
        assert own == "__init__" or all(depth[name] <= depth[own] for name in theirs), path


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_source_files_have_at_most_500_lines(path):
    assert len(path.read_text().splitlines()) <= 500


def test_help_and_decode_worker_do_not_import_torch():
    """A decode worker and `--help` must not pay for torch."""
    heavy = ("torch", "deepspeed", "nvidia.dali", "triton")
    modules = ("rng", "config.schema", "pretrain", "shards.cli", "data.decoding.worker")
    code = f"import sys, {', '.join(f'bevt_ds.{m}' for m in modules)}; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


def test_repository_names_no_machine_path():
    tracked = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT, check=True).stdout.split()
    words = [f"{ROOT.parent}{os.sep}", "pypi" + ".org"]
    for name in tracked:
        path = ROOT / name
        if path.is_file() and path.suffix not in (".tar", ".safetensors", ".png", ".pkl"):
            text = path.read_text(errors="ignore")
            assert not [word for word in words if word in text], name


def test_no_large_file_is_tracked():
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


ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text()


def test_architecture_page_has_every_room():
    rooms = "".join(line.split("|")[2] for line in ARCHITECTURE.splitlines() if re.match(r"\| \d ", line))
    named = {name.removesuffix("/") for name in re.findall(r"[\w.]+/?", rooms)}
    there = {path.name for path in (ROOT / "bevt_ds").iterdir() if path.is_dir() or path.suffix == ".py"}
    assert named == there - {"__init__.py", "__pycache__"} | {"kernels"}


FOLDERS = sorted(path for path in (ROOT / "bevt_ds").rglob("__init__.py") if path.parent.name != "bevt_ds")


@pytest.mark.parametrize("path", FOLDERS, ids=lambda p: p.parent.name)
def test_folder_says_where_to_start_reading(path):
    text = ast.get_docstring(ast.parse(path.read_text()))
    assert len(text.splitlines()) <= 8 and "Start" in text
    assert all((path.parent / name).exists() for name in re.findall(r"\b\w+\.py\b", text)), text


@pytest.mark.parametrize(("file", "name"), re.findall(r"`([\w/]+\.py)` `([\w.]+)`", ARCHITECTURE))
def test_architecture_page_names_what_exists(file, name):
    places = [ast.parse((ROOT / "bevt_ds" / file).read_text())]
    for part in name.split("."):
        places = [node for place in places for node in place.body if getattr(node, "name", None) == part]
    assert places


def test_way_of_a_clip_has_at_most_15_hops():
    hops = ARCHITECTURE.partition("## The way of a clip")[2].partition("\n## ")[0]
    assert len(re.findall(r"^\d+\. ", hops, re.MULTILINE)) <= 15


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


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_configuration_arguments_have_a_type(path):
    """RunConfig, a TypeVar bound to it, or a Protocol says what is needed of it; Any says nothing."""
    functions = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]
    for function in functions:
        for argument in (*function.args.args, *function.args.kwonlyargs):
            if argument.arg in CONFIGURATIONS and argument.annotation is not None:
                assert ast.unparse(argument.annotation) != "Any", (function.name, argument.arg)


def test_package_does_not_import_the_reference():
    """The definition of the ops is for tests and benchmarks: what shares its helpers is not held to it."""
    for path in SOURCES:
        nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
        names = {name for node in nodes for name in (node.module or "", *(alias.name for alias in node.names))}
        assert not any(name.split(".")[-1] == "reference" for name in names), path


def test_no_private_torch_operators():
    """They change without notice between versions."""
    for path in SOURCES:
        assert not re.search(r"torch\.ops\.(?!bevt_ds\b|load_library)", path.read_text()), path
