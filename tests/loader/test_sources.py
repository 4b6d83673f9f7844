"""What can be packed: folders, globs and the lists of four data sets."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from bevt_ds.errors import UserError
from bevt_ds.shards.sources import Item, list_items


@pytest.fixture
def media(tmp_path: Path) -> Path:
    """Empty files: listing does not open them."""
    names = ["abseiling/0wR5jVB-WPk_000417_000427.mp4", "78687.webm", "_8Vy3dlHg2w_00000.mp4", "with space.mp4"]
    for name in [*names, "imagenet/n01440764/a.JPEG", "imagenet/n01443537/b.JPEG", "other/n01440764/a.jpg"]:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return tmp_path


def listed(items: list[Item]) -> list[tuple[str, str, str]]:
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
def test_lists(media: Path, name: str, text: str, expected: list) -> None:
    (media / name).write_text(text)
    items = listed(list_items(str(media / name), "video"))
    full = [e if len(e) == 3 else ("with space.mp4", "with space", "4") for e in expected]
    assert items == full


def test_a_list_may_lie_elsewhere(media: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    place = tmp_path_factory.mktemp("lists") / "list.txt"
    place.write_text("78687.webm 3\n")
    (item,) = list_items(str(place), "video", root=media)
    assert item.path == media / "78687.webm"


def test_imagenets_folders_give_labels_in_their_order(media: Path) -> None:
    assert listed(list_items(str(media / "imagenet"), "image")) == [
        ("n01440764/a.JPEG", "n01440764/a", "0"),
        ("n01443537/b.JPEG", "n01443537/b", "1"),
    ]
    assert {item.label for item in list_items(str(media), "image")} == {""}  # other folders beside them


def test_folders_may_be_classes(media: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("ucf")
    for name in ("Push left/g01/a.avi", "jump/b.avi"):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).touch()
    assert listed(list_items(str(folder), "video", class_folders=True)) == [
        ("Push left/g01/a.avi", "Push left/g01/a", "Push left"),
        ("jump/b.avi", "jump/b", "jump"),
    ]
    assert {item.label for item in list_items(str(folder), "video")} == {""}
    with pytest.raises(UserError, match=r"78687.webm lies in no folder of .*: with --class-folders"):
        list_items(str(media), "video", class_folders=True)
    with pytest.raises(UserError, match="is no folder of class folders"):
        list_items(f"{media}/*.mp4", "video", class_folders=True)


def test_a_class_folder_has_a_name_that_can_be_a_label(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    (folder / "a.mp4").touch()
    with pytest.raises(UserError, match=r"'caf\\udce9' in .* is not in UTF-8, and a label is: rename it"):
        list_items(str(tmp_path), "video", class_folders=True)
    assert len(list_items(str(tmp_path), "video")) == 1


def test_names_that_no_file_system_has(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("x" * 300 + ".mp4 1\n")
    (item,) = list_items(str(tmp_path / "list.txt"), "video")  # packing it is what fails
    assert item.name == "x" * 300 + ".mp4"
    with pytest.raises(UserError, match="is no folder, no list, and no glob"):
        list_items("x" * 300, "video")


def test_quicktime_is_mp4_by_another_name(tmp_path: Path) -> None:
    for name in ("a.MOV", "b.m4v", "c d.mov", "._a.MOV"):
        (tmp_path / name).touch()
    expected = [("a.MOV", "mp4"), ("b.m4v", "mp4"), ("c d.mov", "mp4")]
    (tmp_path / "list.txt").write_text("a.MOV 1\nb 1\nc d.mov 1\n")
    for source in (tmp_path, tmp_path / "*", tmp_path / "list.txt"):
        assert [(item.name, item.extension) for item in list_items(str(source), "video")] == expected


def test_globs(media: Path) -> None:
    assert [item.name for item in list_items(f"{media}/**/*.mp4", "video")] == sorted(
        ["_8Vy3dlHg2w_00000.mp4", "abseiling/0wR5jVB-WPk_000417_000427.mp4", "with space.mp4"]
    )


def test_keys_stay_inside(tmp_path: Path) -> None:
    assert Item(tmp_path, "../../etc/a.b.mp4").key == "etc/a_b"


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
def test_lists_that_are_none(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=message):
        list_items(str(tmp_path / name), "video")
