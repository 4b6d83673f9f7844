"""Faults of shards: what the index, the reader and the loader make of each. D numbers: docs/faults.md.

D3, cuts at every byte: test_truncated_tars.py. D24 and S6: test_remote.py, test_shard_cache.py, test_storage_stalls.py.
"""

from __future__ import annotations

import json
import logging
import math
import os
import pickle
import shutil
import subprocess
import tarfile
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import webdataset
from nvidia.dali import fn, pipeline_def

from bevt_ds import cli
from bevt_ds.config.schema import Config
from bevt_ds.data.decoding.images import check_image
from bevt_ds.data.limits import BadSample, Limits
from bevt_ds.data.loader import LEDGER, Loader
from bevt_ds.data.reading.index import SUFFIX, index_digest, load_shard
from bevt_ds.data.reading.members import read_member
from bevt_ds.errors import UserError
from bevt_ds.shards import stats
from bevt_ds.shards.check import check
from bevt_ds.shards.dali_index import write_dali_index
from bevt_ds.shards.pack import pack
from bevt_ds.shards.synthetic.draw_worker import encode_jpeg
from tests.loader.media import load_shards, special_member, write_tar


@pytest.fixture
def copies(shards: Path, tmp_path: Path) -> Path:
    """Shards with their indexes, to be damaged."""
    folder = tmp_path / "copies"
    folder.mkdir()
    for path in shards.glob("*.tar"):
        load_shard(str(path))
        for name in (path.name, path.name + SUFFIX):
            shutil.copy2(shards / name, folder / name)
    return folder


def train_on(with_data: Callable[..., Config], folder: Path, out: Path) -> tuple[int, list[dict]]:
    """Micro-batches of two epochs of 24 images, and the ledger."""
    config = with_data(images=f"{folder}/image-*.tar", max_bad_fraction=0.9)
    with Loader(config, folder=out) as loader:
        got = sum(1 for _ in islice(loader, 12))
    ledger = out / LEDGER
    return got, [json.loads(line) for line in ledger.read_text().splitlines()] if ledger.exists() else []


CUTS = {
    "D1 zero-byte": lambda path: os.truncate(path, 0),
    "D3 cut": lambda path: os.truncate(path, 3000),
    "D11 flipped bits": lambda path: flip_bits(path, 40),
}


def flip_bits(path: Path, count: int) -> None:
    data = bytearray(path.read_bytes())
    members = list(load_shard(str(path)).members())
    rng = np.random.default_rng(0)
    for i in range(count):
        member = members[i % len(members)]
        data[member.offset + int(rng.integers(member.size))] ^= 1 << int(rng.integers(8))
    stat = path.stat()
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.parametrize("fault", CUTS)
def test_damaged_shard_loses_only_its_own_samples(copies: Path, with_data, tmp_path: Path, fault: str) -> None:
    """The epoch stays as long as it was; what is lost is listed and replaced."""
    CUTS[fault](copies / "image-000001.tar")
    got, events = train_on(with_data, copies, tmp_path)
    assert got == 12
    assert events and {Path(e["shard"]).name for e in events} == {"image-000001.tar"}
    assert len({e["key"] for e in events}) >= 8  # of 9


def test_shard_deleted_during_a_run_is_bad_samples_d2(copies: Path, with_data, tmp_path: Path) -> None:
    config = with_data(images=f"{copies}/image-*.tar", max_bad_fraction=0.9)
    with Loader(config, folder=tmp_path) as loader:
        next(loader)
        (copies / "image-000001.tar").unlink()
        assert sum(1 for _ in islice(loader, 12)) == 12
        assert loader.bad_samples > 0
    with pytest.raises(UserError, match="image-000001.tar"):
        Loader(with_data(images=f"{copies}/image-00000{{0..2}}.tar"))


