"""One run at a time in a folder: a lock that the operating system drops when its process ends, however it ends."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
import warnings
from pathlib import Path

LOCK = ".lock"
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}  # Lustre mounted without flock, some FUSE
_held: dict[Path, int] = {}  # folder -> file descriptor, open for the life of this process


def hold(folder: Path) -> str | None:
    """Lock an existing folder for this process. None: it holds the lock now; else who does, as `host, process, since`.

    Locking again what this process holds succeeds. `flock` works on local disks and on NFS of Linux 2.6.12 or later;
    a file system without it is named in a warning, and nothing is locked there.

    Raises:
        OSError: the folder cannot be written.
    """
    folder = folder.resolve()
    if folder in _held:
        return None
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.read(descriptor, 4096)
        os.close(descriptor)
        return _described(owner)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        warnings.warn(f"{folder} has no file locks ({error.strerror}): start no second run in it", stacklevel=2)
        os.close(descriptor)
        return None
    facts = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    os.ftruncate(descriptor, 0)
    os.write(descriptor, json.dumps(facts).encode())
    _held[folder] = descriptor
    return None


def owner_of(folder: Path) -> str | None:
    """Who holds the lock of a folder, as `hold` says it, without taking it. None: no one, or this process."""
    try:
        descriptor = os.open(folder / LOCK, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None  # no run has been there
    try:
        if folder.resolve() not in _held:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _described(os.read(descriptor, 4096))
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    finally:
        os.close(descriptor)
    return None


def _described(owner: bytes) -> str:
    """What the lock's file says of its owner; a file that is being written says little."""
    try:
        facts = json.loads(owner)
    except ValueError:
        return "another process"
    return f"process {facts['pid']} on {facts['host']}, since {facts['since']}"
