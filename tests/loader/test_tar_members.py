"""Tar members that are not plain files: sparse files, hard links, devices."""

from __future__ import annotations

import logging
import os
import subprocess
import tarfile
from pathlib import Path

import pytest

from bevt_ds import cli
from bevt_ds.data.reading.index import load_shard
from bevt_ds.data.reading.members import read_member
from bevt_ds.errors import UserError
from tests.loader.media import encode_clip, load_shards, shades, special_member, write_tar

SPARSE_FORMATS = {
    "gnu": ["--format=gnu"],
    "pax 0.0": ["--format=posix", "--sparse-version=0.0"],
    "pax 0.1": ["--format=posix", "--sparse-version=0.1"],
    "pax 1.0": ["--format=posix", "--sparse-version=1.0"],
}
VIDEO = encode_clip(shades(4), "mp4", "libx264", bf="0")


def tar_with_holes(folder: Path, options: list[str], holes: str) -> Path:
    """Three videos as `tar --sparse` packs them; the one named `holes` begins with many runs of zeros."""
    (folder / "files").mkdir()
    for name in "abc":
        (folder / "files" / f"{name}.mp4").write_bytes(VIDEO)
    with (folder / "files" / f"{holes}.mp4").open("wb") as file:
        for place in range(0, 2_000_000, 50_000):
            file.seek(place)
            file.write(b"data")
        file.truncate(4_000_000)
    command = ["tar", "-cf", folder / "s.tar", "-C", folder / "files", "--sparse", "--hole-detection=raw", *options]
    subprocess.run([*command, "a.mp4", "b.mp4", "c.mp4"], check=True)
    return folder / "s.tar"


@pytest.mark.parametrize("holes", ["a", "b", "c"])
@pytest.mark.parametrize("name", SPARSE_FORMATS)
def test_sparse_member_is_skipped_alone(tmp_path: Path, name: str, holes: str) -> None:
    tar = tar_with_holes(tmp_path, SPARSE_FORMATS[name], holes)
    assert tar.stat().st_size < 1_000_000
    for _ in range(2):  # from the tar, then from its index
        shard = load_shard(str(tar))
        assert list(shard.keys) == [key for key in "abc" if key != holes]
        assert all(read_member(member) == VIDEO for member in shard.members())
        assert shard.ignored_note() == f"1 passed over: '{holes}.mp4', sparse: pack it without `tar --sparse`"


def test_tar_truncated_inside_a_sparse_member_is_refused(tmp_path: Path) -> None:
    tar = tar_with_holes(tmp_path, SPARSE_FORMATS["gnu"], "c")
    with tarfile.open(tar) as archive:
        last = archive.getmembers()[-1]
    os.truncate(tar, last.offset_data + 10)
    with pytest.raises(UserError, match="not a whole tar file"):
        load_shard(str(tar))


def linked_tar(path: Path) -> Path:
    """Two videos, a store of data under another name, and every kind of link to them."""
    links = {"b.mp4": "./a.mp4", "c.mp4": "b.mp4", "d.mp4": "store/1", "d.cls": "a.cls", "e.mp4": "later.mp4"}
    special = [special_member(name, tarfile.LNKTYPE, to) for name, to in links.items()]
    special.append(special_member("f.mp4", tarfile.SYMTYPE, "a.mp4"))
    return write_tar(path, {"./a.mp4": VIDEO, "store/1": VIDEO + b"1", "a.cls": b"7"}, special=special)


def test_hard_links_are_read(tmp_path: Path) -> None:
    tar = linked_tar(tmp_path / "s.tar")
    for _ in range(2):
        shard = load_shard(str(tar))
        data = {member.key: read_member(member) for member in shard.members()}
        assert data == {"./a": VIDEO, "b": VIDEO, "c": VIDEO, "d": VIDEO + b"1"}
        assert dict(zip(shard.keys, shard.labels, strict=True))["d"] == "7"
        assert shard.ignored == 2


def test_skipped_members_are_named_by_every_command(tmp_path: Path, capsys, caplog) -> None:
    tar = linked_tar(tmp_path / "s.tar")
    named = "2 passed over: 'e.mp4', a hard link to 'later.mp4', which is no file before it; 'f.mp4', a symbolic link"
    assert cli.main(["shards", "index", str(tar)]) == 0
    assert f"4 videos, {named}" in capsys.readouterr().out
    assert cli.main(["shards", "check", "--jobs", "1", str(tar)]) == 0
    assert named in capsys.readouterr().out
    assert cli.main(["shards", "stats", "--jobs", "1", "--plot", str(tmp_path / "x.png"), str(tar)]) == 0
    assert named in capsys.readouterr().out
    with caplog.at_level(logging.WARNING):
        load_shards([str(tar)], "video")  # what a run does at its start
    assert named in caplog.text


def test_first_of_many_skipped_members_are_named(tmp_path: Path) -> None:
    write_tar(tmp_path / "s.tar", {}, special=(special_member(f"{i}.mp4", tarfile.FIFOTYPE) for i in range(30)))
    note = load_shard(str(tmp_path / "s.tar")).ignored_note()
    assert note.startswith("30 passed over: '0.mp4', no regular file; '1.mp4'") and note.endswith("; and 10 more")