def test_repacked_tar_is_indexed_again_with_a_warning_d4(copies: Path, make, caplog: pytest.LogCaptureFixture) -> None:
    path = copies / "image-000000.tar"
    with tarfile.open(path) as tar:
        members = {info.name: tar.extractfile(info).read() for info in tar}
    old = load_shard(str(path)).member(0)
    make.tar(path, dict(reversed(members.items())))
    with caplog.at_level(logging.WARNING):
        shard = load_shard(str(path))
    assert "image-000000.tar has been rewritten since it was indexed" in caplog.text
    for member in shard.members():
        assert read_member(member) == members[f"{member.key}.{member.extension}"]
    with pytest.raises(BadSample, match="rewritten"):
        read_member(old)


def test_index_of_another_tar_of_equal_size_and_time_is_refused_d4(copies: Path) -> None:
    """Even where size and time are equal."""
    path, other = copies / "image-000000.tar", copies / "image-000001.tar"
    stored = json.loads(Path(f"{other}{SUFFIX}").read_text())
    stat = path.stat()
    stored["tar"] = {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
    stored |= {name: stored[name][:1] for name in stored if isinstance(stored[name], list)}
    sign(Path(f"{path}{SUFFIX}"), stored)
    with pytest.raises(UserError, match="image-000000.tar.index.json does not match .*image-000000.tar"):
        load_shard(str(path))
    assert cli.main(["shards", "index", "--fresh", str(path)]) == 0
    assert len(load_shard(str(path))) == 9


def test_copied_tar_keeps_its_index(copies: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = copies / "image-000000.tar"
    whole = load_shard(str(path))
    os.utime(path, (5, 5))
    monkeypatch.setattr("bevt_ds.data.reading.index.scan", lambda *_: pytest.fail("scanned again"))
    assert load_shard(str(path)) == load_shard(str(path)) == whole


FIELDS = ["version", "tar", "keys", "extensions", "offsets", "sizes", "crcs", "heads", "labels", "ignored", "dropped"]
FIELDS += ["ignored_names"]
NONSENSE = [None, [], {}, -1, "x", [None], [[1]], [1 << 70] * 9, [1 << 40] * 9, [-1] * 9, ["a"] * 9, [1.5] * 9]


@pytest.mark.parametrize("name", FIELDS)
def test_mutated_index_is_made_again_d5(copies: Path, name: str) -> None:
    path = copies / "image-000000.tar"
    whole, place = load_shard(str(path)), Path(f"{path}{SUFFIX}")
    good = json.loads(place.read_text())
    for value in NONSENSE:
        place.write_text(json.dumps({**good, name: value}))
        assert load_shard(str(path)) == whole


@pytest.mark.parametrize("name", ["version", "tar", "ignored", "keys", "extensions", "offsets", "sizes", "heads"])
def test_signed_index_cannot_point_outside_its_tar_d5(copies: Path, name: str) -> None:
    path = copies / "image-000000.tar"
    whole, place = load_shard(str(path)), Path(f"{path}{SUFFIX}")
    good = json.loads(place.read_text())
    for value in [*NONSENSE, math.inf, {"size": "9"}, {"size": 1 << 70, "mtime_ns": "x"}]:
        sign(place, {**good, name: value})
        try:
            assert load_shard(str(path)) == whole
        except UserError as error:
            assert "does not match" in str(error)
            load_shard(str(path), fresh=True)


def sign(place: Path, stored: dict) -> None:
    """Write an index with the digest of what it now holds."""
    rest = {name: value for name, value in stored.items() if name != "digest"}
    place.write_text(json.dumps({**rest, "digest": index_digest(rest)}))


def test_duplicate_keys_in_a_tar_are_refused_or_deduplicated_d6(tmp_path, make, capsys) -> None:
    tar = make.tar(tmp_path / "s.tar", {"a.jpg": b"1", "b.jpg": b"2", "a.png": b"3", "a.JPG": b"4"})
    with pytest.raises(UserError, match=r"two images under the key 'a' \(.jpg and .png\).*--dedupe first"):
        load_shard(str(tar))
    assert cli.main(["shards", "index", "--dedupe", "first", str(tar)]) == 0
    assert "2 images, 0 videos, 2 dropped because their key came before" in capsys.readouterr().out
    (shard,) = load_shards([str(tar)], "image")
    assert shard.keys == ("a", "b") and read_member(shard.member(0)) == b"1" and shard.dropped == 2


def test_video_and_thumbnail_of_one_key_are_two_samples_d6(tmp_path: Path, make: SimpleNamespace) -> None:
    """Of two streams; the label is that of both. The index says the same as the first reading."""
    tar = make.tar(tmp_path / "s.tar", {"a.jpg": b"1", "a.mp4": b"22", "a.cls": b"7", "b.mp4": b"3"})
    for _ in range(2):
        (images,), (videos,) = load_shards([str(tar)], "image"), load_shards([str(tar)], "video")
        assert (images.keys, images.labels, videos.keys, videos.labels) == (("a",), ("7",), ("a", "b"), ("7", ""))
        assert [read_member(shard.member(0)) for shard in (images, videos)] == [b"1", b"22"]
    with pytest.raises(UserError, match=r"two videos under the key 'a' \(.mp4 and .webm\)"):
        load_shard(str(make.tar(tmp_path / "s.tar", {"a.mp4": b"1", "a.jpg": b"1", "a.webm": b"1"})))


def test_check_finds_the_same_sample_in_two_shards_d6(tmp_path: Path, make: SimpleNamespace) -> None:
    jpeg = encode_jpeg(make.noise(20, 30))
    for name in ("a", "b"):
        make.tar(tmp_path / f"{name}.tar", {"x.jpg": jpeg})
    report = check([str(tmp_path / "a.tar"), str(tmp_path / "b.tar")], jobs=1)
    assert [f["key"] for f in report.findings] == ["x"] and "a.tar too" in report.findings[0]["reason"]


def test_components_of_a_sample_may_lie_apart_d7(tmp_path: Path, make: SimpleNamespace) -> None:
    tar = make.tar(tmp_path / "s.tar", {"a.jpg": b"1", "b.jpg": b"2", "b.cls": b"7", "a.json": b'{"label": "cat"}'})
    shard = load_shard(str(tar))
    assert (shard.keys, shard.labels) == (("a", "b"), ("cat", "7"))


def test_hostile_member_names_are_never_paths_d9(tmp_path: Path, make: SimpleNamespace) -> None:
    names = ["../../x.jpg", "/etc/y.jpg", "a\nb.jpg", "e\x1b[31m.jpg", "ü\u202e.jpg", "-rf.jpg", "~/z.jpg"]
    before = sorted(tmp_path.rglob("*"))
    tar = make.tar(tmp_path / "s.tar", {name: name.encode() for name in names})
    shard = load_shard(str(tar))
    assert [f"{key}.jpg" for key in shard.keys] == names
    assert all(read_member(m) == f"{m.key}.jpg".encode() for m in shard.members())
    assert sorted(tmp_path.rglob("*")) == sorted([*before, tar, Path(f"{tar}{SUFFIX}")])


def test_members_that_are_not_files_are_counted_d9(tmp_path: Path) -> None:
    kinds = (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE)
    special = [special_member(f"kind-{kind.decode()}.jpg", kind) for kind in kinds]
    shard = load_shard(str(write_tar(tmp_path / "s.tar", {"real.jpg": b"data"}, special=special)))
    assert (shard.keys, shard.ignored) == (("real",), 5)


def test_macos_metadata_files_are_not_samples_d9(tmp_path, make, capsys) -> None:
    names = ["._a.jpg", "a.jpg", "d/._b.mp4", "d/b.mp4", "._.jpg", "._d/c.jpg", "._a.json"]
    tar = make.tar(tmp_path / "s.tar", dict.fromkeys(names, b"{}"))
    assert cli.main(["shards", "index", str(tar)]) == 0
    assert "2 images, 1 videos, 3 passed over" in capsys.readouterr().out
    assert load_shard(str(tar)).keys == ("a", "d/b", "._d/c")


HOSTILE_LABELS = {
    "deep.json": b"[" * 50_000,
    "huge.json": b'{"label": "' + b"x" * (1 << 20) + b'"}',
    "list.json": b'{"label": ["a", {}]}',
    "yaml.json": b'!!python/object/apply:os.system ["touch canary"]',
    "pickle.cls": pickle.dumps(Path("/canary")),
    "code.pyd": b"cos\nsystem\n(S'touch canary'\ntR.",
    "escape.cls": b"\x1b[2J\x07red",
    "formula.cls": b"$\\frac{1}$",
}


def test_hostile_labels_are_text_or_refused_s5(tmp_path: Path, make, capsys, monkeypatch) -> None:
    """Nothing is executed or unpickled, a label may not be huge, and the terminal sees no control codes."""
    monkeypatch.chdir(tmp_path)
    jpeg = encode_jpeg(make.noise(20, 30))
    media = {f"{name.partition('.')[0]}.jpg": jpeg for name in HOSTILE_LABELS}
    (tmp_path / "foreign").mkdir()
    tar = make.tar(tmp_path / "foreign" / "s.tar", HOSTILE_LABELS | media)
    labels = dict(zip(*(getattr(load_shard(str(tar)), column) for column in ("keys", "labels")), strict=True))
    assert labels.pop("escape") == "\x1b[2J\x07red" and labels.pop("formula") == "$\\frac{1}$"
    assert "canary" in labels.pop("pickle") and set(labels.values()) == {""}
    assert cli.main(["shards", "stats", str(tar), "--jobs", "1"]) == 0
    output = capsys.readouterr().out
    assert "red" in output and not {"\x1b", "\x07", "\0"} & set(output)
    assert (tmp_path / "stats.png").stat().st_size > 1000 and not (tmp_path / "canary").exists()
    assert sorted(path.name for path in tar.parent.iterdir()) == ["s.tar", "s.tar.index.json"]  # by load_shard above


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: d[:1024] + bytes(512) + d[1536:], "goes on after its end"),  # a header of zeros in the middle
        (lambda d: d[:1024] + b"\xff" * 512 + d[1536:], "not a whole tar"),
        (lambda d: d + d, "goes on after its end"),  # cat a.tar b.tar
    ],
)
def test_damaged_headers_never_lose_a_sample_silently_d10(tmp_path, make, damage, message: str) -> None:
    tar = make.tar(tmp_path / "s.tar", {f"{i}.jpg": bytes([i]) * 300 for i in range(1, 5)})
    tar.write_bytes(damage(tar.read_bytes()))
    with pytest.raises(UserError, match=message):
        load_shard(str(tar))


