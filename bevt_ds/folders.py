"""Where a run's folder keeps its checkpoints and weights: what a path of weights may be, the same for everyone."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from bevt_ds.errors import UserError

LOG = "log.jsonl"
CHECKPOINTS = "checkpoints"
TENSORS = "model.safetensors"  # in a folder of weights
WEIGHTS = "weights"  # of a run, and of each of its checkpoints
MANIFEST = "manifest.json"  # of a checkpoint, written last
CHECKPOINT_NAME = re.compile(r"step-(\d{8})")


def checkpoints(root: Path) -> list[Path]:
    """Committed checkpoints, the newest first. Order is by step: clocks are not trusted."""
    return [folder for folder in checkpoint_folders(root) if (folder / MANIFEST).is_file()]


def checkpoint_folders(root: Path) -> list[Path]:
    """The same with those that have lost their manifest, which is written last."""
    found = [path for path in root.glob("step-*") if CHECKPOINT_NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: path.name, reverse=True)


def weights_of(path: str | Path, key: str = "") -> Path:
    """The folder or file of weights that `path` means.

    Args:
        path: a run's folder (its weights/, or those of its newest checkpoint), a checkpoint's folder, a folder of
            weights, or a file.
        key: of the configuration, where the path comes from one: messages name it.

    Raises:
        UserError: no such path, or a run without a checkpoint.
    """
    given, named = Path(path), f"{key}={path}" if key else str(path)
    if not given.exists():
        raise UserError(f"{named}: no such file or folder.")
    if (given / WEIGHTS).is_dir():
        return given / WEIGHTS
    if (given / LOG).is_file():
        commits = checkpoints(given / CHECKPOINTS)
        if not commits:
            raise UserError(f"{named}: this run has not written a checkpoint yet: wait for its first, or name another.")
        return commits[0] / WEIGHTS
    return given


def weights_hash(path: Path) -> str:
    """SHA-256 of a file of weights, or of a folder's model.safetensors; of several files, of all their hashes."""
    one = path / TENSORS if path.is_dir() else path
    if one.is_file():
        return file_hash(one)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return hashlib.sha256(
        "".join(f"{file_hash(file)}  {file.relative_to(path)}\n" for file in files).encode()
    ).hexdigest()


def file_hash(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
