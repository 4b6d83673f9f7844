"""Packaging: every module and data file is in the wheel; metadata is stated once."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """The package as a wheel lays it out."""
    folder = tmp_path_factory.mktemp("built")
    command = [sys.executable, "setup.py", "--quiet", "build_py", "--build-lib", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return folder / "bevt_ds"


def test_every_module_and_data_file_is_packaged(built: Path) -> None:
    homes = {ROOT / "bevt_ds": built, ROOT / "kernels": built / "kernels", ROOT / "ds_configs": built / "ds_configs"}
    for home, place in homes.items():
        files = [path.relative_to(home) for ending in ("py", "json") for path in home.rglob(f"*.{ending}")]
        assert files and [str(file) for file in files if not (place / file).exists()] == []


def test_package_metadata_is_stated_once() -> None:
    """setup.py says where the packages lie and nothing else."""
    setup = (ROOT / "setup.py").read_text()
    assert not [field for field in ("version=", "install_requires", "entry_points", "description=") if field in setup]
    assert PROJECT["scripts"] == {"bevt": "bevt_ds.cli:main"}
    assert f"version: {PROJECT['version']}\n" in (ROOT / "CITATION.cff").read_text()


def test_github_workflow_runs_ci_run() -> None:
    assert "- run: .ci/run\n" in (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111
