"""`bevt compare RUN RUN ...`: the settings in which runs differ, and what each logged last, side by side.

Reads `config.json` and `log.jsonl` only, so it works while a run goes on, and on runs of any kind.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bevt_ds.config.files import dotted
from bevt_ds.report.run_files import read_run, read_settings

ABSENT = "-"


def main(argv: Sequence[str]) -> int:
    """Print the comparison; returns the exit code."""
    parser = argparse.ArgumentParser(prog="bevt compare", description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="the folder that a run writes")
    parser.add_argument("--all", action="store_true", help="list equal settings too")
    arguments = parser.parse_args(argv)
    print(compare(arguments.runs, arguments.all))
    return 0


def compare(folders: Sequence[Path], equal_too: bool = False) -> str:
    """Two tables with a column for each run: settings that differ (or all), and the last value of each logged field.

    Raises:
        UserError: a folder without a readable config.json.
    """
    names = [str(folder) for folder in folders]
    settings = side_by_side("setting", names, [dict(dotted(read_settings(folder))) for folder in folders], equal_too)
    logged = side_by_side("last logged", names, [read_run(folder).last for folder in folders], True, number)
    return "\n\n".join([settings or "the settings are equal", logged or "nothing is logged yet"])


def side_by_side(
    title: str,
    names: Sequence[str],
    dicts: Sequence[Mapping[str, Any]],
    equal_too: bool = False,
    form: Callable[[Any], str] = str,
) -> str:
    """A table with a row for each key in which the dicts differ (or for all); empty where there is none."""
    rows = [[key, *cells] for key, cells in by_key(dicts, form).items() if equal_too or len(set(cells)) > 1]
    return aligned([[title, *names], *rows]) if rows else ""


def by_key(dicts: Sequence[Mapping[str, Any]], form: Callable[[Any], str] = str) -> dict[str, list[str]]:
    """key -> the value of each dict as text, keys in the order in which they first occur."""
    keys = dict.fromkeys(key for values in dicts for key in values)
    return {key: [form(values[key]) if key in values else ABSENT for values in dicts] for key in keys}


def number(value: Any) -> str:
    """A value as a table shows it."""
    if value is None:
        return ABSENT
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Cells in columns."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    return "\n".join("  ".join(cells).rstrip() for cells in padded)
