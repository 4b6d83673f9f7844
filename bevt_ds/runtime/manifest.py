"""manifest.json of a checkpoint: the size and SHA-256 of every file, a digest of itself, and what does not fit them.

What is read here may have been damaged, or made by someone else: every value is checked before it is used.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from bevt_ds.errors import UserError
from bevt_ds.folders import MANIFEST, file_hash

SCHEMA = 2
LARGEST = 64 << 20  # bytes of a manifest that is read
KEYS: dict[str, tuple[type, ...]] = {  # what every manifest has, and of which type
    "schema": (int,),
    "step": (int,),
    "world": (int,),
    "stage": (int,),
    "data": (str,),
    "skips": (dict,),
    "config": (dict,),
    "files": (dict,),
}
LATER: dict[str, tuple[type, ...]] = {"changes": (list,), "loss": (int, float, type(None))}  # what some have too


def read_manifest(folder: Path) -> dict[str, Any]:
    """What a checkpoint says of itself, every key with a value of its type.

    Raises:
        UserError: it is missing, damaged, forged, or of a newer version of this project.
    """
    path = folder / MANIFEST
    try:
        if path.is_symlink() or not path.is_file():
            raise UserError(f"{folder} is not a checkpoint: it has no {MANIFEST}.")
        if path.stat().st_size > LARGEST:
            raise UserError(f"{path} is no manifest: it has more than {LARGEST:,} bytes.")
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise UserError(f"{path} is not JSON.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}).") from None
    if not isinstance(manifest, dict) or manifest.get("digest") != self_digest(manifest):
        raise UserError(f"{path} has changed since it was written.")
    if problem := next(_problems(manifest), None):
        raise UserError(f"{path} is no manifest of this project: {problem}.")
    if manifest["schema"] > SCHEMA:
        raise UserError(
            f"{folder} was written by a newer bevt_ds (schema {manifest['schema']}, this one reads {SCHEMA})."
        )
    return manifest


def _problems(manifest: Mapping[str, Any]) -> Iterator[str]:
    """What is not as `sealed` writes it."""
    for key, types in KEYS.items():
        if type(manifest.get(key)) not in types:
            yield f"{key!r} must be {types[0].__name__}"
            return
    for key, types in LATER.items():
        if key in manifest and type(manifest[key]) not in types:
            yield f"{key!r} must be {types[0].__name__}"
    for name, entry in manifest["files"].items():
        if not is_inside(name):
            yield f"the file name {name!r} leads out of the checkpoint"
        elif not isinstance(entry, dict) or (type(entry.get("size")), type(entry.get("sha256"))) != (int, str):
            yield f"the file {name!r} has no size and sha256"


def is_inside(name: str) -> bool:
    """Whether a file's name stays in its checkpoint, written in the one way that we write it."""
    parts = PurePosixPath(name).parts
    plain = name == "/".join(parts) and not {"..", "/", "."} & set(parts)
    return bool(parts) and plain and "\\" not in name and "\0" not in name


def sealed(facts: Mapping[str, Any], files: Mapping[str, Any]) -> str:
    """The text of a manifest."""
    manifest = {**facts, "files": dict(sorted(files.items()))}
    return json.dumps(manifest | {"digest": self_digest(manifest)}, indent=1)


def self_digest(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of everything else in a manifest."""
    body = {name: value for name, value in manifest.items() if name != "digest"}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def file_problems(folder: Path, files: Mapping[str, Any]) -> list[str]:
    """Files that are missing, added, links, or of another size than the manifest says; contents are not read."""
    found, problems = {}, []
    for place, folders, names in os.walk(folder):
        for name in [*folders, *names]:
            path = Path(place, name)
            relative = path.relative_to(folder).as_posix()
            if path.is_symlink():
                problems.append(f"{relative} is a link")
            elif not path.is_dir() and relative != MANIFEST:
                found[relative] = path
    links = {problem.removesuffix(" is a link") for problem in problems}
    problems += [f"{name} was added" for name in found if name not in files]
    for name, entry in files.items():
        if name in links or any(parent.as_posix() in links for parent in PurePosixPath(name).parents):
            continue
        if name not in found:
            problems.append(f"{name} is missing")
        elif not found[name].is_file():
            problems.append(f"{name} is no file")
        elif (size := found[name].stat().st_size) != entry["size"]:
            problems.append(f"{name} has {size:,} bytes, not {entry['size']:,}")
    return sorted(problems)


def content_problems(folder: Path, files: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """Of these files, those whose contents are not as the manifest says."""
    return [f"{n} has changed since it was written" for n in names if file_hash(folder / n) != files[n]["sha256"]]


def entry_of(path: Path) -> dict[str, Any]:
    """What a manifest says of a file."""
    return {"size": path.stat().st_size, "sha256": file_hash(path)}
