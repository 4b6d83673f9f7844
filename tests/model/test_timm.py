"""The models are in timm's registry after `import bevt_ds`, whichever package is imported first."""

from __future__ import annotations

import subprocess
import sys

import pytest


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.parametrize("imports", ["import bevt_ds, timm", "import timm, bevt_ds"])
def test_either_order_of_imports(imports):
    code = f"{imports}; print(type(timm.create_model('bevt_tiny', vocab_size=8)).__name__)"
    assert run(code) == "BEVT"


def test_import_alone_costs_neither_torch_nor_timm():
    assert run("import sys, bevt_ds; print([m for m in ('torch', 'timm') if m in sys.modules])") == "[]"
