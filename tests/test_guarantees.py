"""docs/reliability.md: every guarantee is listed, with tests that exist or with why it does not hold."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROWS = dict(re.findall(r"^\| ([CNHS]\d+) \| (.*) \|$", (ROOT / "docs" / "reliability.md").read_text(), re.MULTILINE))
NUMBERS = {"C": 19, "N": 6, "H": 2, "S": 4}
TESTS = {
    name
    for path in (ROOT / "tests").rglob("test_*.py")
    for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)
}


def test_every_guarantee_is_listed():
    assert list(ROWS) == [f"{letter}{n + 1}" for letter, count in NUMBERS.items() for n in range(count)]


@pytest.mark.parametrize("name", ROWS)
def test_guarantee_names_tests_that_exist(name):
    named = set(re.findall(r"`(test_\w+)`", ROWS[name]))
    assert named <= TESTS, named - TESTS
    assert named or "*Not held*" in ROWS[name]
