"""How this package starts its own helper processes."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import bevt_ds


def command(module: str, *arguments: str) -> list[str]:
    """Run `module` as a program with this interpreter; the working folder is not searched for modules."""
    return [sys.executable, "-P", "-m", module, *arguments]


def environment() -> dict[str, str]:
    """The environment in which a child finds the very copy of the package that is running now."""
    root = str(Path(bevt_ds.__file__).parents[1])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
