"""`bevt shards check|stats`: what they find, and that what they find does not stop them."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

import pytest

from bevt_ds import cli
from bevt_ds.data.packing import stats
from bevt_ds.data.packing.draw_worker import encode_mp4
from bevt_ds.data.reading.index import load_shard


@pytest.fixture
def run_stats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`bevt shards stats` of some tars: its exit code."""
    monkeypatch.setattr(stats, "measure", partial(stats.measure, seconds=0.1))
    words = ["--recipe", "demo", "--clips-per-second", "1", "--plot", str(tmp_path / "s.png"), "--jobs", "1"]
    return lambda shards: cli.main(["shards", "stats", shards, *words])


def test_stats_of_good_and_bad(run_stats, shards: Path, scenes, make, tmp_path: Path, capsys) -> None:
    """Bad are the first video, a whole shard, and the end of one that was cut; another holds no video."""
    video = encode_mp4(scenes[0])
    make.tar(tmp_path / "a.tar", {"bad.mp4": video[:500], "good.mp4": video})
    (tmp_path / "b.tar").write_bytes(b"no tar")
    cut = shutil.copy2(shards / "video-000000.tar", tmp_path / "c.tar")
    load_shard(str(cut))
    cut.write_bytes(cut.read_bytes()[: load_shard(str(cut)).member(1).offset + 10])
    make.tar(tmp_path / "d.tar", {"notes.txt": b"no video"})
    assert run_stats(f"{tmp_path}/*.tar") == 0
    out = capsys.readouterr().out
    assert "2 samples in 3 shards, 5 unreadable" in out and "enough" in out
    assert f"bad: 'bad' in {tmp_path}/a.tar" in out and f"bad: '' in {tmp_path}/b.tar: " in out
    assert out.count("the shard ends") == 3


def test_stats_of_nothing_that_can_be_read(run_stats, tmp_path: Path, capsys) -> None:
    (tmp_path / "a.tar").write_bytes(b"no tar")
    assert run_stats(f"{tmp_path}/a.tar") == 1
    out = capsys.readouterr().out
    assert "a.tar is not a whole tar file" in out and "0 samples in 0 shards, 1 unreadable" in out
    assert not (tmp_path / "s.png").exists()
