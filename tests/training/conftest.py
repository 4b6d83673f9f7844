"""Shards and settings of small real runs."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.shared import shared_folder
from tests.training.processes import ROOT, SMALL


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> dict[str, object]:
    """The committed shards, as settings; copied, so that the index written next to them is not committed."""
    folder = tmp_path_factory.mktemp("shards")
    for tar in (ROOT / "tests" / "data" / "shards").glob("*.tar"):
        shutil.copy(tar, folder)
    return {"data.videos": folder / "clips-000000.tar", "data.images": folder / "images-000000.tar"}


@pytest.fixture
def small(shards) -> dict[str, object]:
    """Settings of a run of six small steps."""
    return {**SMALL, **shards}


@pytest.fixture(scope="session")
def media() -> Path:
    """Real clips and images."""
    return shared_folder("media")
