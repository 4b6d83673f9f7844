"""Shard patterns, the index of a shard, reading of members, and unusable tars."""

from __future__ import annotations

import bz2
import errno
import gzip
import io
import lzma
import os
import tarfile
import tempfile
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from bevt_ds import cli
from bevt_ds.config.samples import DataConfig
from bevt_ds.data.limits import BadSample
from bevt_ds.data.reading import index as index_module
from bevt_ds.data.reading.index import SUFFIX, load_shard
from bevt_ds.data.reading.members import Shard, read_member, split_name
from bevt_ds.data.reading.shards import expand, has_wildcard
from bevt_ds.data.reading.storage import Storage
from bevt_ds.data.reading.tar_scan import scan
from bevt_ds.errors import UserError
from tests.loader.media import load_shards


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with empty files a-000 .. a-011 and b-x, b-y."""
    monkeypatch.chdir(tmp_path)
    for name in [f"a-{i:03d}.tar" for i in range(12)] + ["b-x.tar", "b-y.tar", "c{1}.tar"]:
        (tmp_path / name).touch()
    return tmp_path


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("b-x.tar", ["b-x"]),
        ("b-*.tar", ["b-x", "b-y"]),
        ("b-{y,x}.tar", ["b-y", "b-x"]),
        ("a-{009..011}.tar", ["a-009", "a-010", "a-011"]),
        ("a-0{0{0,1},10}.tar", ["a-000", "a-001", "a-010"]),
        ("a-00{0..1}.tar, b-{x,y}.tar", ["a-000", "a-001", "b-x", "b-y"]),
        ("a-0{0,1}[01].tar", ["a-000", "a-001", "a-010", "a-011"]),
        ("c{1}.tar", ["c{1}"]),
        ("a-00{1..9..4}.tar,b-{x..y}.tar", ["a-001", "a-005", "a-009", "b-x", "b-y"]),
    ],
)
def test_shard_patterns(folder: Path, pattern: str, names: list[str]) -> None:
    assert expand(pattern) == [f"{name}.tar" for name in names]


ODD_NAMES = ["data[v2]/t-000000.tar", "data[v2]/t-000001.tar", "data[v2]/t-[1].tar", "datav/t-000000.tar", "t1.tar"]
ODD_NAMES += [
    "t[1].tar",
    "t[2]-0.tar",
    "t[2]-1.tar",
    "a,b/t.tar",
    "a,b/t-1.tar",
    "c,d.tar",
    "e{1,2}/x.tar",
    "e{1,2}/y?.tar",
]


@pytest.mark.parametrize(
    ("pattern", "names", "is_glob"),
    [
        ("data[v2]/t-{000000..000001}.tar", ["data[v2]/t-000000", "data[v2]/t-000001"], False),
        ("data[v2]/t-000000.tar", ["data[v2]/t-000000"], False),
        ("data[v2]/t-*.tar", ["data[v2]/t-000000", "data[v2]/t-000001", "data[v2]/t-[1]"], True),
        ("data[v2]/t-[1].tar", ["data[v2]/t-[1]"], False),
        ("data[v]/t-*.tar", ["datav/t-000000"], True),
        ("data[v2]/t-{[1],000000}.tar", ["data[v2]/t-[1]", "data[v2]/t-000000"], False),
        ("{data[v2],datav}/t-000000.tar", ["data[v2]/t-000000", "datav/t-000000"], False),
        ("t[1].tar", ["t[1]"], False),
        ("t[1].ta?", ["t1"], True),
        ("t[2]-{0..1}.tar", ["t[2]-0", "t[2]-1"], False),
        ("a,b/t.tar", ["a,b/t"], False),
        ("a,b/t*.tar,t1.tar", ["a,b/t-1", "a,b/t", "t1"], True),
        ("t1.tar,a,b/t{,-1}.tar", ["t1", "a,b/t", "a,b/t-1"], False),
        ("c,d.tar", ["c,d"], False),
        ("e{1,2}/{x,y?}.tar", ["e{1,2}/x", "e{1,2}/y?"], False),
    ],
)
def test_existing_name_is_not_a_pattern(tmp_path, monkeypatch, pattern: str, names: list[str], is_glob: bool) -> None:
    for name in ODD_NAMES:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    assert expand(pattern) == [f"{name}.tar" for name in names]
    assert has_wildcard(pattern) == is_glob


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("", "no shard"),
        ("none-*.tar", "no file matches 'none-\\*.tar'"),
        ("none.tar", "none.tar"),
        ("a-{000..013}.tar", "2 of 14 shards .* the first is a-012.tar"),
        ("a-{3..1}.tar", "counts down"),
        ("a-{000..001.tar", "unbalanced brace"),
        ("a-{0..999999999999}.tar", "more than 1000000 shards"),
        ("{x,{0..9999}{0..9999}}.tar", "more than 1000000 shards"),
        ("a-" + "{x,y}" * 40, "more than 1000000 shards"),
        ("a-{0.." + "9" * 5000 + "}.tar", "cannot be expanded"),
        ("{a," * 2000 + "b" + "}" * 2000, "more than 1000000 shards"),
        ("{" * 2000 + "b" + "}" * 2000, "cannot be expanded"),
        ("b-x.tar,b-*.tar", "b-x.tar is named 2 times"),
        (".", "folder"),
        ("pipe:cat a.tar", "shell"),
        ("b-x.tar,{pipe:cat a.tar,b-y.tar}", "shell"),
        ("{pip,pip}e:cat", "shell"),
        ("{o..p}ipe:cat", "shell"),
    ],
)
def test_bad_patterns_are_named(folder: Path, pattern: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        expand(pattern)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("a.jpg", ("a", "jpg")),
        ("d/e.f.JPEG", ("d/e.f", "jpeg")),
        ("d.x/noextension", ("d.x/noextension", "")),
        ("../../etc/p.png", ("../../etc/p", "png")),
    ],
)
def test_member_names_are_split_into_key_and_extension(name: str, parts: tuple[str, str]) -> None:
    assert split_name(name) == parts


MEMBERS = {
    "one.jpg": b"first",
    "one.json": b"{}",
    "folder/two.PNG": b"",
    "3.mp4": b"third" * 1000,
    "x" * 150 + ".webm": b"long name",
    "notes.txt": b"no sample",
}


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_members_are_read_by_their_offset(tmp_path: Path, make: SimpleNamespace, format: int) -> None:
    tar = make.tar(tmp_path / "s.tar", MEMBERS, format)
    shard = load_shard(str(tar))
    assert shard.keys == ("one", "folder/two", "3", "x" * 150)
    assert shard.extensions == ("jpg", "png", "mp4", "webm")
    for i in range(len(shard)):
        member = shard.member(i)
        original = next(n for n in MEMBERS if split_name(n) == (member.key, member.extension))
        assert read_member(member) == MEMBERS[original]
    assert shard.only("video").keys == ("3", "x" * 150)


def test_tar_that_is_being_written_is_not_indexed(tmp_path, make, monkeypatch) -> None:
    """Its index would be of a part, with the size of the whole."""
    tar = make.tar(tmp_path / "s.tar", MEMBERS)

    def scan_while_it_grows(path: str, file: io.BufferedReader, keep_first: bool):
        shard = scan(path, file, keep_first)
        with open(path, "ab") as end:
            end.write(bytes(512))
        return shard

    monkeypatch.setattr(index_module, "scan", scan_while_it_grows)
    with pytest.raises(UserError, match="s.tar has changed while it was read"):
        load_shard(str(tar))
    assert not Path(f"{tar}{SUFFIX}").exists()


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"version": 99}', "null", "[" * 100_000])
def test_damaged_index_is_made_again(tmp_path: Path, make: SimpleNamespace, damage: str) -> None:
    tar = make.tar(tmp_path / "s.tar", MEMBERS)
    shard = load_shard(str(tar))
    Path(f"{tar}{SUFFIX}").write_text(damage)
    assert load_shard(str(tar)) == shard


def state(folder: Path) -> dict[Path, tuple[int, int]]:
    """Size and time of a folder and of all that is in it."""
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in (folder, *folder.iterdir())}


def loaded(pattern: Path) -> Shard:
    """The first shard as a run's loader has it."""
    with closing(Storage(DataConfig(read_seconds=60.0))) as storage:
        return storage.shards(str(pattern), "image")[0]


