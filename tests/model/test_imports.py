"""The model imports neither data, configuration nor engine."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

MODEL = Path(__file__).parents[2] / "bevt_ds" / "model"
OURS = {"kernels", "batch", "rng", "errors", "folders", "disk", "model", "tokenizer_names"}
OTHERS = {"torch", "timm", "einops", "safetensors", "numpy", "transformers"}  # the last where a tokenizer asks for it


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module)
    return names


def test_model_imports_neither_data_nor_engine():
    files = list(MODEL.rglob("*.py"))
    assert len(files) > 8
    for path in files:
        for name in imported(path):
            top, *rest = name.split(".")
            allowed = rest[:1] and rest[0] in OURS if top == "bevt_ds" else top in OTHERS | sys.stdlib_module_names
            assert allowed, f"{path.name} imports {name}"
