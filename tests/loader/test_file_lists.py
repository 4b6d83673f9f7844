"""File lists: columns, headers, labels, and errors that name line and remedy."""

from __future__ import annotations

from pathlib import Path

import pytest

from bevt_ds.errors import UserError
from bevt_ds.shards.file_lists import LONGEST, read_rows


@pytest.mark.parametrize(
    ("line", "row"),
    [
        ("a/b.mp4 3", ("a/b.mp4", "3")),
        ("with space.mp4 3", ("with space.mp4", "3")),
        ("with space.MP4   Push left", ("with space.MP4", "Push left")),
        ("Push left/g 01.avi Push left", ("Push left/g 01.avi", "Push left")),
        ("a.mp4\tPush left, then right", ("a.mp4", "Push left, then right")),
        ("clip 7\tPush left", ("clip 7", "Push left")),
        ("a.mp4,3", ("a.mp4", "3")),
        ("a.mp4 , Push left", ("a.mp4", "Push left")),
        ("a.mp4 Push, then pull", ("a.mp4", "Push, then pull")),
        ('a.mp4,"Push, then pull"', ("a.mp4", "Push, then pull")),
        ('a.mp4 "Push ""left"""', ("a.mp4", 'Push "left"')),
        ('"clip 7" "push left"', ("clip 7", "push left")),
        ('"a,b.mp4" 3', ("a,b.mp4", "3")),
        ('"a,b.mp4",3', ("a,b.mp4", "3")),
        ("don't.mp4 it's", ("don't.mp4", "it's")),
        ("a.mp4 b.mp4 3", ("a.mp4 b.mp4", "3")),
        ("clip 7 -1", ("clip 7", "-1")),
        ("78687 jump", ("78687", "jump")),
        ("78687", ("78687", "")),
        ("with space.webm", ("with space.webm", "")),
        ("a.JPEG 0", ("a.JPEG", "0")),
        ("100218;Something falling, like a feather", ("100218", "Something falling, like a feather")),
        ("a b.mp4 ; Push left", ("a b.mp4", "Push left")),
        ('"clip 7";"push; then pull"', ("clip 7", "push; then pull")),
        ("a.mp4 Push; then pull", ("a.mp4", "Push; then pull")),
        ("a;b.mp4 3", ("a;b.mp4", "3")),
        ('"#1.mp4" 3', ("#1.mp4", "3")),
        ("a.mp4 push\u2028left", ("a.mp4", "push\u2028left")),
        ("a.mp4 push\x85left\x0bright\x1c", ("a.mp4", "push\x85left\x0bright")),
        ("a\u2028b.mp4\tpush\xa0left", ("a\u2028b.mp4", "push\xa0left")),
    ],
)
def test_file_list_without_a_header(line: str, row: tuple[str, str]) -> None:
    assert read_rows(Path("list.txt"), f"{line}\n") == [row]
    assert read_rows(Path("list.TXT"), f"other.mp4 1\n\n  {line} \r\n")[1] == row


def test_file_list_as_csv() -> None:
    text = 'clip 7,Push left\n"a, b","x, y"\nb.mp4 Push left\nc.mp4\n'
    rows = [("clip 7", "Push left"), ("a, b", "x, y"), ("b.mp4", "Push left"), ("c.mp4", "")]
    assert read_rows(Path("list.csv"), text) == rows