def claims(kind: bytes, size: bytes) -> bytes:
    """A header of `kind` whose data is `size` long: octal digits, or binary where the first bit is set."""
    info = tarfile.TarInfo("a")
    info.type = kind
    header = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
    header[124:136] = size.ljust(12, b"\0")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


EXTENDED = [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME]
SIZES = {"8G": b"77777777777", "4M": b"00020000000", "negative": b"\xff" * 10 + b"\xfe\0"}


@pytest.mark.parametrize(
    ("kind", "size"),
    [(kind, SIZES[name]) for kind in EXTENDED for name in SIZES]
    + [(tarfile.REGTYPE, SIZES["8G"]), (tarfile.REGTYPE, SIZES["negative"])],
)
def test_headers_that_claim_impossible_sizes_are_refused_d10(tmp_path: Path, make, kind: bytes, size: bytes) -> None:
    """Nothing is read into memory at a header's word, and none leads backwards, in circles for ever."""
    tar = make.tar(tmp_path / "s.tar", {"a.jpg": b"1"})
    tar.write_bytes(claims(kind, size) + tar.read_bytes())
    with tar.open("r+b") as file:
        file.truncate(8 << 20)
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match="s.tar is not a whole tar"):
            load_shard(str(tar))
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def test_every_flipped_bit_of_a_sample_is_found_d11(copies: Path) -> None:
    """As long as the bytes are verified; without that the damaged bytes go through."""
    path = copies / "image-000000.tar"
    members = list(load_shard(str(path)).members())
    rng = np.random.default_rng(11)
    with path.open("r+b") as tar:
        for i in range(3000):
            member = members[i % len(members)]
            at, bit = member.offset + int(rng.integers(member.size)), 1 << int(rng.integers(8))
            (byte,) = os.pread(tar.fileno(), 1, at)
            os.pwrite(tar.fileno(), bytes([byte ^ bit]), at)
            with pytest.raises(BadSample, match="not those that were indexed"):
                read_member(member)
            damaged = read_member(member, verify=False)
            assert damaged[at - member.offset] == byte ^ bit
            os.pwrite(tar.fileno(), bytes([byte]), at)
            assert read_member(member) == read_member(member, verify=False) != damaged


