"""Classes of labelled shards: from labels, the manifest or a class file; messages name shard and key."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from bevt_ds.data.labels import Classes, expected_count, read_classes
from bevt_ds.data.reading.members import Shard
from bevt_ds.errors import UserError
from bevt_ds.shards.check import check
from tests.loader.media import load_shards, write_tar


def shard(name: str, *labels: str) -> Shard:
    """A shard that is nowhere: samples s0, s1, ... with these labels."""
    n = len(labels)
    keys = tuple(f"s{i}" for i in range(n))
    zeros = (0,) * n
    return Shard(f"/nowhere/{name}.tar", keys, ("mp4",) * n, zeros, zeros, zeros, zeros, labels, ("",) * n, 0)


def test_class_names_are_sorted_and_numbers_are_kept() -> None:
    named = read_classes([shard("a", "run", "sit"), shard("b", "crawl")], [shard("v", "sit")])
    assert named.names == ("crawl", "run", "sit")
    assert named.labels(shard("c", "sit", "crawl", "sit")).tolist() == [2, 0, 2]
    numbered = read_classes([shard("a", "0", "10", "2")], [])
    assert numbered.names == tuple(map(str, range(11)))
    assert numbered.labels(shard("c", "10", "2")).tolist() == [10, 2]


def test_class_file_names_the_classes_in_label_order(tmp_path: Path) -> None:
    file = tmp_path / "names.txt"
    file.write_text("zebra\nape\n\ncat\n")
    assert read_classes([shard("a", "ape", "cat")], [], str(file)).labels(shard("c", "ape", "zebra")).tolist() == [1, 0]
    assert read_classes([shard("a", "2", "0")], [], str(file)).names == ("zebra", "ape", "cat")


def test_classes_come_from_validation_shards_without_training_shards() -> None:
    assert read_classes([], [shard("v", "b", "a")]).names == ("a", "b")


@pytest.mark.parametrize(
    ("train", "val", "message"),
    [
        ([shard("a", "run", "")], [], r"'s1' of /nowhere/a.tar has no label: add s1.cls, or 'label' to its .json"),
        ([shard("a", "run")], [shard("v", "")], r"'s0' of /nowhere/v.tar has no label"),
        ([shard("a", "run", "3")], [], r"names in others: sample 's0' of /nowhere/a.tar has 'run', sample 's1'.*'3'"),
        ([shard("a", "0")], [shard("v", "walk")], r"'s0' of /nowhere/a.tar has '0', sample 's0' of /nowhere/v.tar"),
        ([shard("a", "0", "-1")], [], r"'s1' of /nowhere/a.tar has the label '-1', which is none of the 1 classes"),
        ([shard("a", "0", "1")], [shard("v", "1", "2")], r"'s1' of /nowhere/v.tar has the label '2', which is none of"),
        ([shard("a", "run")], [shard("v", "walk")], r"'s0' of /nowhere/v.tar has the label 'walk', which is none"),
        ([shard("a", "run")], [shard("v", "\x1b[2J" * 99)], r"has the label '(\\x1b\[2J){15}\.\.\.', which is none"),
        ([shard("a", "0", "2")], [shard("v", "1")], r"'s0' of /nowhere/v.tar is of class '1', which no training"),
        ([shard("a", "0", "16384")], [], r"'s1' of /nowhere/a.tar has the label 16384: classes are numbered"),
        ([shard("a", *(f"take {i}" for i in range(16385)))], [], r"16385 classes, 'take 0', .*: more than 16384 are"),
    ],
)
def test_label_mistakes_name_shard_and_key(train: list[Shard], val: list[Shard], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_classes(train, val)


def test_label_mistakes_against_a_class_file(tmp_path: Path) -> None:
    file = tmp_path / "names.txt"
    file.write_text("ape\ncat\n")
    with pytest.raises(UserError, match=r"'s1' of /nowhere/a.tar has the label 'dog'.*2 classes 'ape', 'cat'"):
        read_classes([shard("a", "cat", "dog")], [], str(file))
    with pytest.raises(UserError, match=r"has the label '2'"):
        read_classes([shard("a", "0", "2")], [], str(file))
    for text, message in (("", "is empty"), ("ape\nape\n", "names 'ape' twice")):
        file.write_text(text)
        with pytest.raises(UserError, match=message):
            read_classes([shard("a", "0")], [], str(file))
    with pytest.raises(UserError, match="cannot read data.classes=.*absent"):
        read_classes([shard("a", "0")], [], str(tmp_path / "absent"))


def test_class_missing_in_validation_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        read_classes([shard("a", "run", "sit", "walk")], [shard("v", "sit")])
    assert [record.getMessage() for record in caplog.records] == ["data.val lacks 2 of the 3 classes: 'run', 'walk'"]


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory, pack_labelled: Callable[..., str]) -> Path:
    """A folder of three shards and their manifest; the class `walk` is in the third only."""
    folder = tmp_path_factory.mktemp("split")
    pack_labelled(folder, "train", ["run", "sit"] * 4 + ["walk"])
    return folder


@pytest.fixture
def packed(split: Path, tmp_path: Path) -> list[Shard]:
    """The first two shards of the split, in a folder of the test's own."""
    shutil.copytree(split, tmp_path, dirs_exist_ok=True)
    return load_shards([str(tmp_path / f"train-00000{i}.tar") for i in (0, 1)], "video")


