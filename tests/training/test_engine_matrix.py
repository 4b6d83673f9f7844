"""The engine equals AdamW at every ZeRO stage, precision, number of ranks and micro-steps."""

import json

import pytest

from tests.training.processes import launch

SLOW_SECONDS = 1800
ROWS = {(): 7, ("wide",): 21, ("offload",): 6, ("other",): 6}  # by what is run
TOLERANCE = {"fp32": 2e-6, "bf16": 2e-3}  # weights are moved by about 0.04; bf16 sums differ with the split


def run_matrix(folder, world: int, *words: str) -> list[dict]:
    """The rows that the matrix writes on `world` ranks."""
    output = launch(["-m", "tests.training.engine_matrix", str(folder), *words], world, SLOW_SECONDS)
    path = folder / "rows.jsonl"
    assert path.exists(), output
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == ROWS[words], output
    return rows


def check(rows: list[dict], loose: float = 1) -> None:
    """Judge each row, with `loose` times the tolerance."""
    for row in rows:
        assert row["moved"] > 0.02, row
        assert row["deviation"] < loose * TOLERANCE[row["precision"]], row
        assert row["resumed exactly"] and row["frozen kept"], row
        assert row["scripts"] == [] and row["zip files"] and row.get("shards read", True), row


@pytest.mark.parametrize("world", [1, 2])
def test_engine_at_zero_stages_and_precisions(tmp_path, world):
    check(run_matrix(tmp_path, world))


@pytest.mark.parametrize("world", [1, 2])
def test_engine_resumes_with_another_precision(tmp_path, world):
    for row in run_matrix(tmp_path, world, "other"):
        other = {"fp32": "bfloat16", "bf16": "float32"}[row["precision"]]
        assert row["compute type"] == f"torch.{other}", row
        assert row["weights kept"] and row["averages differ"] and row["moments kept"], row
        assert row["updates"] == [2, 2], row
        assert row["deviation"] < TOLERANCE["bf16"], row


@pytest.mark.slow
@pytest.mark.timeout(SLOW_SECONDS)
@pytest.mark.parametrize("world", [1, 2, 4])
def test_engine_at_stages_precisions_and_accumulations(tmp_path, world):
    check(run_matrix(tmp_path, world, "wide"))


@pytest.mark.slow
@pytest.mark.timeout(SLOW_SECONDS)
@pytest.mark.parametrize("world", [1, 2])
def test_engine_with_offloaded_optimizer(tmp_path, world):
    """DeepSpeed compiles its CPU AdamW at the first use, which takes minutes."""
    check(run_matrix(tmp_path, world, "offload"), loose=10)
