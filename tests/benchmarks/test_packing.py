"""The benchmark of packing: its rows, and that a clip needs no more packets than lie behind its keyframe."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import loader_media, packing
from benchmarks.common import read_rows


def test_packing_benchmark_shows_what_keyframes_cost_and_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader_media, "FRAMES", 24)
    monkeypatch.setattr(loader_media, "SIZES", {"64x48": (48, 64)})
    for i in range(2):
        (tmp_path / f"{i}.mp4").write_bytes(loader_media.draw_clip(i, "64x48"))
    monkeypatch.setattr(packing, "FRAMES", 2)
    words = ["--media", str(tmp_path), "--codec", "h264", "hevc", "--keyframe-every", "1", "24", "--fps", "0"]
    packing.main([*words, "--out", str(tmp_path)])
    (path,) = tmp_path.glob("packing-*.jsonl")
    rows = list(read_rows(path))
    assert [(row["codec"], row["keyframe_every"]) for row in rows] == [
        ("h264", 1),
        ("h264", 24),
        ("hevc", 1),
        ("hevc", 24),
    ]
    for dense, sparse in (rows[:2], rows[2:]):
        assert dense["bytes_per_frame"] > sparse["bytes_per_frame"]
        assert 2 <= dense["packets_per_clip"] < sparse["packets_per_clip"] <= 24
        assert all(row["psnr_db"] > 25 and row["decode_clip_ms"] > 0 and row["videos"] == 2 for row in (dense, sparse))
    assert "how fast NVDEC decodes them is not measured" in path.with_suffix(".md").read_text()
