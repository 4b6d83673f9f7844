"""DALI's own index of a WebDataset tar (`.idx`, version 1.2), for those who read the shards with its reader."""

from __future__ import annotations

import tarfile
from pathlib import Path

from bevt_ds.data.reading.deadline import heartbeat
from bevt_ds.data.reading.index import write_atomic
from bevt_ds.errors import UserError

VERSION = "v1.2"


def write_dali_index(path: str) -> Path:
    """Write `NAME.idx` next to a local tar: a line a sample, `extension offset size name` for each component.

    To DALI's reader a sample is a run of neighbours whose names are equal up to the first dot of the last part.
    UserError: the tar has been cut, or holds a name that the format cannot express.
    """
    samples = _samples(path)
    place = Path(path).with_suffix(".idx")
    lines = [f"{VERSION} {len(samples)}", *(" ".join(components) for _, components in samples)]
    write_atomic(place, ("\n".join(lines) + "\n").encode())
    return place


def _samples(path: str) -> list[tuple[str, list[str]]]:
    """The key and the components of each sample."""
    samples: list[tuple[str, list[str]]] = []
    try:
        with tarfile.open(path, "r:") as archive:
            for info in archive:
                heartbeat(f"shard {path} at byte {info.offset_data}")
                _note(samples, path, info)
    except tarfile.TarError as error:
        raise UserError(f"{path} is not a whole tar file ({error}): write or copy it again") from error
    return samples


def _note(samples: list[tuple[str, list[str]]], path: str, info: tarfile.TarInfo) -> None:
    folder, slash, name = info.name.rpartition("/")
    stem, dot, extension = name.partition(".")
    if not (info.isreg() and dot and stem):
        return
    if any(char.isspace() or "\ud800" <= char <= "\udfff" for char in info.name):  # the latter: not in UTF-8
        raise UserError(f"{path} holds {info.name!r}: names in DALI's index are UTF-8 without spaces, so rename it")
    key = folder + slash + stem
    if not samples or samples[-1][0] != key:
        samples.append((key, []))
    samples[-1][1].append(f"{extension} {info.offset_data} {info.size} {info.name}")
