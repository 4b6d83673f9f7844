"""A list of files -> the name and the label of each.

A line is a path, then a tab, comma, semicolon or space, then a label. A path ends with its extension, so both may hold
spaces. Where extensions are left out, the label is the last word, an integer or the second of two words; else a tab, a
semicolon, a comma in a .csv, or quotes show where the path ends: `"clip 7" "push left"`. The label may be missing. A
line that begins with `# ` is a comment. Only line feeds end lines: Unicode's other separators may be in a label.

Where the first line has column names, they say which columns are path and label. Three data sets have lists of their
own: Kinetics' CSV, Something-Something V2's JSON, Diving48's JSON.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bevt_ds.data.reading.members import EXTENSIONS
from bevt_ds.errors import UserError

Row = tuple[str, str]  # a file's name, perhaps without its extension, and its label, "" where there is none
Line = tuple[int, str]  # its number, from 1, and its text; or those of an object in JSON

PATHS = ("path", "filepath", "file_path", "file", "filename", "file_name", "video", "video_path", "video_name", "name")
PATHS += ("id", "video_id")
LABELS = ("label", "class", "class_name", "category", "action")
KINETICS = {"youtube_id", "time_start", "time_end"}
LONGEST = 10_000  # characters of a line
SHOWN = 80  # of them in a message

QUICKTIME = ("m4v", "mov")  # files that are MP4 under another name, which they get in a tar
FILES = {"video": (*sorted(EXTENSIONS["video"]), *QUICKTIME), "image": tuple(sorted(EXTENSIONS["image"]))}

_EXTENSION = rf"\.(?:{'|'.join([*FILES['video'], *FILES['image']])})"
_FILE = re.compile(rf"{_EXTENSION}(?:[ \t,;]|$)", re.IGNORECASE)
_PLAIN = re.compile(  # a line whose path shows where it ends: by its quotes, or its extension
    rf'(?P<name>"(?:[^"]|"")+"|.*{_EXTENSION})(?:[ \t]*(?P<comma>,)[ \t]*|[ \t]+|$)(?P<label>.*)', re.IGNORECASE
)
_ODD_SPACE = re.compile(rf"{_EXTENSION}([^\S \t])", re.IGNORECASE)
_ROW = re.compile(r"[^ \t,;]+[ \t]*[ \t,;][ \t]*-?[0-9]+")  # a name and a class's number
_SPACES = re.compile(r"[ \t]+")
_INTEGER = re.compile(r"-?[0-9]+")
_INTEGERS = re.compile(r"-?[0-9]+([ \t]+-?[0-9]+)+")
_SURROGATE = re.compile(r"[\ud800-\udfff]")  # which JSON can write and UTF-8 cannot
_WORD = re.compile(r"[A-Za-z][A-Za-z_-]*")


def read_rows(path: Path, text: str) -> list[Row]:
    """The rows of the list `path`, whose content is `text`.

    UserError: a line that does not show what its path and its label are; the message has its number and the remedy.
    """
    if path.suffix.lower() == ".json":
        return list(_json_rows(path, text))
    lines = [(number, line.strip()) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if long := next((line for line in lines if len(line[1]) > LONGEST), None):
        raise _error(path, long, f"has {len(long[1])} characters: this is no list of files")
    lines = _without_comments(path, lines)
    if lines and (header := _header(path, lines[0])):
        return [_headed_row(path, header, line) for line in lines[1:]]
    _require_no_header(path, lines)
    return [_row(path, line) for line in lines]


def _without_comments(path: Path, lines: Sequence[Line]) -> list[Line]:
    """The lines that are none. UserError: one that may be a comment or a row."""
    rows = [line for line in lines if not line[1].startswith("#")]
    header = _header(path, rows[0]) if rows else None
    for line in lines:
        rest = line[1][1:]
        if line[1][0] != "#" or rest[:1] in ("", " ", "\t", "#", "!"):
            continue
        has_columns = header and header.mark and rest.count(header.mark) == len(header.columns) - 1 > 0
        if has_columns or _FILE.search(rest) or _ROW.fullmatch(rest):
            remedy = "put a space behind '#' if it is a comment, or quotes around its first part"
            raise _error(path, line, f"may be a comment or a row: {remedy}")
    return rows


@dataclass(frozen=True)
class _Header:
    """The columns of a list: the mark between them, "" for spaces, and which of them hold path and label."""

    mark: str
    columns: tuple[str, ...]
    label: str  # "": there is none

    def name(self, values: dict[str, str]) -> str:
        """A row's file. ValueError: a time of Kinetics is no number."""
        if set(self.columns) >= KINETICS:
            start, end = (int(float(values[column])) for column in ("time_start", "time_end"))
            return f"{values['youtube_id']}_{start:06d}_{end:06d}"
        return values[next(column for column in PATHS if column in values)]


def _header(path: Path, line: Line) -> _Header | None:
    """The column names of a first line; None: it has data. UserError: no column is the label's."""
    mark = next((mark for mark in "\t,;" if mark in line[1]), "")
    columns = tuple(name.strip('" ').lower() for name in (line[1].split(mark) if mark else _SPACES.split(line[1])))
    label = next((name for name in LABELS if name in columns), "")
    is_kinetics = set(columns) >= KINETICS
    if not is_kinetics and not any(name in PATHS for name in columns):
        return None
    if not mark and columns[1:] != ((label,) if label else ()):
        return None  # a file named `video`, say: words alone make no header of more than `path label`
    if not is_kinetics and not label and len(columns) > 1:
        raise _error(path, line, "names no column of labels: call it label, or keep the column of paths alone")
    return _Header(mark, columns, label)


