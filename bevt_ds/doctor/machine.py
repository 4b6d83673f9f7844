"""Shared memory, open files, disk and cache: what a container or a cluster's defaults often give too little of."""

from __future__ import annotations

import os
import resource
import shutil
from pathlib import Path

from bevt_ds.doctor.lines import GIB, Line

SHARED = Path("/dev/shm")
LEAST_SHARED = 1 * GIB  # NCCL and gloo pass messages between the ranks of a node through it; Docker gives 64 MB
FILES_A_RANK = 512  # decode workers, shards, libraries; and a socket to each other rank in each of two groups
LEAST_DISK = 20 * GIB  # three checkpoints of Swin-B are 6 GB, of Swin-L 12 GB
LEAST_CACHE = 10 * GIB


def check_shared_memory(folder: Path = SHARED, least: int = LEAST_SHARED) -> Line:
    """The size of /dev/shm."""
    if not folder.is_dir():
        return Line("shared memory", "mend", f"no {folder}", "mount a tmpfs there")
    size = shutil.disk_usage(folder).total
    if size >= least:
        return Line("shared memory", "ok", f"{_gib(size)} at {folder}")
    remedy = "docker run --ipc=host or --shm-size=8g; in Kubernetes an emptyDir of medium Memory at /dev/shm"
    return Line("shared memory", "mend", f"{_gib(size)} at {folder}, which several ranks on a node exceed", remedy)


def check_open_files(world: int, limit: int | None = None) -> Line:
    """Files that a process may open, against what a rank of `world` needs."""
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0] if limit is None else limit
    needed = FILES_A_RANK + 2 * world
    if soft in (-1, resource.RLIM_INFINITY) or soft >= needed:
        return Line("open files", "ok", f"{'no limit' if soft < 0 else soft} a process; a rank needs up to {needed}")
    return Line("open files", "mend", f"{soft} a process; a rank needs up to {needed}", "ulimit -n 65536")


def check_space(name: str, folder: Path, least: int, setting: str) -> Line:
    """Whether a folder can be made and written, and has `least` bytes. setting: where it is chosen."""
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        return Line(name, "mend", f"{there} cannot be written", f"choose another folder with {setting}")
    free = shutil.disk_usage(there).free
    text = f"{_gib(free)} free for {folder}"
    if free >= least:
        return Line(name, "ok", text)
    return Line(name, "mend", f"{text}, less than {_gib(least)}", f"free some, or choose another folder with {setting}")


def _gib(size: int) -> str:
    return f"{size / GIB:,.1f} GiB"
