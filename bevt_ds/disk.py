"""Writing what a run leaves behind: a disk that is full, read-only or gone is one line, with exit code 6."""

from __future__ import annotations

import errno
import io
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from bevt_ds import exit_codes
from bevt_ds.errors import UserError

UNITS = ("bytes", "kB", "MB", "GB", "TB")
REFUSED = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # what a disk says, and never a bug


class DiskError(UserError):
    """Something of a run cannot be written. The message names the path, what was needed and what is kept.

    kept: what the user still has, as a sentence, which joins the message; empty: it is not known here.
    """

    exit_code = exit_codes.DISK

    def __init__(self, message: str, kept: str = "") -> None:
        super().__init__(f"{message} {kept}".rstrip())
        self.kept = kept


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
        raise DiskError(cannot_write(path, error), kept) from error


@contextmanager
def told(folder: Path, kept: Callable[[], str]) -> Iterator[None]:
    """Have every failure to write inside the block say what is kept, also where nothing foresaw it.

    Args:
        folder: named where an error names no file.
        kept: what the user still has then, as a sentence.

    Raises:
        DiskError: in place of one that does not say it, and of an OSError of a disk that is full or read-only.
    """
    try:
        yield
    except DiskError as error:
        raise error if error.kept else DiskError(str(error), kept()) from error
    except OSError as error:
        if refused := refusal(error, folder, kept()):
            raise refused from error
        raise


def refusal(error: OSError, folder: Path, kept: str = "") -> DiskError | None:
    """An error of a disk that is full or read-only as one line; None: it is another error."""
    path = Path(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes) else folder
    return DiskError(cannot_write(path, error), kept) if error.errno in REFUSED else None


def cannot_write(path: Path, error: OSError, needed: int = 0) -> str:
    """What to say of a path that cannot be written: the reason, the bytes that were needed if known, the free space."""
    if isinstance(error, shutil.Error) and isinstance(error.args[0], list):  # of copytree: source, target, reason
        return f"cannot write {path}: {error.args[0][0][-1]}; {space(path)}."
    named = f" ({error.filename})" if error.filename and Path(str(error.filename)) != path else ""
    size = f"it needs {in_words(needed)}, " if needed else ""
    return f"cannot write {path}{named}: {error.strerror or error}; {size}{space(path, error.errno in REFUSED)}."


def space(path: Path, is_full: bool = False) -> str:
    """How much is free where a path lies or would lie, in words; is_full: its folder may be one that cannot be made."""
    there = next((place for place in (path, *path.absolute().parents) if place.exists()), Path("/"))
    if not is_full and there not in (path, path.absolute().parent):
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
