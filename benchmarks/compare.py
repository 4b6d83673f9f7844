"""Compares two files of benchmark rows, as ratios only; exits 1 where the second is worse than the threshold allows.

    python benchmarks/compare.py BEFORE.jsonl AFTER.jsonl
    python benchmarks/compare.py BEFORE.jsonl AFTER.jsonl --metric p50_ms --threshold 1.05

Rows are matched by what they measure: every field that is a name, a count or a switch, and neither a measurement nor a
fact about the machine. A measurement is a field with a unit that this file knows (MEASURES). Repeats, such as rounds,
count as one row.

A ratio is the cost after over the cost before: above 1 is worse, for times, memory and rates alike. Noise only ever
adds to a cost, so a row counts as worse only where two ratios are past the threshold: that of the medians, and that of
the fast ends (the 20th percentile where a row gives one, else the best repeat). Of a single number they are the same.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

THRESHOLD = 1.1
MEASURES = {  # how a field's name ends -> whether more of it is worse; the first that fits counts
    "_per_s": False,
    "mfu": False,
    "_s_per_clip": True,
    "_ms": True,
    "_mb": True,
    "_s": True,
    "launches": True,
    "launch_calls": True,
    "idle_share": True,
    "operators": True,
    "p50": True,
}
# spread, and what follows from sizes or another machine; facts about the machine; how often, not what
NO_NAMES = {"p20_ms", "p80_ms", "p20", "p80", "roof_ms", "expected_mb", "provenance", "ceilings", "load", "commit"}
NO_NAMES |= {"device", "threads", "python", "torch", "triton", "clocks", "cpu", "cores", "av", "nvidia-dali-cuda130"}
NO_NAMES |= {"torchvision", "run", "round", "rounds", "steps", "clips"}
FAILED = ("error", "not_measured")

Key = tuple[tuple[str, object], ...]


@dataclass(frozen=True)
class Comparison:
    """One measurement of one row, before and after."""

    row: str
    metric: str
    before: float
    after: float
    ratio: float  # of the medians
    fast_ratio: float  # of the fast ends

    @property
    def certain(self) -> float:
        """By how much it is worse at least: the smaller ratio."""
        return min(self.ratio, self.fast_ratio)


def more_is_worse(field: str) -> bool | None:
    """Of a measurement; None for any other field."""
    if field in NO_NAMES:
        return None
    return next((worse for ending, worse in MEASURES.items() if field.endswith(ending)), None)


def key(row: dict) -> Key:
    """What a row measures: its fields that are names, counts or switches."""
    names = [name for name in row if name not in NO_NAMES and more_is_worse(name) is None]
    return tuple(sorted((name, row[name]) for name in names if isinstance(row[name], (str, int))))


def grouped(rows: Iterable[dict]) -> dict[Key, list[dict]]:
    """Rows that were measured, by what they measure."""
    groups: dict[Key, list[dict]] = {}
    for row in rows:
        if not any(name in row for name in FAILED):
            groups.setdefault(key(row), []).append(row)
    return groups


def costs(rows: list[dict], metric: str) -> tuple[list[float], float]:
    """Of a group: the cost of each repeat, and that of the fast end. A rate's cost is its inverse."""
    measured = [row[metric] if isinstance(row[metric], list) else [row[metric]] for row in rows]
    values = [float(value) for repeats in measured for value in repeats if isinstance(value, (int, float)) and value]
    repeats = values if more_is_worse(metric) else [1 / value for value in values]
    end = metric.replace("p50", "p20")
    quick = [float(row[end]) for row in rows if end != metric and row.get(end)]
    return repeats, min(quick or repeats, default=0.0)


