"""Committing a checkpoint: all ranks write aside and hash, then one rename makes it exist.

`save` is the protocol, the same in the foreground and in the background. If one rank cannot write, all give up
together: what was written aside is removed, and the commits before stay as they are.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TypeVar

from bevt_ds.disk import DiskError, cannot_write, free_bytes, in_words
from bevt_ds.errors import UserError
from bevt_ds.folders import MANIFEST, checkpoints
from bevt_ds.runtime.checkpoint import Facts, as_manifest, find_damage, name_of
from bevt_ds.runtime.distributed import Ranks
from bevt_ds.runtime.manifest import entry_of, read_manifest, sealed

ASIDE = ".tmp-"
RESERVE = 4 << 20  # bytes a commit takes beyond its tensors: headers, manifest, blocks of the file system
Result = TypeVar("Result")


def save(
    root: Path,
    facts: Facts,
    stages: Sequence[Callable[[Path], None]],
    ranks: Ranks,
    keep: int,
    needed: int = 0,
    kept: Callable[[Path], str] | None = None,
) -> Path:
    """Commit one checkpoint. Collective.

    Args:
        root: the folder of all checkpoints; the folder that it lies in must be there.
        stages: each writes this rank's files under the folder it is given; it begins when all ranks have ended the one
            before. No collectives in there.
        keep: older checkpoints beyond this number are removed, after the new one is in place; except the one with the
            lowest loss, so that a run which is slowly going wrong can be begun again from before it did.
        needed: bytes that this rank will write.
        kept: what the user still has where it cannot be written, as a sentence, of the folder `root`; None: the
            checkpoints before.

    Raises:
        DiskError: on all ranks, where one of them cannot write.
    """
    final = root / name_of(facts.step)
    aside = root / f"{ASIDE}{final.name}"
    total, together = sum(ranks.gather(needed)), partial(_together, ranks, final, kept or what_is_kept)
    try:
        together(lambda: _begin(aside, total) if ranks.is_main else None)
        for stage in stages:
            together(lambda stage=stage: stage(aside))
        parts = together(lambda: _flush(aside, ranks))
        files = {name: entry for part in parts for name, entry in part.items()}
        text = sealed(as_manifest(facts), files)
        together(lambda: _publish(aside, final, text) if ranks.is_main else None)
    except DiskError:
        if ranks.is_main:
            shutil.rmtree(aside, ignore_errors=True)
        raise
    if ranks.broadcast(ranks.is_main and bool(_superseded(root, facts.step, keep))):
        _require_as_written(final, ranks)
    together(lambda: _prune(root, facts.step, keep) if ranks.is_main else None)
    return final


def _together(ranks: Ranks, final: Path, kept: Callable[[Path], str], work: Callable[[], Result]) -> list[Result]:
    """What `work` returns on every rank; if it fails to write on one, all raise what that one says. Collective."""
    result, problem = None, None
    try:
        result = work()
    except OSError as error:
        problem = cannot_write(final, error)
    except UserError as error:  # of what writes weights
        problem = str(error)
    answers = ranks.gather((result, problem))
    for _, other in answers:
        if other:
            raise DiskError(other, kept(final.parent))
    return [answer for answer, _ in answers]


def what_is_kept(root: Path) -> str:
    """Which checkpoints there still are, and how to go on, in words."""
    commits = [folder.name for folder in checkpoints(root)]
    if not commits:
        return "No checkpoint is there yet: make room, and start again."
    return f"Kept: {', '.join(commits)}. Make room, then continue with resume=auto."


def _begin(aside: Path, needed: int) -> None:
    """Sweep what a kill left, see that there is room, and make the folder. On rank 0."""
    root = aside.parent
    root.mkdir(exist_ok=True)
    for torn in root.glob(f"{ASIDE}*"):
        shutil.rmtree(torn)
    free = free_bytes(root)
    if needed and free < needed + RESERVE:
        reason = f"it needs {in_words(needed + RESERVE)}"
        raise OSError(errno.ENOSPC, reason)
    aside.mkdir()


def _flush(aside: Path, ranks: Ranks) -> dict[str, dict[str, object]]:
    """Bring this rank's share of the files to the disk and hash them: name -> entry of the manifest."""
    paths = sorted(path for path in aside.rglob("*") if path.is_file())
    for path in paths[ranks.rank :: ranks.world]:
        sync(path)
    return {path.relative_to(aside).as_posix(): entry_of(path) for path in paths[ranks.rank :: ranks.world]}


def _publish(aside: Path, final: Path, manifest: str) -> None:
    """Write the manifest and give the folder its name. On rank 0."""
    for folder in sorted(path for path in aside.rglob("*") if path.is_dir()):
        sync(folder)
    (aside / MANIFEST).write_text(manifest, encoding="utf-8")
    sync(aside / MANIFEST)
    sync(aside)
    if final.exists():  # of the same step, damaged or from before a change of settings
        os.replace(final, final.with_name(f"{ASIDE}before-{final.name}"))
    os.replace(aside, final)
    sync(final.parent)


def _require_as_written(final: Path, ranks: Ranks) -> None:
    """Read a checkpoint again from the disk, before others are removed for it. Collective.

    Raises:
        DiskError: on all ranks, where it is not what was written.
    """
    for path in sorted(path for path in final.rglob("*") if path.is_file()):
        forget(path)
    if damage := find_damage(final, ranks):
        others = ", ".join(folder.name for folder in checkpoints(final.parent) if folder != final)
        kept = f"Kept: {others}; resume=auto continues there."
        raise DiskError(f"{final} is not as it was written: {damage}.", kept)


def _superseded(root: Path, step: int, keep: int) -> list[Path]:
    """Old checkpoints. Later ones than `step` were passed over on resume, so they do not count. On rank 0."""
    commits = [folder for folder in checkpoints(root) if folder.name <= name_of(step)]
    best = lowest_loss(commits)
    return [old for old in commits[keep:] if old != best] + list(root.glob(f"{ASIDE}before-*"))


def _prune(root: Path, step: int, keep: int) -> None:
    """Remove old checkpoints. On rank 0."""
    for old in _superseded(root, step, keep):
        remove(old)


def lowest_loss(commits: Sequence[Path]) -> Path | None:
    """The checkpoint whose last step had the lowest loss; None if none says. A damaged one says nothing."""
    losses = {}
    for commit in commits:
        with suppress(UserError):
            losses[commit] = read_manifest(commit).get("loss")
    known = [commit for commit, loss in losses.items() if loss is not None]
    return min(known, key=losses.__getitem__, default=None)


def remove(commit: Path) -> None:
    """Remove a checkpoint; of a link to one, the link."""
    if commit.is_symlink():
        commit.unlink()
    else:
        shutil.rmtree(commit)


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def forget(path: Path) -> None:
    """Have the next read of a file come from the disk, not from this machine's memory, as far as that can be had."""
    with suppress(OSError):  # one that cannot be opened is damaged, which is found next
        handle = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)