def test_without_verify_flipped_bits_pass_d11(copies: Path, with_data, tmp_path: Path) -> None:
    """The same damage: what still decodes goes unseen."""
    flip_bits(copies / "image-000001.tar", 9)
    found = []
    for verify in (True, False):
        config = with_data(images=f"{copies}/image-*.tar", max_bad_fraction=0.9, verify=verify)
        with Loader(config, folder=tmp_path) as loader:
            assert sum(1 for _ in islice(loader, 12)) == 12
            found.append(loader.bad_samples)
    assert found[0] >= 9 > found[1]


# found by the size, the first bytes, the last bytes, and by the decoder only
BAD_PICTURES = {
    "empty": lambda data: b"",
    "magic": lambda data: b"GIF89a" + data,
    "cut": lambda data: data[:-2],
    "no tables": lambda data: data.replace(b"\xff\xdb", b"\xff\xe9"),
}


def test_bad_image_leaves_the_rest_of_its_batch_unchanged_d12(shards: Path, make, with_data, tmp_path: Path) -> None:
    """First, in the middle, last: the neighbours come through untouched."""
    good = {}
    for shard in sorted(shards.glob("image-*.tar")):
        for member in load_shard(str(shard)).members():
            good[member.key] = read_member(member)
    still = {"short_side": (64, 64), "flip": 0.0, "image_jitter": (0.0, 0.0, 0.0), "max_bad_fraction": 0.9}

    def epoch(folder: Path, broken: str, spoil: Callable[[bytes], bytes]) -> tuple[torch.Tensor, list[str]]:
        """The views of 24 images, 4 a batch, and the keys that the plan wants there."""
        folder.mkdir()
        tar = make.tar(folder / "s.tar", {f"{key}.jpg": spoil(d) if key == broken else d for key, d in good.items()})
        config = with_data(images=str(tar), **still)
        config = replace(config, train=replace(config.train, global_clips=0, micro_clips=0))
        with Loader(config, folder=folder) as loader:
            plan = loader._reader._readers[1].plan
            keys = [list(good)[plan.entry(*divmod(i, 8)).member] for i in range(24)]
            return torch.cat([batch.image.view for batch in islice(loader, 6)]), keys

    check_image(BAD_PICTURES["no tables"](good["image-00"]), Limits())
    views, keys = epoch(tmp_path / "good", "", bytes)
    for place, (name, spoil) in enumerate(BAD_PICTURES.items()):
        broken = keys[4 * (place + 1) + place]  # at another place of another batch each time
        others, _ = epoch(tmp_path / name, broken, spoil)
        equal = [torch.equal(a, b) for a, b in zip(views, others, strict=True)]
        assert [key for key, same in zip(keys, equal, strict=True) if not same] == [broken]


