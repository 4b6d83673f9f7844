"""The report writer: committed pages equal the reports of committed rows; tables, plots, failures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.loader import BACKENDS, STRIDES, configuration
from benchmarks.pages import SETTING, runs, step
from benchmarks.pages_data import reading
from benchmarks.report import RESULTS, Page, Panel, draw, fields, load, page_of, plot_of, table, write
from benchmarks.step_parts import PARTS

MACHINE = {"commit": "abc", "device": "CPU", "cores": 2, "cpu": "a CPU", "load": 0.5, "python": "3.11", "torch": "2.13"}


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Two rounds of each row, one backend that is not there, and an older commit's row."""
    rows = [{"row": "ours, raw", "size": "340x256", "sampling": "16x8", "clips_per_s": 999.0, "commit": "older"}]
    for number in range(2):
        for i, name in enumerate(BACKENDS):
            row = {"row": name, "size": "340x256", "sampling": "16x8", "round": number}
            cpu = {"ours, raw": 0.020, "DataLoader + PyAV, raw": 0.060}.get(name, 0.1 + i)
            measured = {"clips_per_s": 1 / cpu + number, "cpu_s_per_clip": cpu, "decoded_frames_per_s": None}
            measured["decoding_cpu_s_per_clip"] = None if "DataLoader" in name else cpu * 0.75
            other = {"peak_mb": 1000, "first_batch_s": 1.5, "clips": 40}
            rows.append({**row, **({"not_measured": "no CUDA device"} if "CUDA" in name else {**measured, **other})})
    rows += [{"shards": name, "size": "340x256", "megabytes": 10.0} for name in ("raw", "packed")]
    rows.append({"soak": "340x256", "clips": 20_000, "rss_mb": [900, 910], "open_files": [30, 30]})
    path = tmp_path / "loader.jsonl"
    path.write_text("\n".join(json.dumps({**MACHINE, **row}) for row in rows))
    return path


@pytest.mark.parametrize("path", sorted(RESULTS.rglob("*.jsonl")), ids=lambda p: p.stem)
def test_committed_pages_equal_the_reports_of_committed_rows(path: Path) -> None:
    page = page_of(path)
    assert path.with_suffix(".md").read_text(encoding="utf-8") == page.markdown(), "run `python -m benchmarks.report`"
    assert plot_of(path).exists() == bool(page.panels)


def test_empty_columns_are_left_out_and_failures_give_their_reason() -> None:
    rows = [{"name": "a", "ms": 1.25, "mb": None}, {"name": "b", "error": "RuntimeError: no"}]
    columns = fields("row name s | ms ms .1f | x ms .2f | peak MB mb .0f")
    lines = ["| row | ms | x |", "|---|---|---|", "| a | 1.2 | 1.25 |", "| b | not measured: RuntimeError: no |  |"]
    assert table(rows, columns).splitlines() == lines


def test_text_with_a_bar_stays_in_its_cell() -> None:
    lines = table([{"fault": "25%|## | 12/48"}], {"fault": lambda row: row["fault"]}).splitlines()
    assert lines[-1] == "| 25%\\|## \\| 12/48 |"


def test_table_of_no_rows_is_empty() -> None:
    assert table([], fields("row name s")) == ""


def test_every_kind_of_panel_is_drawn(tmp_path: Path) -> None:
    bars = {"one": [1.0, None], "two": [2.0, 3.0]}
    stacked = Panel("MB", names=["a", "b"], bars={"x": [1.0, 2.0]}, marks={"paper": [1.5, 2.5]}, stacked=True)
    spread = Panel("x", names=["a"], bars={"y": [2.0]}, spread={"y": [(1.0, 4.0)]}, levels={"chance": 1.0})
    lines = Panel("step", ylabel="loss", lines={"a": ([1, 2], [3.0, 4.0])}, levels={"floor": 1.0})
    draw([Panel("ms", names=["a", "b"], bars=bars, log=True), stacked, spread, lines], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_rows_without_provenance_need_their_folders(tmp_path: Path) -> None:
    path = tmp_path / "pretrain-log.jsonl"
    path.write_text('{"step": 9}\n')
    with pytest.raises(ValueError, match="without a commit"):
        load(path)
    (tmp_path / "provenance.json").write_text('{"commit": "abc"}')
    assert load(path) == [{"step": 9, "provenance": {"commit": "abc"}}]


def test_reading_page_shows_the_last_measurement_of_each_row() -> None:
    rows = [{"row": "read", "p50": p, "p20": p, "p80": p, "rounds": 3, **MACHINE} for p in (1.0, 2.0)]
    text = reading(rows).markdown()
    assert "| read | 2.000 | 2.000 | 2.000 |" in text and "1.000" not in text


def test_unknown_rows_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "odd.jsonl").write_text('{"commit": "abc"}\n')
    with pytest.raises(ValueError, match="no page for it"):
        page_of(tmp_path / "odd.jsonl")
    assert "# Odd" in write(tmp_path / "odd.jsonl", lambda rows: Page("Odd", []))


def step_row(provider: str, ms: float) -> dict:
    """A row of the step benchmark."""
    times = {"p50_ms": ms, "p20_ms": ms, "p80_ms": ms, "cpu_ms": ms, "parts": dict.fromkeys(PARTS, 1.0)}
    return {**dict.fromkeys(SETTING, "a"), "provider": provider, **times, "ceilings": {}, "provenance": MACHINE}


def test_ratios_are_taken_within_one_run() -> None:
    """The second process's rows stand in a table of their own, with no eager to compare with."""
    rows = [step_row("eager", 20.0), step_row("ours", 10.0), step_row("ours", 40.0), step_row("ours, compiled", 30.0)]
    first, second = (list(run) for _, run in runs(rows))
    assert (first, second) == (["eager", "ours"], ["ours", "ours, compiled"])
    text = step(rows).markdown()
    assert "| ours | 10.0 (10.0-10.0) | 2.00 |" in text and "| ours | 40.0 (40.0-40.0) | 40 |" in text


def test_loader_page(results: Path) -> None:
    page = write(results)
    assert "| ours, raw | 50.5 (50.0 to 51.0) | 20.0 (20.0 to 20.0) | 15.0 (15.0 to 15.0) | not counted |" in page
    assert "| ours, raw | best: DataLoader + PyAV, raw | 1.2x | 3.00x |  |" in page
    assert "| ours, raw, 4 clips a video | ours, raw | 2.0x | 0.02x (not reached) | 4.00x |" in page
    assert "| ours, packed | best: DataLoader + PyAV, raw | 1.5x | 0.03x (not reached) |  |" in page
    assert "torchcodec CUDA, raw | not measured: no CUDA device" in page
    assert "resident 900, 910 MB; open files 30 to 30" in page and "999" not in page
    assert results.with_suffix(".png").stat().st_size > 10_000


@pytest.mark.parametrize("sampling", STRIDES)
def test_packed_shards_with_a_lower_rate_have_stride_one(sampling: str) -> None:
    raw, sparse = (
        configuration(Path("x"), BACKENDS[name], sampling).data for name in ("ours, raw", "ours, packed, fps=")
    )
    assert (raw.frames, raw.stride) == STRIDES[sampling]
    assert (sparse.frames, sparse.stride) == (raw.frames, 1) and f"fps-{sampling}" in sparse.videos
