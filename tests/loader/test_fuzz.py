"""A few thousand of the cases of tests.loader.fuzz, the same each time."""

from __future__ import annotations

import pytest

from tests.loader.fuzz import KINDS

# cases, and the share of them that must be accepted and refused, lest the mutations test nothing
CASES = {
    "tars": (2000, "read", "refused"),
    "jpegs": (2000, "decoded", "refused"),
    "videos": (1000, "decoded", "refused"),
    "headers": (1500, "decoded", "refused"),
    "dali": (2000, "decoded 3 frames", "refused"),
    "soak": (1000, "decoded", "refused"),
    "picture-soak": (1000, "decoded", "refused"),
    "loader": (800, "batches"),
}


@pytest.mark.parametrize("kind", CASES)
def test_fuzz(kind: str) -> None:
    cases, *outcomes = CASES[kind]
    tally = KINDS[kind][0](range(cases), 0)
    assert tally.faults == []
    assert sum(tally.outcomes.values()) == (cases if kind != "loader" else cases // 8)
    assert all(tally.outcomes[outcome] >= 0.02 * cases for outcome in outcomes), str(tally)