def test_expected_samples_come_from_the_manifest(packed: list[Shard], caplog: pytest.LogCaptureFixture) -> None:
    assert read_classes(packed, []).names == ("run", "sit", "walk")
    assert caplog.messages == ["data.train lacks 1 of the 3 classes: 'walk'"]
    assert expected_count(packed) == 9
    assert expected_count(packed, stated=12) == 12


def test_expected_samples_include_the_rejects_of_the_manifest(packed: list[Shard], tmp_path: Path) -> None:
    path = tmp_path / "train-manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rejected": 5}))
    assert expected_count(packed) == 14


def test_expected_samples_include_shards_without_a_manifest(packed: list[Shard]) -> None:
    assert expected_count([*packed, shard("a", "run", "sit", "run")]) == 9 + 3


def test_expected_samples_without_a_manifest_are_counted(packed: list[Shard], tmp_path: Path) -> None:
    (tmp_path / "train-manifest.json").unlink()
    assert expected_count(packed) == 8 and read_classes(packed, []).names == ("run", "sit")


def test_manifest_of_another_split_is_ignored(packed: list[Shard], tmp_path: Path) -> None:
    other = {"labels": {"swim": 1}, "shards": [{"name": "val-000000.tar"}], "samples": 1, "rejected": 0}
    (tmp_path / "val-manifest.json").write_text(json.dumps(other))
    assert read_classes(packed, []).names == ("run", "sit", "walk")


@pytest.mark.parametrize("text", ["{", "[]", '{"labels": [], "shards": []}', '{"labels": {}, "shards": ["x"]}'])
def test_invalid_manifest_is_named(packed: list[Shard], tmp_path: Path, text: str) -> None:
    (tmp_path / "odd-manifest.json").write_text(text)
    with pytest.raises(UserError, match="odd-manifest.json.*Pack again, or remove it"):
        read_classes(packed, [])


@pytest.mark.parametrize("label", [b"2", b'"2"', b"true", b"2.0", b"null", b"[2]"])
def test_labels_from_cls_and_json_members(tmp_path: Path, label: bytes) -> None:
    members = {"a.mp4": b"x", "a.cls": b"3\n", "b.json": b'{"label": 1}', "b.mp4": b"y", "c.mp4": b"z"}
    members["c.json"] = b'{"label": ' + label + b"}"
    shards = load_shards([str(write_tar(tmp_path / "own.tar", members))], "video")
    classes = Classes(tuple("0123"))
    if label in (b"2", b'"2"'):
        assert classes.labels(shards[0]).tolist() == [3, 1, 2]
        return
    with pytest.raises(UserError, match="'c' of .*own.tar has no label: .*, a whole number or a name"):
        classes.labels(shards[0])


@pytest.mark.parametrize("order", [("cls", "json"), ("json", "cls")])
@pytest.mark.parametrize(
    ("cls", "label", "agree"),
    [
        (b"3", b"3", True),
        (b"03\n", b"3", True),
        (b" push left \n", b'"push left "', True),
        (b"3", b"true", True),  # no label
        (b"3", b"4", False),
        (b"3", b'"push left"', False),
        (b"push", b'"pull"', False),
    ],
)
def test_cls_and_json_labels_must_agree(tmp_path: Path, order: tuple, cls: bytes, label: bytes, agree: bool) -> None:
    """Training on such shards without their labels remains possible; whoever needs these is told."""
    files = {"cls": cls, "json": b'{"label": ' + label + b"}"}
    members = {"a.mp4": b"x", "a.cls": cls, "b.mp4": b"y", **{f"b.{name}": files[name] for name in order}}
    shards = load_shards([str(write_tar(tmp_path / "own.tar", members))], "video")
    assert shards[0].labels == (cls.decode().strip(),) * 2
    again = load_shards([str(tmp_path / "own.tar")], "video")  # from the index
    if agree:
        assert read_classes(again, [])
        return
    text = cls.decode() + "' in its .cls and '" + label.decode().strip('"')
    with pytest.raises(UserError, match=f"^sample 'b' of .*own.tar has the label '{text}' in its .json: correct one"):
        read_classes([], again)


def test_check_finds_labels_that_disagree(tmp_path: Path) -> None:
    write_tar(tmp_path / "own.tar", {"a.mp4": b"x", "a.json": b'{"label": "pull"}', "a.cls": b"push"})
    first = check([str(tmp_path / "own.tar")], jobs=1).findings[0]
    assert (first["key"], first["reason"]) == ("a", "its .cls has the label 'push', its .json 'pull'")
