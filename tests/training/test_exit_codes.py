"""One table of exit codes: in the code, and as docs/reliability.md shows it."""

from __future__ import annotations

import re

from bevt_ds import exit_codes
from tests.training.processes import ROOT


def test_documented_exit_codes_equal_the_table():
    text = (ROOT / "docs" / "reliability.md").read_text()
    rows = text.partition("\n| 0 | ")[1:]  # the page's first table
    table = dict(re.findall(r"^\| (\d+) \| (.*) \|$", "".join(rows).partition("\n\n")[0], re.MULTILINE))
    assert table == {str(code): meaning for code, meaning in exit_codes.MEANINGS.items()}


def test_every_code_has_one_meaning():
    codes = {value for name, value in vars(exit_codes).items() if name.isupper() and isinstance(value, int)}
    assert codes == set(exit_codes.MEANINGS)
