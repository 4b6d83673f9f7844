"""The page of the loader's benchmark, from rows that were made up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.loader import BACKENDS, STRIDES, configuration
from benchmarks.loader_page import write_page

MACHINE = {"commit": "abc", "cores": 2, "cpu": "a CPU", "load": 0.5, "python": "3.11", "torch": "2.13"}


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


def test_the_page(results: Path) -> None:
    write_page(results)
    page = results.with_suffix(".md").read_text()
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