@pytest.mark.parametrize(
    ("name", "text", "row"),
    [
        (
            "k.csv",
            "label,youtube_id,time_start,time_end,split\npull ups,-x_1,7,17,train\n",
            ("-x_1_000007_000017", "pull ups"),
        ),
        ("k.txt", '"label", "youtube_id", "time_start", "time_end"\n"a, b", x, 7.0, 17\n', ("x_000007_000017", "a, b")),
        ("k.csv", "youtube_id,time_start,time_end,split\nx,7,17,test\n", ("x_000007_000017", "")),
        ("own.csv", "Label,Path,duration\nPush left,a b.mp4,3.5\n", ("a b.mp4", "Push left")),
        ("own.txt", "video_path\tclass_name\na b.mp4\tPush left\n", ("a b.mp4", "Push left")),
        ("own.txt", "path label\na b.mp4 Push left\n", ("a b.mp4", "Push left")),
        ("own.txt", "class,file\n3,a b\n", ("a b", "3")),
        ("own.txt", "path\na b.mp4\n", ("a b.mp4", "")),
        ("v1.csv", "id;label\n100218;Falling, like a feather\n", ("100218", "Falling, like a feather")),
        ("own.csv", "# made by hand\npath,label\n#\na.mp4,push\u2028left\n## end\n", ("a.mp4", "push\u2028left")),
        ("own.txt", "#path,label\na.mp4 3\n#no more\n# b.mp4 4\n", ("a.mp4", "3")),
        ("jester.csv", "34870;Drumming Fingers\n", ("34870", "Drumming Fingers")),
    ],
)
def test_file_list_headers(name: str, text: str, row: tuple[str, str]) -> None:
    assert read_rows(Path(name), text) == [row]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "a.mp4 1\nclip 7 push left\n", "a.txt, line 2: 'clip 7 push left' does not show where its path ends"),
        ("a.txt", "a.mp4 1\n\nb.mp4 1 4\n", "line 3: 'b.mp4 1 4' has more than a path and one label"),
        ("a.txt", "b.mp4,left,train\n", "line 1: .* has more than a path and one label: put a label that holds commas"),
        ("a.csv", "left,b.mp4\n", "line 1: .* has a file for a label: the path comes first"),
        ("a.csv", "a, b.mp4 4\n", "line 1: .* has a file for a label: the path comes first, in quotes if it holds"),
        ("a.txt", 'b.mp4 "left\n', "line 1: .* has a quote too many or too few"),
        ("a.csv", ",3\n", "line 1: ',3' names no file"),
        ("a.csv", "a.mp4,3\n..,3\n", "line 2: '..,3' names no file"),
        (
            "a.csv",
            "clip_id,motion\n78687,left\n",
            "line 1: 'clip_id,motion' looks like a header with unknown names: call",
        ),
        ("a.txt", "clip motion\na.mp4 left\n", "line 1: .*call the columns path and label, or remove the line"),
        ("a.csv", "path,motion\na.mp4,left\n", "line 1: 'path,motion' names no column of labels: call it label, or"),
        (
            "a.csv",
            "path,label\na.mp4,push, left\n",
            "line 2: .* has 3 fields, the header 2: put those that hold commas",
        ),
        (
            "a.csv",
            "youtube_id,time_start,time_end\nx,1,2\nx,one,2\n",
            "line 3: .* times that are no seconds in time_start",
        ),
        ("a.csv", "youtube_id,time_start,time_end\nx,1,inf\n", "line 2: .* times that are no seconds in time_start"),
        ("a.csv", "youtube_id,time_start,time_end\nx,1\n", "line 2: 'x,1' has 2 fields, the header 3"),
        ("a.txt", "a.mp4 1\n#b.mp4 1\n", "line 2: '#b.mp4 1' may be a comment or a row: put a space behind '#'"),
        ("a.csv", "a,1\n\n#b,1\n", "line 3: '#b,1' may be a comment or a row: .* or quotes around its first part"),
        ("a.csv", "label,path\n#selfie,a.mp4\n", "line 2: '#selfie,a.mp4' may be a comment or a row"),
        ("a.csv", "class,video\n#selfie,a\n", "line 2: '#selfie,a' may be a comment or a row"),
        ("a.csv", "1;left;3\n", "line 1: '1;left;3' has more than a path and one label: .* commas or semicolons into"),
        ("a.txt", "clip 7;left\n", "line 1: 'clip 7;left' does not show where its path ends: .* put it into quotes"),
        ("a.csv", "clip;motion\n1;left\n", "line 1: 'clip;motion' looks like a header with unknown names"),
        ("a.txt", "a.mp4\xa03\n", r"line 1: .* has U\+00A0 behind its path: write a space"),
        ("a.txt", "a.mp4 1\nb\0.mp4 1\n", r"line 2: 'b\\x00.mp4 1' names no file"),
        ("a.json", '[{"id": "7"}, {"id": ".."}]', "a.json, object 2: .* names no file"),
        (
            "a.json",
            '[{"id": 7, "label": {}}]',
            "object 1: .* has a name or a label that is neither text nor a whole number",
        ),
        ("a.json", '[{"vid_name": true}]', "object 1: .* has a name or a label that is neither text"),
        ("a.json", '[{"id": "7", "label": "\\ud800"}]', "object 1: .* has a name or a label that is neither text"),
        ("a.json", '[{"id": null}]', "object 1: .* names no file"),
        ("a.json", "[" * 100_000, "a.json is no JSON"),
        ("a.txt", "x" * (LONGEST + 1), "line 1: 'x{80}' has 10001 characters: this is no list"),
    ],
)
def test_file_list_errors_name_line_and_remedy(name: str, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_rows(Path(name), text)


def test_file_list_without_extensions_has_no_header() -> None:
    """A name without an extension is no header where the other lines look like it."""
    assert read_rows(Path("a.txt"), "jump left\nrun right\n") == [("jump", "left"), ("run", "right")]


def test_file_list_label_may_be_null() -> None:
    text = '[{"id": "1", "label": null}, {"id": 2, "template": null}, {"vid_name": "3", "label": null}]'
    assert read_rows(Path("a.json"), text) == [("1", ""), ("2", ""), ("3", "")]
