"""Files below a folder, or behind a glob, through symbolic links. What cannot be followed is named, not left out."""

from __future__ import annotations

import fnmatch
import glob
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

Found = tuple[Path, str]  # a file, and why it cannot be had, "" where it can
Identity = tuple[int, int]  # of a folder: device and inode


def files_below(folder: Path) -> Iterator[Found]:
    """Every file in a folder and its subfolders, hidden ones too."""
    for place, names, faults in _folders(folder):
        yield from ((place / name, "") for name in names)
        yield from faults


def files_matching(pattern: str) -> Iterator[Found]:
    """The files that a glob matches; `**` is any number of folders. A name that exists wins over its meaning."""
    first, *parts = Path(pattern).parts or ("",)
    yield from _matching(Path(first), parts) if first == "/" else _matching(Path(), [first, *parts])


def _matching(base: Path, parts: Sequence[str]) -> Iterator[Found]:
    """Of the files below `base` those whose path matches `parts`, a pattern for each of its parts."""
    if not parts:
        if os.path.islink(base) and (fault := _link_fault(base, ())):
            yield base, fault
        elif os.path.exists(base) and not os.path.isdir(base):
            yield base, ""
        return
    first, *rest = parts
    if first == "**":
        for folder, _, faults in _folders(base, hidden=False):
            yield from faults
            yield from _matching(folder, rest or ["*"])
    elif not glob.has_magic(first) or os.path.lexists(base / first):
        yield from _matching(base / first, rest)
    elif os.path.isdir(base):
        for entry, fault in _entries(base, (), hidden=first.startswith(".")):
            if fault and entry is None:
                yield base, fault
            elif fnmatch.fnmatchcase(entry.name, first):
                yield from [(base / entry.name, fault)] if fault else _matching(base / entry.name, rest)


def _folders(
    folder: Path, above: Sequence[Identity] = (), hidden: bool = True
) -> Iterator[tuple[Path, list[str], list[Found]]]:
    """A folder and those below: each, the names of its files, and what in it cannot be followed.

    above: the folders that it lies in, by which a link that leads back to one of them is known.
    """
    names, below, faults = [], [], []
    with suppress(OSError):
        facts = os.stat(folder)
        above = (*above, (facts.st_dev, facts.st_ino))
    for entry, fault in _entries(folder, above, hidden):
        if fault:
            faults.append((folder / entry.name if entry else folder, fault))
        else:
            (below if entry.is_dir() else names).append(entry.name)
    yield folder, names, faults
    for name in below:
        yield from _folders(folder / name, above, hidden)


def _entries(folder: Path, above: Sequence[Identity], hidden: bool) -> Iterator[tuple[os.DirEntry | None, str]]:
    """What is in a folder, by name, each with why it cannot be followed; None with the reason for the folder itself."""
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        yield None, f"cannot list the folder: {error.strerror}"
        return
    for entry in entries:
        if hidden or not entry.name.startswith("."):
            yield entry, _link_fault(folder / entry.name, above) if entry.is_symlink() else ""


def _link_fault(path: Path, above: Sequence[Identity]) -> str:
    """Why a symbolic link cannot be followed, or "" if it can. above: folders that it must not lead to."""
    to = os.readlink(path)
    try:
        facts = path.stat()
    except OSError as error:
        return f"it is a link to {to!r}, which cannot be opened: {error.strerror}"
    if stat.S_ISDIR(facts.st_mode) and (facts.st_dev, facts.st_ino) in above:
        return f"it is a link to {to!r}, a folder that it lies in itself"
    return ""