@pytest.fixture
def no_scan(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Called, it makes reading a whole tar fail the test."""
    return lambda: monkeypatch.setattr(index_module, "scan", lambda *_: pytest.fail("scanned again"))


def test_loader_keeps_indexes_of_foreign_shards_in_the_cache(tmp_path, make, user_cache, no_scan) -> None:
    folder = tmp_path / "foreign"
    folder.mkdir()
    tar = make.tar(folder / "s-000000.tar", MEMBERS)
    (folder / "t-manifest.json").write_text("{}")  # of other shards
    before = state(folder)
    shard = loaded(folder / "s-*.tar")
    assert len(list((user_cache / "index").iterdir())) == 1
    os.utime(tar, ns=(before[tar][1],) * 2)
    no_scan()
    assert loaded(folder / "s-*.tar") == shard
    assert state(folder) == before


def test_index_next_to_a_foreign_shard_is_read_and_left_as_it_is(tmp_path, make, user_cache, no_scan) -> None:
    folder = tmp_path / "foreign"
    folder.mkdir()
    tar = make.tar(folder / "s.tar", MEMBERS)
    assert cli.main(["shards", "index", str(tar)]) == 0
    no_scan()
    loaded(tar)
    assert not user_cache.exists()
    os.utime(tar, (1, 1))  # as a copy has another time
    before = state(folder)
    assert loaded(tar) == loaded(tar)
    assert state(folder) == before and len(list((user_cache / "index").iterdir())) == 1


def test_index_command_writes_next_to_a_shard_indexed_in_the_cache(tmp_path: Path, make: SimpleNamespace) -> None:
    tar = make.tar(tmp_path / "s.tar", MEMBERS)
    loaded(tar)
    assert cli.main(["shards", "index", str(tar)]) == 0
    assert Path(f"{tar}{SUFFIX}").exists()


@pytest.mark.parametrize("read_only", [False, True])
def test_lost_index_of_a_packed_shard_is_written_next_to_it(
    tmp_path: Path, make: SimpleNamespace, user_cache: Path, no_scan, monkeypatch: pytest.MonkeyPatch, read_only: bool
) -> None:
    folder, real = tmp_path / "packed", tempfile.mkstemp
    folder.mkdir()
    tar = make.tar(folder / "s-000000.tar", MEMBERS)
    (folder / "s-manifest.json").write_text("{}")

    def mkstemp(dir: Path, prefix: str) -> tuple[int, str]:
        if read_only and dir == folder:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return real(dir=dir, prefix=prefix)

    monkeypatch.setattr(tempfile, "mkstemp", mkstemp)
    before = state(folder)
    shard = loaded(tar)
    assert Path(f"{tar}{SUFFIX}").exists() != read_only and (user_cache / "index").exists() == read_only
    assert state(folder) == before or not read_only
    no_scan()
    assert loaded(tar) == shard


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: b"", r"is empty \(0 bytes\)"),
        (lambda data: data[:2000], "not a whole tar"),
        (lambda data: data[:6000], "not a whole tar file .member '3.mp4' ends after the file; 2 samples before that"),
        (gzip.compress, r"compressed \(gzip\): unpack it to a plain tar"),
        (bz2.compress, r"compressed \(bzip2\): unpack"),
        (lzma.compress, r"compressed \(xz\): unpack"),
        (partial(lzma.compress, format=lzma.FORMAT_ALONE), r"compressed \(lzma\): unpack"),
        (lambda data: b"\x28\xb5\x2f\xfd" + data, r"compressed \(zstd\): unpack"),
        (lambda data: b"this is no tar at all" * 100, "not a whole tar"),
        (lambda data: data[:100] + b"\xff" + data[101:], "not a whole tar"),
    ],
)
def test_unusable_tars_are_refused(tmp_path: Path, make: SimpleNamespace, damage, message: str) -> None:
    tar = make.tar(tmp_path / "s.tar", MEMBERS)
    tar.write_bytes(damage(tar.read_bytes()))
    with pytest.raises(UserError, match=message) as caught:
        load_shard(str(tar))
    assert str(tar) in str(caught.value)


def test_duplicate_key_or_tar_without_samples_is_refused(tmp_path: Path, make: SimpleNamespace) -> None:
    twice = make.tar(tmp_path / "twice.tar", {"a.jpg": b"", "a.png": b""})
    with pytest.raises(UserError, match="two (image|video)s under the key 'a'"):
        load_shards([str(twice)], "image")
    text = make.tar(tmp_path / "text.tar", {"a.txt": b"", "b.mp4": b""})
    with pytest.raises(UserError, match="text.tar holds no image sample"):
        load_shards([str(text)], "image")


def test_damaged_or_missing_member_is_a_bad_sample(tmp_path: Path, make: SimpleNamespace) -> None:
    tar = make.tar(tmp_path / "s.tar", MEMBERS)
    member = load_shard(str(tar)).only("video").member(0)
    data = bytearray(tar.read_bytes())
    data[member.offset + 7] ^= 1
    tar.write_bytes(data)
    with pytest.raises(BadSample, match="not those that were indexed"):
        read_member(member)
    tar.write_bytes(data[: member.offset + 10])
    for verify in (True, False):
        with pytest.raises(BadSample, match="ends 4990 bytes before"):
            read_member(member, verify)
    tar.unlink()
    with pytest.raises(BadSample, match="No such file"):
        read_member(member)


def test_dali_index_of_a_truncated_tar(tmp_path: Path, make: SimpleNamespace, capsys) -> None:
    """Its own index still says what is left; DALI would read the tar to its end."""
    tar = make.tar(tmp_path / "s.tar", MEMBERS)
    load_shard(str(tar))
    tar.write_bytes(tar.read_bytes()[:6000])
    assert cli.main(["shards", "index", str(tar), "--dali"]) == 2
    assert "s.tar is not a whole tar file" in capsys.readouterr().err
    assert not tar.with_suffix(".idx").exists()


def test_dali_index_of_names_with_spaces(tmp_path: Path, make: SimpleNamespace, capsys) -> None:
    for name in ("clip 7.mp4", "a\udcff.mp4"):  # the latter is no UTF-8
        tar = make.tar(tmp_path / "s.tar", {"READ ME": b"no sample", name: b"x"}, format=tarfile.GNU_FORMAT)
        assert cli.main(["shards", "index", str(tar), "--dali", "--fresh"]) == 2
        assert f"s.tar holds {name!r}: names in DALI's index are UTF-8 without spaces" in capsys.readouterr().err
