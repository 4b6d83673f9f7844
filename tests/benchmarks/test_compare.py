"""Comparing benchmark results: which rows match, and when one is worse (median and fastest both)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.compare import compare, key, main, more_is_worse, read

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"


def row(case: str = "a", **fields: object) -> dict:
    return {"op": "x", "case": case, "p50_ms": 10.0, "provenance": {"device": "d", "commit": "1"}, **fields}


def write(path: Path, *rows: dict) -> str:
    path.write_text("".join(f"{json.dumps(r)}\n" for r in rows))
    return str(path)


def run(tmp_path: Path, before: list[dict], after: list[dict], *options: str) -> int:
    return main([write(tmp_path / "a", *before), write(tmp_path / "b", *after), *options])


@pytest.mark.parametrize("factor, code", [(0.5, 0), (1.0, 0), (1.09, 0), (1.11, 1), (3.0, 1)])
def test_compare_threshold(tmp_path, factor, code):
    assert run(tmp_path, [row()], [row(p50_ms=10 * factor)]) == code


@pytest.mark.parametrize("metric", ["clips_per_s", "decoded_frames_per_s", "mfu"])
def test_lower_rate_is_worse(tmp_path, metric):
    assert run(tmp_path, [row(**{metric: 100})], [row(**{metric: 80})]) == 1
    assert run(tmp_path, [row(**{metric: 80})], [row(**{metric: 100})]) == 0


@pytest.mark.parametrize("metric", ["peak_mb", "cpu_s_per_clip", "first_batch_s", "cpu_s", "launches"])
def test_higher_cost_is_worse(tmp_path, metric):
    assert run(tmp_path, [row(**{metric: 80})], [row(**{metric: 100})]) == 1


def test_rows_match_whatever_their_repetitions(tmp_path):
    assert run(tmp_path, [row(steps=5, run="a", round=0)], [row(steps=9, run="b", round=1)]) == 0


def test_noise_in_the_median_alone_is_not_a_regression(tmp_path):
    quiet, noisy = row(p20_ms=9.5, p80_ms=10.5), row(p50_ms=14.0, p20_ms=9.6, p80_ms=19.0)
    assert run(tmp_path, [quiet], [noisy]) == 0
    assert run(tmp_path, [quiet], [{**noisy, "p20_ms": 13.0}]) == 1


def test_rounds_of_a_benchmark_are_one_row():
    before = [row(round=i, cpu_s=s) for i, s in enumerate((1.0, 1.1, 5.0))]
    after = [row(round=i, cpu_s=s) for i, s in enumerate((1.2, 1.3, 1.4))]
    (c,) = compare(before, after, {"cpu_s"})
    assert (c.ratio, c.fast_ratio) == pytest.approx((1.3 / 1.1, 1.2))
    assert c.certain == pytest.approx(1.3 / 1.1)


def test_list_value_is_taken_as_repeats(tmp_path):
    assert run(tmp_path, [row(rss_mb=[900, 910, 920])], [row(rss_mb=[910, 900, 930, 5000])]) == 0
    assert run(tmp_path, [row(rss_mb=[900, 910, 920])], [row(rss_mb=[1100, 1110, 1120])]) == 1


def test_row_key_holds_names_counts_and_switches_only():
    measured = row(ranks=2, compiled=True, p20_ms=1, peak_mb=None, load=3.2, round=1, calls={"x": 1}, threads="2")
    assert dict(key(measured)) == {"op": "x", "case": "a", "ranks": 2, "compiled": True}


def test_failed_rows_are_left_out(tmp_path):
    failed = {"op": "x", "case": "b", "error": "RuntimeError", "provenance": {"device": "d"}}
    assert run(tmp_path, [row(), row("b")], [row(), failed]) == 0


def test_missing_or_zero_measurements_are_left_out():
    assert compare([row(peak_mb=None, sent_mb=0)], [row(peak_mb=None, sent_mb=0)], {"peak_mb", "sent_mb"}) == []


def test_compare_takes_only_the_requested_metric(tmp_path):
    before, after = row(peak_mb=1), row(peak_mb=9)
    assert run(tmp_path, [before], [after], "--metric", "p50_ms") == 0
    assert run(tmp_path, [before], [after], "--metric", "p50_ms", "--metric", "peak_mb") == 1


@pytest.mark.parametrize(
    "before, after, options, words",
    [
        ([row("a")], [row("b")], [], "no row in common"),
        ([row()], [row(provenance={"device": "e"})], [], "measured on d and e"),
        ([row()], [row()], ["--metric", "nonsense"], "no such measurement"),
        ([row()], [row()], ["--threshold", "0.9"], "must be above 1"),
        ([], [row()], [], "holds no rows"),
    ],
)
def test_compare_mistakes_are_named(tmp_path, capsys, before, after, options, words):
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path, before, after, *options)
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err


def test_file_without_rows_is_refused(tmp_path):
    (tmp_path / "text").write_text("hello")
    with pytest.raises(ValueError, match="neither JSON"):
        read(tmp_path / "text")
    with pytest.raises(ValueError, match="cannot be read"):
        read(tmp_path / "absent")
    (tmp_path / "array").write_text(json.dumps([row()]))
    assert read(tmp_path / "array") == [row()]


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.jsonl")), ids=lambda p: p.name)
def test_committed_rows_compare_with_themselves(path):
    rows = read(path)
    found = compare(rows, rows)
    measured = {name for row in rows for name, value in row.items() if value and more_is_worse(name) is not None}
    assert {c.metric for c in found} == measured
    assert all(c.certain == 1 for c in found)


def test_compare_script_runs_without_the_package():
    command = [sys.executable, "-I", str(ROOT / "benchmarks" / "compare.py"), "--help"]
    assert "BEFORE.jsonl" in subprocess.run(command, capture_output=True, text=True, check=True).stdout
