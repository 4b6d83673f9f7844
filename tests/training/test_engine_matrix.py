"""The engine equals AdamW at every ZeRO stage, precision, number of ranks and micro-steps."""

import pytest

from tests.training.processes import launch_rows

SLOW_SECONDS = 1800
ROWS = {
    "": 7,
    "wide": 21,
    "offload": 6,
    "link 0": 7,
    "link 1": 12,
    "link 2": 7,
    "link 3": 7,
    "old": 7,
}  # of what is run
TOLERANCE = {"fp32": 2e-6, "bf16": 2e-3}  # weights are moved by about 0.04; bf16 sums differ with the split
SAME_LOSS = {"fp32": 1e-6, "bf16": 4e-3}  # relative, over 20 steps


def run_matrix(folder, world: int, words: str = "") -> list[dict]:
    """The rows that the matrix writes on `world` ranks."""
    rows = launch_rows("engine_matrix", folder, world, *words.split(), seconds=SLOW_SECONDS)
    assert len(rows) == ROWS[words], rows
    return rows


def check(rows: list[dict], loose: float = 1) -> None:
    """Judge each row, with `loose` times the tolerance."""
    for row in rows:
        assert row["moved"] > 0.02, row
        assert row["deviation"] < loose * TOLERANCE[row["precision"]], row
        assert row["resumed exactly"] and row["frozen kept"], row
        assert row["only tensors and JSON"] and row["files read"], row
        assert row["finite, and spoilt"] == [True, False], row


@pytest.mark.parametrize("world", [1, 2])
def test_engine_at_zero_stages_and_precisions(tmp_path, world):
    """The second engine trains with NaN in all that DeepSpeed pads its buffers with, and to the same weights."""
    rows = run_matrix(tmp_path, world)
    check(rows)
    if world > 1:
        padded = {(row["stage"], row["precision"]) for row in rows if row["padding"]}
        assert {(3, "fp32"), (3, "bf16")} <= padded, rows


@pytest.mark.timeout(SLOW_SECONDS)
def test_engine_resumes_on_other_ranks_stages_and_precisions(tmp_path):
    """On 1, 2, 3 and 1 ranks in turn, each time at another stage: the state is the same, and so are the losses."""
    for number, world in enumerate((1, 2, 3, 1)):
        for row in run_matrix(tmp_path, world, f"link {number}"):
            loosest = "bf16" if "bf16" in (row["earlier"], row["precision"]) else "fp32"
            assert row["kept"] and row["frozen kept"] and row["average taken back"], row
            assert row["compute type"] == {"fp32": "torch.float32", "bf16": "torch.bfloat16"}[row["precision"]], row
            assert row["losses"] < SAME_LOSS[loosest], row
            assert row["deviation"] < TOLERANCE[loosest] < row["moved"], row


def test_engine_resumes_checkpoints_of_earlier_versions(tmp_path):
    assert all(row["resumed exactly"] and row["gathered"] for row in run_matrix(tmp_path, 2, "old"))


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
