"""`bevt compare RUN RUN ...`: the settings in which runs differ, and what each logged last, side by side.

Reads `config.json` and `log.jsonl` only, so it works while a run goes on, and on runs of any kind.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bevt_ds.report.run_files import flat, read_run, read_settings

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
    settings = [flat(read_settings(folder)) for folder in folders]
    rows = {
        key: [str(each.get(key, ABSENT)) for each in settings] for key in dict.fromkeys(k for s in settings for k in s)
    }
    kept = {key: values for key, values in rows.items() if equal_too or len(set(values)) > 1}
    logged = [read_run(folder).last for folder in folders]
    measured = {key: [_shown(values.get(key)) for values in logged] for key in _keys(logged)}
    names = [str(folder) for folder in folders]
    parts = [_table("setting", names, kept) if kept else "the settings are equal"]
    parts.append(_table("last logged", names, measured) if measured else "nothing is logged yet")
    return "\n\n".join(parts)


def _keys(dicts: Sequence[Mapping[str, Any]]) -> list[str]:
    """All keys, each once, in the order in which they first occur."""
    return list(dict.fromkeys(key for values in dicts for key in values))


def _shown(value: Any) -> str:
    if value is None:
        return ABSENT
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def _table(title: str, names: Sequence[str], rows: Mapping[str, Sequence[str]]) -> str:
    return aligned([[title, *names], *([key, *values] for key, values in rows.items())])


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Cells in columns."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    return "\n".join("  ".join(cells).rstrip() for cells in padded)
