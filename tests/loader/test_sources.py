"""Sources to pack: folders, globs and the file lists of four data sets."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from bevt_ds.errors import UserError
from bevt_ds.shards.sources import Item, endings, list_items


@pytest.fixture
def media(tmp_path: Path) -> Path:
    """Empty files: listing does not open them."""
    names = ["abseiling/0wR5jVB-WPk_000417_000427.mp4", "78687.webm", "_8Vy3dlHg2w_00000.mp4", "with space.mp4"]
    for name in [*names, "imagenet/n01440764/a.JPEG", "imagenet/n01443537/b.JPEG", "other/n01440764/a.jpg"]:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return tmp_path


def listed(items: Sequence[Item]) -> list[tuple[str, str, str]]:
    return [(item.name, item.key, item.label) for item in items]


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        (
            "k400.csv",
            "label,youtube_id,time_start,time_end,split\nabseiling,0wR5jVB-WPk,417,427,train\nx,gone,0,10,train\n",
            [
                ("0wR5jVB-WPk_000417_000427.mp4", "0wR5jVB-WPk_000417_000427", "abseiling"),
                ("gone_000000_000010", "gone_000000_000010", "x"),  # packing it is what fails
            ],
        ),
        ("list.txt", "78687.webm 3\nwith space.mp4 4\n\n", [("78687.webm", "78687", "3"), ("with space.mp4",) * 2]),
        ("train.csv", "78687.webm,3\nwith space.mp4 4\n", [("78687.webm", "78687", "3"), ("with space.mp4",) * 2]),
        ("missing.txt", "gone.wmv\n", [("gone.wmv", "gone", "")]),
        ("bare.txt", "78687\n", [("78687.webm", "78687", "")]),
        (
            "ssv2.json",
            json.dumps([{"id": "78687", "label": "holding a cup", "template": "Holding [something]"}]),
            [("78687.webm", "78687", "Holding something")],
        ),
        (
            "diving48.json",
            json.dumps([{"vid_name": "_8Vy3dlHg2w_00000", "label": 26, "start_frame": 0, "end_frame": 99}]),
            [("_8Vy3dlHg2w_00000.mp4", "_8Vy3dlHg2w_00000", "26")],
        ),
    ],
)
def test_file_lists_of_four_data_sets(media: Path, name: str, text: str, expected: list) -> None:
    (media / name).write_text(text)
    items = listed(list_items(str(media / name), "video").items)
    full = [e if len(e) == 3 else ("with space.mp4", "with space", "4") for e in expected]
    assert items == full


def test_kinetics_folder_names_may_have_underscores(media: Path) -> None:
    touched(media, "pull_ups/a_000001_000011.mp4", "abseiling/b_000001_000011.mp4", "tap dancing/c_000001_000011.mp4")
    rows = ["pull ups,a,1,11", "abseiling,b,1,11", "tap dancing,c,1,11", "pull ups,gone,1,11"]
    (media / "k700.csv").write_text("\n".join(["label,youtube_id,time_start,time_end", *rows]))
    items = list_items(str(media / "k700.csv"), "video").items
    assert [str(item.path.relative_to(media)) for item in items if item.path.exists()] == [
        "pull_ups/a_000001_000011.mp4",
        "abseiling/b_000001_000011.mp4",
        "tap dancing/c_000001_000011.mp4",
    ]
    assert [item.label for item in items] == ["pull ups", "abseiling", "tap dancing", "pull ups"]
    assert items[-1].name == "gone_000001_000011"  # packing it is what fails


def test_file_list_outside_the_media_folder(media: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    place = tmp_path_factory.mktemp("lists") / "list.txt"
    place.write_text("78687.webm 3\n")
    (item,) = list_items(str(place), "video", root=media).items
    assert item.path == media / "78687.webm"


def test_imagenet_folders_are_labels_in_their_order(media: Path) -> None:
    assert listed(list_items(str(media / "imagenet"), "image").items) == [
        ("n01440764/a.JPEG", "n01440764/a", "0"),
        ("n01443537/b.JPEG", "n01443537/b", "1"),
    ]
    assert {item.label for item in list_items(str(media), "image").items} == {""}  # other folders next to them


def test_class_folders_give_labels(media: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("ucf")
    for name in ("Push left/g01/a.avi", "jump/b.avi"):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).touch()
    assert listed(list_items(str(folder), "video", class_folders=True).items) == [
        ("Push left/g01/a.avi", "Push left/g01/a", "Push left"),
        ("jump/b.avi", "jump/b", "jump"),
    ]
    assert {item.label for item in list_items(str(folder), "video").items} == {""}
    with pytest.raises(UserError, match=r"78687.webm lies in no folder of .*: with --class-folders"):
        list_items(str(media), "video", class_folders=True)
    with pytest.raises(UserError, match="is no folder of class folders"):
        list_items(f"{media}/*.mp4", "video", class_folders=True)


def test_class_folder_name_must_be_a_label(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    (folder / "a.mp4").touch()
    with pytest.raises(UserError, match=r"'caf\\udce9' in .* is not in UTF-8, and a label is: rename it"):
        list_items(str(tmp_path), "video", class_folders=True)
    assert len(list_items(str(tmp_path), "video").items) == 1


def test_names_impossible_on_a_file_system(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("x" * 300 + ".mp4 1\n")
    (item,) = list_items(str(tmp_path / "list.txt"), "video").items  # packing it is what fails
    assert item.name == "x" * 300 + ".mp4"
    with pytest.raises(UserError, match="is no folder, no list, and no glob"):
        list_items("x" * 300, "video")


def test_quicktime_extension_is_packed_as_mp4(tmp_path: Path) -> None:
    for name in ("a.MOV", "b.m4v", "c d.mov", "._a.MOV"):
        (tmp_path / name).touch()
    expected = [("a.MOV", "mp4"), ("b.m4v", "mp4"), ("c d.mov", "mp4")]
    (tmp_path / "list.txt").write_text("a.MOV 1\nb 1\nc d.mov 1\n")
    for source in (tmp_path, tmp_path / "*", tmp_path / "list.txt"):
        assert [(item.name, item.extension) for item in list_items(str(source), "video").items] == expected


def test_sources_from_globs(media: Path) -> None:
    assert [item.name for item in list_items(f"{media}/**/*.mp4", "video").items] == sorted(
        ["_8Vy3dlHg2w_00000.mp4", "abseiling/0wR5jVB-WPk_000417_000427.mp4", "with space.mp4"]
    )


def test_source_keys_stay_inside_the_folder(tmp_path: Path) -> None:
    assert Item(tmp_path, "../../etc/a.b.mp4").key == "etc/a_b"


def touched(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def faults(items: Sequence[Item]) -> dict[str, str]:
    return {item.name: item.fault for item in items if item.fault}


def test_symlinked_class_folders_are_classes(tmp_path: Path) -> None:
    folder = touched(tmp_path, "real/A/x.mp4", "real/A/deep/y.mp4", "ds/B/z.mp4") / "ds"
    (folder / "A").symlink_to("../real/A")
    (folder / "B" / "w.mp4").symlink_to("../../real/A/x.mp4")
    expected = [("A/deep/y.mp4", "A"), ("A/x.mp4", "A"), ("B/w.mp4", "B"), ("B/z.mp4", "B")]
    items = list_items(str(folder), "video", class_folders=True).items
    assert [(item.name, item.label) for item in items] == expected
    for pattern in ("**/*.mp4", "**"):
        assert [i.name for i in list_items(f"{folder}/{pattern}", "video").items] == [name for name, _ in expected]


@pytest.mark.parametrize("source", ["", "/**/*.mp4", "/**"])
def test_symlink_cycle_is_followed_once(tmp_path: Path, source: str) -> None:
    folder = touched(tmp_path / "ds", "A/x.mp4", "B/y.mp4")
    for name in ("A/up", "A/again", "B/up"):
        (folder / name).symlink_to("..")
    (folder / "B" / "own").symlink_to(folder / "B")
    items = list_items(f"{folder}{source}", "video").items
    assert [item.name for item in items if not item.fault] == ["A/x.mp4", "B/y.mp4"]
    assert faults(items) == {
        **dict.fromkeys(("A/up", "A/again", "B/up"), "it is a link to '..', a folder that it lies in itself"),
        "B/own": f"it is a link to '{folder}/B', a folder that it lies in itself",
    }


@pytest.mark.parametrize("source", ["", "/*/*.mp4", "/**/*.mp4"])
def test_broken_symlinks_are_named(tmp_path: Path, source: str) -> None:
    folder = touched(tmp_path / "ds", "B/x.mp4")
    (folder / "A").symlink_to("../gone/A")
    (folder / "B" / "y.mp4").symlink_to("z.mp4")
    items = list_items(f"{folder}{source}", "video", class_folders=not source).items
    assert faults(items) == {
        "A": "it is a link to '../gone/A', which cannot be opened: No such file or directory",
        "B/y.mp4": "it is a link to 'z.mp4', which cannot be opened: No such file or directory",
    }


def test_unreadable_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, scandir = touched(tmp_path, "A/x.mp4", "B/y.mp4"), os.scandir

    def refused(path: Path):
        if Path(path).name == "A":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refused)
    for source in (folder, folder / "*" / "*.mp4", folder / "**" / "*.mp4"):
        assert faults(list_items(str(source), "video").items) == {"A": "cannot list the folder: Permission denied"}


def test_imagenet_label_numbers_count_empty_folders(tmp_path: Path) -> None:
    folder = touched(tmp_path, "n00000002/a.webp", "n00000003/b.jpg")
    (folder / "n00000001").symlink_to("gone")
    (folder / "readme").symlink_to("gone")
    items = list_items(str(folder), "image").items
    assert {item.name: item.label for item in items if not item.fault} == {"n00000003/b.jpg": "2"}


@pytest.mark.parametrize("source", ["", "/**"])
def test_other_extensions_are_counted(tmp_path: Path, source: str) -> None:
    names = ["a.mp4", "b.wmv", "c/d.WMV", "c/notes.txt", "c/README", "c/._e.mp4", "c/f.ts"]
    folder = touched(tmp_path / "ds", *names)
    passed_over = list_items(f"{folder}{source}", "video").passed_over
    hidden = {} if source else {"macOS's ._NAME": 1}
    assert passed_over == {".wmv": 2, ".txt": 1, "no ending": 1, ".ts": 1, **hidden}
    assert endings(passed_over).startswith("2 .wmv, 1 .ts, 1 .txt")
    with pytest.raises(UserError, match="no image file in|matches a image file") as caught:
        list_items(f"{folder}{source}", "image")
    assert "2 .wmv" in str(caught.value)


def test_existing_source_is_not_a_pattern(tmp_path: Path) -> None:
    folder = touched(tmp_path, "data[v2]/a[1].mp4", "data[v2]/b.mp4", "datav/c.mp4")
    for pattern, names in [("data[v2]/*", 2), ("data[v2]/a[1].mp4", 1), ("data[v]/*", 1)]:
        assert len(list_items(f"{folder}/{pattern}", "video").items) == names


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.json", b"{", "no JSON"),
        ("a.json", b'[{"x": 1}]', "is not a list of objects"),
        ("a.txt", b"\xff\xfe\x00", "neither a list in UTF-8"),
        ("a.txt", b"\n", "no video file in"),
        ("a.txt", b"path label\n", "no video file in"),
    ],
)
def test_invalid_file_lists_are_named(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=message):
        list_items(str(tmp_path / name), "video")
