"""The engine is the same AdamW at every ZeRO stage, precision, number of ranks and of micro-steps."""

import json

import pytest

from tests.training.processes import launch

SLOW_SECONDS = 1800
TOLERANCE = {"fp32": 2e-6, "bf16": 2e-3}  # weights are moved by about 0.04; bf16 sums differ with the split


def check(folder, world: int, *words: str, rows: int, loose: float = 1) -> None:
    """Run the matrix on `world` ranks and judge each of its `rows`, with `loose` times the tolerance."""
    output = launch(["-m", "tests.training.engine_matrix", str(folder), *words], world, SLOW_SECONDS)
    path = folder / "rows.jsonl"
    found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    assert len(found) == rows, output
    for row in found:
        assert row["moved"] > 0.02, row
        assert row["deviation"] < loose * TOLERANCE[row["precision"]], row
        assert row["resumed exactly"] and row["frozen kept"], row
        assert row["scripts"] == [] and row["zip files"] and row.get("shards read", True), row


@pytest.mark.parametrize("world", [1, 2])
def test_stages_and_precisions(tmp_path, world):
    check(tmp_path, world, rows=7)


@pytest.mark.slow
@pytest.mark.timeout(SLOW_SECONDS)
@pytest.mark.parametrize("world", [1, 2, 4])
def test_stages_precisions_and_accumulations(tmp_path, world):
    check(tmp_path, world, "wide", rows=21)


@pytest.mark.slow
@pytest.mark.timeout(SLOW_SECONDS)
@pytest.mark.parametrize("world", [1, 2])
def test_offloaded_optimizer(tmp_path, world):
    """DeepSpeed compiles its CPU AdamW at the first use, which takes minutes."""
    check(tmp_path, world, "offload", rows=6, loose=10)
