"""Draw media where there are none: MP4 clips and JPEG images of scenes, and the demo's shards made of them."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bevt_ds.config.recipes import is_drawn
from bevt_ds.config.schema import UnlabelledConfig
from bevt_ds.data.decoding import subprocess_env
from bevt_ds.errors import UserError
from bevt_ds.runtime.lock import NO_LOCKS
from bevt_ds.shards.pack import pack

DEMO_SPLITS = {"train": (320, 1024), "eval": (48, 96)}  # clips, images
KINDS = ("video", "image")


def draw(folder: Path, clips: int, images: int, seed: int = 0, jobs: int | None = None) -> None:
    """Draw `clips` MP4 files and `images` JPEG files into a new folder, with one process a core.

    The same seed draws the same scenes. UserError: the folder exists and is not empty.
    """
    _require_absent(folder)
    jobs = jobs or len(os.sched_getaffinity(0))
    with _appearing(folder) as unfinished:
        commands = [
            subprocess_env.command(
                "bevt_ds.shards.synthetic.draw_worker", str(unfinished), *map(str, (clips, images, seed, part, jobs))
            )
            for part in range(jobs)
        ]
        parts = [subprocess.Popen(command, env=subprocess_env.environment()) for command in commands]
        try:
            codes = [part.wait() for part in parts]
        finally:
            for part in parts:
                part.kill()
        if any(codes):
            raise RuntimeError(f"drawing failed, exit codes {codes}")


def draw_what_is_read(config: UnlabelledConfig) -> None:
    """The demo's shards where a run reads them and they are absent. UserError: as `ensure_demo_shards`."""
    if is_drawn(config):
        ensure_demo_shards(Path(config.data.images or config.data.videos).parent)


def ensure_demo_shards(folder: Path) -> None:
    """Draw and pack the demo's training and held-out shards into `folder`, unless it is there.

    The folder appears whole or not at all; of the programs that want it at once, one draws and the others wait.
    UserError: it exists and holds something else.
    """
    if _has_demo_shards(folder):
        return
    with _alone(folder):
        if _has_demo_shards(folder):
            return
        _require_absent(folder)
        try:
            with _appearing(folder) as unfinished:
                _draw_demo(unfinished)
        except OSError as error:  # the name was taken meanwhile, where locks are missing
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or not _has_demo_shards(folder):
                raise


def _has_demo_shards(folder: Path) -> bool:
    return all((folder / f"{split}-{kind}-000000.tar").exists() for split in DEMO_SPLITS for kind in KINDS)


def _draw_demo(folder: Path) -> None:
    for seed, (split, (clips, images)) in enumerate(DEMO_SPLITS.items()):
        media = folder / split
        draw(media, clips, images, seed)
        for kind in KINDS:
            pack(media, folder, kind, split=f"{split}-{kind}")
        shutil.rmtree(media)


def _require_absent(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not an empty folder: remove it or choose another")


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a time: the ranks of a run all come here, and one of them is to draw.

    Where the file system has no locks they all draw, and the first to rename wins.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = folder.parent / f".{folder.name}.lock"
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


@contextmanager
def _appearing(folder: Path) -> Iterator[Path]:
    """A hidden folder next to `folder` that takes its name once the block has ended well."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        yield unfinished
        unfinished.chmod(0o755)
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