def test_shards_of_webdataset_video2dataset_and_tar_are_read(tmp_path, shards, scenes, make) -> None:
    """Tars of webdataset's writer, of video2dataset's layout, and of plain `tar`: no manifest, any spelling."""
    jpeg = encode_jpeg(make.noise(20, 30))
    video = read_member(load_shard(str(shards / "video-000000.tar")).member(0))
    with webdataset.TarWriter(str(tmp_path / "wds.tar")) as writer:
        writer.write({"__key__": "a/b", "jpg": jpeg, "cls": 3, "json": {"label": 3}})
        writer.write({"__key__": "c", "mp4": video})
    make.tar(
        tmp_path / "v2d.tar",
        {"0000_00.mp4": video, "0000_00.json": b'{"status": "success"}', "0000_00.txt": b"a caption", "x.webm": video},
    )
    files = {"d/one.JPEG": jpeg, "d/two.PNG": jpeg, "three.mkv": video, "four.AVI": video, "d/.hidden": b""}
    for name, data in files.items():
        (tmp_path / "files" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "files" / name).write_bytes(data)
    subprocess.run(["tar", "-cf", tmp_path / "gnu.tar", "-C", tmp_path / "files", "."], check=True)
    found = {name: load_shard(str(tmp_path / f"{name}.tar")) for name in ("wds", "v2d", "gnu")}
    assert (found["wds"].keys, found["wds"].labels) == (("a/b", "c"), ("3", ""))
    assert found["v2d"].keys == ("0000_00", "x")
    assert set(found["gnu"].keys) == {"./d/one", "./d/two", "./three", "./four"}
    for shard in found.values():
        for member in shard.members():
            assert read_member(member) in (jpeg, video)


