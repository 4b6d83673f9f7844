"""benchmarks/results: the index lists every file, links and commands exist, rows have provenance."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from benchmarks.compare import FAILED
from benchmarks.report import load

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
INDEX = (ROOT / "benchmarks" / "README.md").read_text()
DOCUMENTS = [ROOT / "benchmarks" / "README.md", RESULTS / "README.md"]
TRACKED = subprocess.run(
    ["git", "ls-files", RESULTS], cwd=ROOT, capture_output=True, text=True, check=True
).stdout.split()
ROWS = [ROOT / name for name in TRACKED if name.endswith(".jsonl")]


def test_results_index_names_every_file_of_rows():
    assert set(re.findall(r"\]\(results/([^)]+\.jsonl)\)", INDEX)) == {str(path.relative_to(RESULTS)) for path in ROWS}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: p.parent.name)
def test_results_links_exist(document):
    links = re.findall(r"\]\((?!http|#)([^)#]+)", document.read_text())
    assert links and all((document.parent / link).exists() for link in links)


def test_results_commands_exist():
    for module in re.findall(r"python -m (benchmarks\.\w+)", INDEX):
        assert (ROOT / module.replace(".", "/")).with_suffix(".py").exists(), module
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"`make ([a-z-]+)`", INDEX)) <= set(targets)


@pytest.mark.parametrize("path", ROWS, ids=lambda p: p.name)
def test_result_rows_have_provenance_and_a_page(path):
    assert path.with_suffix(".md").exists()
    for row in load(path):
        source = row.get("provenance", row)
        assert {"commit", "device", "threads", "python", "torch"} <= source.keys()
        values = [v for value in row.values() for v in (value if isinstance(value, list) else [value])]
        assert any(name in row for name in FAILED) or any(isinstance(value, float) for value in values)