def _headed_row(path: Path, header: _Header, line: Line) -> Row:
    fields = _split(path, line, header.mark) if header.mark else _fields(path, line)
    if len(fields) != len(header.columns):
        remedy = "put those that hold commas, semicolons, tabs or spaces into quotes"
        raise _error(path, line, f"has {len(fields)} fields, the header {len(header.columns)}: {remedy}")
    values = dict(zip(header.columns, fields, strict=True))
    try:
        name = header.name(values)
    except (ValueError, OverflowError) as error:
        raise _error(path, line, "has times that are no seconds in time_start and time_end") from error
    return _checked(path, line, name, values.get(header.label, ""))


def _require_no_header(path: Path, lines: Sequence[Line]) -> None:
    """Refuse a first line of plain words above lines that are none: it would be packed as a file."""
    plain = [all(map(_WORD.fullmatch, re.split(r"[ \t,;]+", text))) for _, text in lines[:2]]
    if plain == [True, False]:
        remedy = "call the columns path and label, or remove the line; if it is a file, write its extension"
        raise _error(path, lines[0], f"looks like a header with unknown names: {remedy}")


def _row(path: Path, line: Line) -> Row:
    fields = _fields(path, line)
    if len(fields) > 2:
        raise _error(
            path, line, "has more than a path and one label: put a label that holds commas or semicolons into quotes"
        )
    name, label = (*fields, "")[:2]
    return _checked(path, line, name, label)


def _checked(path: Path, line: Line, name: str, label: str) -> Row:
    if not name.strip("./ ") or "\0" in name:
        raise _error(path, line, "names no file")
    if _FILE.search(label):
        raise _error(path, line, "has a file for a label: the path comes first, in quotes if it holds commas")
    return name, label


def _fields(path: Path, line: Line) -> list[str]:
    """Path, label, and whatever is too much, of a line that no header explains."""
    text = line[1]
    if odd := _ODD_SPACE.search(text):
        raise _error(path, line, f"has U+{ord(odd[1]):04X} behind its path: write a space, a tab or a comma there")
    for mark in ("\t", ";", ",") if path.suffix.lower() == ".csv" else ("\t", ";"):
        if mark in text and (mark != ";" or _semicolon_parts(path, line)):
            return _split(path, line, mark)
    if match := _PLAIN.fullmatch(text):
        return [_unquoted(match["name"]), *_labels(path, line, match["label"], bool(match["comma"]))]
    words = _SPACES.split(text)
    if len(words) > 2 and not _INTEGER.fullmatch(words[-1]):
        raise _error(path, line, "does not show where its path ends: write its extension, or a tab behind it")
    return [text[: text.rindex(words[-1])].rstrip(), words[-1]] if len(words) > 1 else words


def _semicolon_parts(path: Path, line: Line) -> bool:
    """Whether the first semicolon parts path and label, and is no part of one of them."""
    before, _, after = line[1].partition(";")
    if _FILE.search(after):  # in the path
        return False
    before = before.rstrip()
    if file := _FILE.search(before):
        return file.end() == len(before)  # else it is in the label
    if '"' in before:
        return before.startswith('"') and before.endswith('"') and before.count('"') == 2
    if path.suffix.lower() == ".csv" and "," in before:
        return False
    if _SPACES.search(before):
        raise _error(path, line, "does not show where its path ends: write its extension, or put it into quotes")
    return True


def _labels(path: Path, line: Line, text: str, comma: bool) -> list[str]:
    """What stands behind a path: one label, unless it is nothing, or commas or integers say otherwise."""
    if not text:
        return []
    if comma or text.startswith('"'):
        return _split(path, (line[0], text), ",")
    return _SPACES.split(text) if _INTEGERS.fullmatch(text) else [text]


def _split(path: Path, line: Line, mark: str) -> list[str]:
    try:
        fields = next(csv.reader([line[1]], delimiter=mark, skipinitialspace=True, strict=True), [""])
    except csv.Error as error:
        raise _error(path, line, f"has a quote too many or too few: {error}") from error
    return [field.strip() for field in fields]


def _unquoted(name: str) -> str:
    return name[1:-1].replace('""', '"') if name.startswith('"') else name


def _json_rows(path: Path, text: str) -> Iterator[Row]:
    """Something-Something V2 (`id`, `template`) or Diving48 V2 (`vid_name`, `label`): a list of objects."""
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no JSON: {error}") from error
    readers: dict[str, Callable[[dict], tuple[Any, Any]]] = {
        "id": lambda row: (row["id"], row["template"] if "template" in row else row.get("label")),
        "vid_name": lambda row: (row["vid_name"], row.get("label")),
    }
    for number, row in enumerate(rows if isinstance(rows, list) else [rows], start=1):
        name = next((name for name in readers if isinstance(row, dict) and name in row), None)
        if name is None:
            raise UserError(
                f"{path} is not a list of objects with `id` (Something-Something V2) or `vid_name` (Diving48 V2)"
            )
        line = (number, str(row))
        file, label = (_text(path, line, value) for value in readers[name](row))
        yield _checked(path, line, file, _plain(label) if name == "id" else label)


def _text(path: Path, line: Line, value: object) -> str:
    """A name or a label as text. UserError: it is neither that nor a number."""
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int) or _SURROGATE.search(str(value)):
        raise _error(path, line, "has a name or a label that is neither text nor a whole number")
    return str(value)


def _plain(template: str) -> str:
    """Something-Something's class names, which have [brackets] in the lists of labels only in the templates."""
    return template.replace("[", "").replace("]", "")


def _error(path: Path, line: Line, problem: str) -> UserError:
    number, text = line
    unit = "object" if path.suffix.lower() == ".json" else "line"
    return UserError(f"{path}, {unit} {number}: {text[:SHOWN]!r} {problem}")
