"""What the loader costs a launching thread: the parts of the benchmark, and one small run."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import decode, host, loader_media
from benchmarks.common import read_rows


def test_held_up_is_what_is_neither_running_nor_waiting_for_a_core() -> None:
    before, after = host.Times(10.0, 2.0, 1.0), host.Times(14.0, 3.5, 1.5)
    assert (after - before).held_up == 2.0 and host.Times(1.0, 0.8, 0.4).held_up == 0.0
    launched = host.launch(0.01)
    assert launched.wall >= 0.01 and launched.ran > 0 and launched.queued >= 0


def test_host_benchmark_has_rows_of_the_loader_here_and_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader_media, "FRAMES", 20)
    monkeypatch.setattr(loader_media, "SIZES", {"64x48": (48, 64)})
    monkeypatch.setattr(decode, "IMAGE", (48, 64))
    monkeypatch.setattr(host, "STREAMS", {"clips": (1, 0), "images": (0, 2)})
    monkeypatch.setattr(host, "FREE_STREAMS", {"both": (1, 2)})
    words = ["--clips", "2", "--images", "2", "--size", "64x48", "--seconds", "0.2", "--rounds", "1"]
    host.main([*words, "--out", str(tmp_path)])
    (path,) = tmp_path.glob("host-*.jsonl")
    rows = list(read_rows(path))
    assert [row["stream"] for row in rows] == ["clips", "images", "both", "both"]
    assert [row["loader"] for row in rows[2:]] == ["here", "apart"]
    assert all(row["samples_per_s"] > 0 and 0 <= row["held_up_busy"] <= 1 for row in rows[:2])
    assert all(row["decoders"] == "free" and row["free_cpu_per_sample_ms"] > 0 for row in rows[2:])
    page = path.with_suffix(".md").read_text()
    assert page.count("| both | apart |") == 1 and "| of a thread |" in page
