"""Writing what a run leaves behind: a disk that is full, read-only or gone is one line, with exit code 6."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bevt_ds import exit_codes
from bevt_ds.errors import UserError

UNITS = ("bytes", "kB", "MB", "GB", "TB")


class DiskError(UserError):
    """Something of a run cannot be written. The message names the path, what was needed and what is kept."""

    exit_code = exit_codes.DISK


@contextmanager
def writing(path: Path, kept: str = "") -> Iterator[None]:
    """Turn a failure of the file system inside the block into one line.

    Args:
        path: what is written.
        kept: what the user still has, as a sentence.

    Raises:
        DiskError: it cannot be written.
    """
    try:
        yield
    except OSError as error:
        raise DiskError(cannot_write(path, error, kept)) from error


def cannot_write(path: Path, error: OSError, kept: str = "") -> str:
    """What to say of a path that cannot be written: the reason, the free space, what is kept."""
    named = f" ({error.filename})" if error.filename and Path(str(error.filename)) != path else ""
    parts = [f"cannot write {path}{named}: {error.strerror or error}; {space(path)}.", kept]
    return " ".join(filter(None, parts))


def space(path: Path) -> str:
    """How much is free where a path lies or would lie, in words."""
    there = next((place for place in (path, *path.absolute().parents) if place.exists()), Path("/"))
    if there != path and there != path.absolute().parent:
        return f"{path.absolute().parent} does not exist"
    return f"{in_words(free_bytes(there))} free there"


def write_all(file: io.RawIOBase, data: bytes) -> None:
    """Write all of it into an unbuffered file; a disk that fills up in the middle takes a part, and then refuses."""
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) or 0 :]


def free_bytes(folder: Path) -> int:
    """Bytes that this user may still write in a folder's file system. Quotas are not seen."""
    facts = os.statvfs(folder)
    return facts.f_bavail * facts.f_frsize


def in_words(size: float) -> str:
    """A number of bytes for people: 1.5 GB."""
    for unit in UNITS:
        if size < 1000 or unit == UNITS[-1]:
            return f"{size:.0f} {unit}" if unit == UNITS[0] else f"{size:.1f} {unit}"
        size /= 1000
    raise AssertionError


def make_folder(path: Path) -> None:
    """Create a folder that can be written to.

    Raises:
        UserError: it cannot.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / ".write-test"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise UserError(f"cannot write to {path} ({error.strerror}): choose another output_dir.") from None
