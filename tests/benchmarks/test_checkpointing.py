"""What recomputing costs and saves is measured in turns, and put on a page."""

from benchmarks import checkpointing, report
from benchmarks.common import add_row


def test_rows_of_every_way(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpointing, "SIZE", 64)
    rows = {row["recompute"]: row for row in checkpointing.measure("tiny", 1)}
    assert list(rows) == list(checkpointing.WAYS)
    saved = [rows[name]["saved_mb"] for name in ("every block", "every second block", "none")]
    assert saved == sorted(saved) and saved[0] < 0.6 * saved[-1]
    assert rows["none"]["cpu_ratio"] == 1 == rows["none"]["flops_ratio"]
    costs = [rows[name]["flops_ratio"] for name in ("none", "attention", "every block")]
    assert costs == sorted(set(costs)) and costs[-1] < 4 / 3
    for row in rows.values():
        add_row(tmp_path / "checkpointing-cpu.jsonl", row)
    page = report.write(tmp_path / "checkpointing-cpu.jsonl")
    assert "| attention of every second block |" in page and "* commit: " in page
