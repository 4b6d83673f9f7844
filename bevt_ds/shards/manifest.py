"""Compare shards with what `pack` wrote down of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

from bevt_ds.config.samples import DataConfig
from bevt_ds.data.reading.deadline import Deadline, DeadlineExecutor, heartbeat
from bevt_ds.data.reading.remote import is_remote
from bevt_ds.progress import progress_bar

_CHUNK = 1 << 20

Fault = tuple[str, str]  # a file and what is wrong with it


@dataclass(frozen=True)
class _Entry:
    """A shard that a manifest names."""

    manifest: Path
    name: str
    sha256: str

    @property
    def path(self) -> Path:
        return self.manifest.parent / self.name


def compare(
    paths: Sequence[str],
    jobs: int,
    progress: bool = False,
    whole: bool = False,
    seconds: float = DataConfig.read_seconds,
) -> list[Fault]:
    """Faults of local shards by the manifests next to them: one cannot be read, or a shard has other bytes.

    whole: a shard is missing too, of a manifest that names any of `paths`.
    StorageStalled: a disk or file server does not answer within `seconds`.
    """
    local = {Path(path) for path in paths if not is_remote(path)}
    faults: list[Fault] = []
    entries: list[_Entry] = []
    for manifest in sorted(chain.from_iterable(folder.glob("*-manifest.json") for folder in {p.parent for p in local})):
        try:
            named = _read(manifest)
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            faults.append((str(manifest), f"cannot read the manifest ({error}): pack again, or remove it"))
            continue
        mine = [entry for entry in named if entry.path in local]
        missing = [entry for entry in named if whole and mine and not entry.path.exists()]
        faults += [(str(entry.path), f"it is missing: {manifest.name} names it") for entry in missing]
        entries += mine
    return faults + list(_other_bytes(entries, jobs, progress, seconds))


def _read(manifest: Path) -> list[_Entry]:
    """ValueError and its like: this is not what `pack` writes."""
    shards = json.loads(manifest.read_text(encoding="utf-8"))["shards"]
    return [_Entry(manifest, str(shard["name"]), str(shard["sha256"])) for shard in shards]


def _other_bytes(entries: Sequence[_Entry], jobs: int, progress: bool, seconds: float) -> Iterator[Fault]:
    """Hash the shards in parallel: from disks that are busy it is waiting, most of all."""
    with closing(DeadlineExecutor(jobs)) as executor:
        hashed = partial(executor.call, _sha256, deadline=Deadline(seconds))
        calls = [executor.submit(partial(hashed, entry.path, place=f"shard {entry.path}")) for entry in entries]
        bar = progress_bar(calls, total=len(entries), disable=not progress or not entries, unit="shard", desc="hash")
        for entry, call in zip(entries, bar, strict=True):
            try:
                if call.result() != entry.sha256:
                    yield str(entry.path), f"its SHA-256 is not the one in {entry.manifest.name}"
            except OSError as error:
                yield str(entry.path), f"cannot read the shard: {error.strerror}"


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            heartbeat(f"shard {path} at byte {file.tell()}")
    return digest.hexdigest()
