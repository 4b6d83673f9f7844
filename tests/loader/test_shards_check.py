"""`bevt shards check` and `stats`: what they find in damaged shards, and their deadlines."""

from __future__ import annotations

import os
import re
import shutil
import threading
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from bevt_ds import cli
from bevt_ds.data.decoding import verify
from bevt_ds.data.decoding.video import full_decode
from bevt_ds.data.limits import BadSample, Limits
from bevt_ds.data.reading.deadline import Deadline, StorageStalled
from bevt_ds.data.reading.index import load_shard
from bevt_ds.shards import manifest, stats
from bevt_ds.shards.check import check
from bevt_ds.shards.synthetic.draw_worker import encode_mp4
from tests.loader.media import remuxed


@pytest.fixture
def run_stats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`bevt shards stats` of some tars: its exit code."""
    monkeypatch.setattr(stats, "measure", partial(stats.measure, seconds=0.1))
    words = ["--recipe", "demo", "--clips-per-second", "1", "--plot", str(tmp_path / "s.png"), "--jobs", "1"]
    return lambda shards: cli.main(["shards", "stats", shards, *words])


def test_stats_reports_bad_videos_and_unreadable_shards(run_stats, shards, scenes, make, tmp_path, capsys) -> None:
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


def test_stats_without_a_readable_sample(run_stats, tmp_path: Path, capsys) -> None:
    (tmp_path / "a.tar").write_bytes(b"no tar")
    assert run_stats(f"{tmp_path}/a.tar") == 1
    out = capsys.readouterr().out
    assert "a.tar is not a whole tar file" in out and "0 samples in 0 shards, 1 unreadable" in out
    assert not (tmp_path / "s.png").exists()


@pytest.fixture
def packed(shards: Path, tmp_path: Path) -> Path:
    """The small shards of images, with their manifest."""
    for path in [*shards.glob("image-*.tar"), shards / "image-manifest.json"]:
        shutil.copy2(path, tmp_path / path.name)
    return tmp_path


def test_check_reports_shard_missing_from_its_manifest(packed: Path, capsys) -> None:
    """Which a glob cannot tell. Whoever names shards has chosen them."""
    (packed / "image-000001.tar").unlink()
    assert cli.main(["shards", "check", f"{packed}/image-*.tar", "--jobs", "1"]) == 1
    out = capsys.readouterr().out
    assert "image-000001.tar: it is missing: image-manifest.json names it" in out and "15 samples, 1 faults" in out
    assert check([f"{packed}/image-000002.tar"], jobs=1).findings == []


@pytest.mark.parametrize("text", ["garbage", "[]", '{"shards": 3}', '{"shards": [{"name": "x"}]}', "[" * 100_000])
def test_check_reports_unreadable_manifest(packed: Path, text: str) -> None:
    (packed / "image-manifest.json").write_text(text)
    ((file, reason),) = manifest.compare([f"{packed}/image-000002.tar"], jobs=1)
    assert file == f"{packed}/image-manifest.json" and "cannot read the manifest" in reason


def test_check_reports_shard_that_cannot_be_hashed(packed: Path, monkeypatch) -> None:
    def fail(path: Path) -> str:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(manifest, "_sha256", fail)
    ((file, reason),) = manifest.compare([f"{packed}/image-000002.tar"], jobs=1)
    assert file == f"{packed}/image-000002.tar" and reason == "cannot read the shard: Input/output error"


def test_check_hashes_shards_in_parallel_with_a_progress_bar(packed: Path, monkeypatch, capsys) -> None:
    together = threading.Barrier(3, timeout=20)
    monkeypatch.setattr(manifest, "_sha256", lambda path: str(together.wait() * 0))
    faults = manifest.compare([str(path) for path in packed.glob("*.tar")], jobs=3, progress=True)
    assert len(faults) == 3 and "its SHA-256 is not the one in image-manifest.json" in faults[0][1]
    assert "hash: 100%" in capsys.readouterr().err


def test_check_hashing_has_a_deadline(packed: Path, monkeypatch, released: threading.Event) -> None:
    monkeypatch.setattr(manifest, "_sha256", lambda path: released.wait(20))
    monkeypatch.setattr(manifest, "Deadline", lambda seconds: Deadline(0.2))
    with pytest.raises(StorageStalled, match="image-00000.*tar: no answer"):
        manifest.compare([str(path) for path in packed.glob("*.tar")], jobs=2)


@pytest.mark.parametrize("verb", ["index", "check", "stats"])
@pytest.mark.parametrize(("call", "pattern"), [("stat", "a.tar"), ("scandir", "*.tar")])
def test_check_listing_has_a_deadline(verb, call: str, pattern: str, tmp_path, monkeypatch, released, capsys) -> None:
    real, folder = getattr(os, call), tmp_path / "dead"
    folder.mkdir()
    monkeypatch.setattr(
        os, call, lambda path=".", **kw: released.wait(20) if str(folder) in str(path) else real(path, **kw)
    )
    assert cli.main(["shards", verb, f"{folder}/{pattern}", "data.read_seconds=0.2"]) == 5
    assert "no answer for data.read_seconds=0.2 s" in capsys.readouterr().err


def test_index_command_has_a_deadline(packed: Path, monkeypatch, released: threading.Event, capsys) -> None:
    monkeypatch.setattr("bevt_ds.data.reading.index._open_tar", lambda path: released.wait(20))
    assert cli.main(["shards", "index", f"{packed}/*.tar", "data.read_seconds=0.2"]) == 5
    assert "image-000000.tar: no answer" in capsys.readouterr().err


def lying(data: bytes) -> bytes:
    """An intra-refresh clip whose recovery points promise right frames at once: a full decode does not mind."""
    changed = re.sub(rb"(?s)\x06\x06\x02..", b"\x06\x06\x02\xc4\0", data)  # NAL unit, message, size; 0, exact
    assert changed != data
    return changed


def test_check_compares_clip_decodes_with_a_full_decode(make, tmp_path: Path) -> None:
    """What every start of a clip gives is fine; where one gives other frames than a full decode, it says which."""
    frames = np.stack([np.roll(make.noise(32, 400, softness=8.0), 3 * i, axis=1) for i in range(150)])
    refreshed = make.clip(frames, "mp4", "libx264", g="30", bf="0", **{"x264-params": "intra-refresh=1"})
    videos = {
        "av1.mp4": make.clip(frames, "mp4", "libsvtav1", g="150", preset="10"),
        "copy.mp4": remuxed(make.clip(frames, "avi", "libx264", bf="2"), "mp4"),
        "refreshed.mp4": refreshed,
        "lying.mp4": lying(refreshed),
    }
    make.tar(tmp_path / "a.tar", videos)
    report = check([str(tmp_path / "a.tar")], jobs=1)
    ((fault),) = report.findings
    assert fault["key"] == "lying"
    assert re.fullmatch(r"decoding from frame \d+ on, frame \d+ is not that of a full decode", fault["reason"])


def test_check_reports_packets_that_do_not_match_frames(make, monkeypatch) -> None:
    data = make.clip(make.noise(20, 48, 64), "mp4", "libx264")
    monkeypatch.setattr(verify, "full_decode", lambda *_: islice(full_decode(data, Limits()), 18))
    with pytest.raises(BadSample, match="a full decode shows 18 frames, where its packets promise 20"):
        verify.verify_video(data, Limits())
