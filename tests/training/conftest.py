"""Shards and settings of small real runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.shared import shared_folder
from tests.training.processes import SMALL, copied_shards


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> dict[str, object]:
    return copied_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture
def small(shards) -> dict[str, object]:
    """Settings of a run of six small steps."""
    return {**SMALL, **shards}


@pytest.fixture(scope="session")
def media() -> Path:
    """Real clips and images."""
    return shared_folder("media")