def test_dali_reads_with_our_index(shards: Path) -> None:
    path = shards / "image-000000.tar"
    index = write_dali_index(str(path))

    @pipeline_def(batch_size=9, num_threads=1, device_id=None)
    def graph():
        return fn.readers.webdataset(paths=[str(path)], index_paths=[str(index)], ext=["jpg"])

    pipe = graph()
    pipe.build()
    (images,) = pipe.run()
    members = list(load_shard(str(path)).members())
    assert [bytes(np.asarray(images[i])) for i in range(9)] == [read_member(m) for m in members]
    index.unlink()


def test_check_finds_every_flipped_bit_and_broken_file(tmp_path: Path, scenes, make, capsys) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for i in range(6):
        (source / f"{i}.jpg").write_bytes(encode_jpeg(make.noise(20, 30, seed=i)))
    pack(source, tmp_path / "out", "image")
    tar = tmp_path / "out" / "train-000000.tar"
    assert cli.main(["shards", "check", str(tar)]) == 0
    flip_bits(tar, 2)
    report = tmp_path / "report.jsonl"
    assert cli.main(["shards", "check", str(tar), "--report", str(report), "--jobs", "1"]) == 1
    findings = [json.loads(line) for line in report.read_text().splitlines()]
    assert {f["key"] for f in findings} == {"", "0", "1"}  # the tar's hash and two members
    assert "3 faults" in capsys.readouterr().out
    load_shard(str(tar), fresh=True)  # an index that trusts the damaged bytes: only the pack's hash is left
    assert any("SHA-256" in f["reason"] for f in check([str(tar)], jobs=1).findings)
    (tmp_path / "cut.tar").write_bytes(tar.read_bytes()[:3000])
    assert "not a whole tar" in check([str(tmp_path / "cut.tar")], jobs=1).findings[0]["reason"]


def test_stats_of_shards(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch) -> None:
    monkeypatch.setattr(stats, "measure", partial(stats.measure, seconds=0.1))
    plot = tmp_path / "s.png"
    arguments = ["--recipe", "demo", "--clips-per-second", "1", "--plot", str(plot), "--jobs", "1"]
    assert cli.main(["shards", "stats", f"{shards}/video-*.tar", *arguments]) == 0
    out = capsys.readouterr().out
    assert "10 samples in 3 shards, 0 unreadable" in out and "codec" in out and "h264 10" in out
    assert "recipe demo: 8 frames at stride 1" in out and "enough" in out
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert cli.main(["shards", "stats", f"{shards}/image-*.tar", *arguments]) == 0
    assert "recipe" not in capsys.readouterr().out