def compare(before: Iterable[dict], after: Iterable[dict], metrics: set[str] | None = None) -> list[Comparison]:
    """Every measurement that both have, the worst first; `metrics` keeps some. What is 0 or absent is left out."""
    old, new = grouped(before), grouped(after)
    found = []
    for name in old.keys() & new.keys():
        shared = set.intersection(*(set(row) for row in (*old[name], *new[name])))
        for metric in sorted(m for m in shared if more_is_worse(m) is not None and (metrics is None or m in metrics)):
            (repeats, fast), (new_repeats, new_fast) = costs(old[name], metric), costs(new[name], metric)
            if repeats and new_repeats:
                ends = median(repeats), median(new_repeats)
                found.append(Comparison(title(name), metric, *ends, ends[1] / ends[0], new_fast / fast))
    return sorted(found, key=lambda c: (-c.certain, c.row, c.metric))


def title(name: Key) -> str:
    """A row's fields as one line."""
    return ", ".join(str(value) if isinstance(value, str) else f"{field}={value}" for field, value in name)


def table(comparisons: list[Comparison], threshold: float) -> str:
    """Markdown, with a mark where a row is worse than allowed. Ratios only: other numbers do not travel."""
    lines = ["| row | metric | after / before | fast ends | |", "|---|---|---|---|---|"]
    for c in comparisons:
        mark = "worse" if c.certain > threshold else "better" if max(c.ratio, c.fast_ratio) < 1 / threshold else ""
        lines.append(f"| {c.row} | {c.metric} | {c.ratio:.3f} | {c.fast_ratio:.3f} | {mark} |")
    return "\n".join(lines)


def read(path: Path) -> list[dict]:
    """Rows of a file: one JSON object a line, or one JSON array.

    Raises:
        ValueError: no such file, or it holds anything else.
    """
    try:
        text = path.read_text(encoding="utf-8").strip()
        rows = json.loads(text) if text.startswith("[") else [json.loads(line) for line in text.splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read ({error}).") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: neither JSON lines nor a JSON array ({error}).") from None
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path}: holds no rows.")
    return rows


def require_comparable(before: list[dict], after: list[dict]) -> None:
    """Raises ValueError where the files are of different devices or have no row in common."""
    old, new = (
        {row.get("provenance", row).get("device", "unknown device") for row in rows} for rows in (before, after)
    )
    if old != new:
        names = " and ".join(", ".join(sorted(devices)) for devices in (old, new))
        raise ValueError(f"measured on {names}: their ratio would say nothing about the code.")
    if not grouped(before).keys() & grouped(after).keys():
        examples = [title(next(iter(grouped(rows)), (("row", "none measured"),))) for rows in (before, after)]
        raise ValueError(f"no row in common. The first of each: {examples[0]!r}; {examples[1]!r}.")


def verdict(comparisons: list[Comparison], threshold: float) -> int:
    """Print the table and the sum of it; returns the exit code: 1 where anything is worse than allowed."""
    worse = [c for c in comparisons if c.certain > threshold]
    print(table(comparisons, threshold))
    print(f"\n{len(comparisons)} measurements compared, {len(worse)} worse than {threshold:g}x")
    return int(bool(worse))


def main(argv: list[str]) -> int:
    """The command; returns the exit code: 0 fine, 1 worse, 2 a mistake."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("before", type=Path, metavar="BEFORE.jsonl")
    parser.add_argument("after", type=Path, metavar="AFTER.jsonl")
    parser.add_argument("--threshold", type=float, default=THRESHOLD, help="allowed ratio; default: %(default)s")
    parser.add_argument("--metric", action="append", help="compare this field only; may be repeated")
    options = parser.parse_args(argv)
    if not options.threshold > 1:
        parser.error(f"--threshold {options.threshold:g}: must be above 1, which is no change")
    try:
        before, after = read(options.before), read(options.after)
        require_comparable(before, after)
    except ValueError as error:
        parser.error(str(error))
    comparisons = compare(before, after, set(options.metric) if options.metric else None)
    if not comparisons:
        parser.error(f"--metric {', '.join(options.metric or [])}: the common rows have no such measurement")
    old, new = grouped(before).keys(), grouped(after).keys()
    if old ^ new:
        print(f"{len(old - new)} rows only before, {len(new - old)} only after\n")
    return verdict(comparisons, options.threshold)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
