"""Inputs that are too large to commit: real media, and the full golden set."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PLACES = [os.environ.get("BEVT_SHARED", ""), ROOT / "shared", ROOT.parent / "shared"]


def shared_folder(name: str) -> Path:
    """The folder of that name; where there is none, the test is skipped."""
    for place in filter(None, PLACES):
        if (folder := Path(place) / name).is_dir():
            return folder
    pytest.skip(f"no folder {name}/ in BEVT_SHARED, shared/ or ../shared/")
