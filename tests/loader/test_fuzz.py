"""A few thousand cases of tests.loader.fuzz, the same each time."""

from __future__ import annotations

import pytest

from benchmarks.pages_data import damaged_media, slope
from tests.loader.damage import Tally
from tests.loader.fuzz import KINDS, row
from tests.loader.soak import POINTS

# cases, and the share of them that must be accepted and refused: else the mutations test nothing
CASES = {
    "tars": (2000, "read", "refused"),
    "jpegs": (2000, "decoded", "refused"),
    "videos": (1000, "decoded", "refused"),
    "headers": (1500, "decoded", "refused"),
    "dali": (2000, "decoded 3 frames", "refused"),
    "soak": (1000, "decoded", "refused"),
    "image-soak": (1000, "decoded", "refused"),
    "loader": (800, "batches"),
}


@pytest.mark.parametrize("kind", CASES)
def test_fuzz_cases_have_no_fault(kind: str) -> None:
    cases, *outcomes = CASES[kind]
    tally = KINDS[kind][0](range(cases), 0)
    assert tally.faults == []
    assert sum(tally.outcomes.values()) == (cases if kind != "loader" else cases // 8)
    assert all(tally.outcomes[outcome] >= 0.02 * cases for outcome in outcomes), str(tally)


def test_fuzz_report_states_what_was_run() -> None:
    """A soak whose memory grows by 100 bytes a case, and a run without a curve."""
    tally = Tally(curve=[{"cases": 50 * i, "bytes": (1 << 30) + 5000 * i, "files": 26} for i in range(1, POINTS + 1)])
    tally.outcomes.update(decoded=880, refused=120)
    rows = [row("soak", range(1000), 0, tally, 90.0), row("tars", range(1000), 0, Tally(tally.outcomes), 60.0)]
    assert slope(tally.curve) == pytest.approx(100)
    text = damaged_media(rows).markdown()
    assert "| soak | 1,000 | 880 decoded, 120 refused | 0 | 0.00 | 1.5 |" in text and text.count("| tars |") == 1
    assert "26 26 26 26 26 26 | 100 |" in text
