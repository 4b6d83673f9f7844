"""Media files -> WebDataset shards: `{split}-{number:06d}.tar` with `<key>.mp4|jpg|...` and `<key>.json`."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm
from webdataset import TarWriter

from bevt_ds.data.images import check_image
from bevt_ds.data.index import EXTENSIONS, BadSample, write_atomic
from bevt_ds.data.video import probe
from bevt_ds.errors import UserError

SHARD_BYTES = 1 << 30
SHARD_SAMPLES = 10_000
MAX_PIXELS = 64_000_000


@dataclass(frozen=True)
class Packed:
    """What `pack` wrote."""

    shards: tuple[Path, ...]
    samples: int
    rejected: int


def pack(
    source: Path,
    out: Path,
    kind: str,
    split: str = "train",
    shard_bytes: int = SHARD_BYTES,
    shard_samples: int = SHARD_SAMPLES,
    progress: bool = False,
) -> Packed:
    """Pack the media of `kind` ("video" or "image") under a folder, in the order of their paths, bytes as they are.

    A shard is closed before it would pass `shard_bytes` or `shard_samples`. The same input gives the same tars. What
    cannot be read is listed in `{split}-rejected.jsonl` with the reason.
    UserError: no such media under `source`, or shards of this split are already in `out`.
    """
    files = _media(source, kind)
    _require_new(out, split)
    out.mkdir(parents=True, exist_ok=True)
    rejected: list[dict[str, str]] = []
    samples = _samples(source, tqdm(files, disable=not progress, unit="file"), kind, rejected)
    counts = [
        _write_shard(out / f"{split}-{number:06d}.tar", shard)
        for number, shard in enumerate(_shards(samples, shard_bytes, shard_samples))
    ]
    if rejected:
        lines = "".join(json.dumps(event) + "\n" for event in rejected)
        write_atomic(out / f"{split}-rejected.jsonl", lines.encode())
    if not counts:
        raise UserError(f"none of the {len(files)} {kind} files under {source} can be read: see {out}")
    shards = tuple(out / f"{split}-{number:06d}.tar" for number in range(len(counts)))
    return Packed(shards, sum(counts), len(rejected))


def _media(source: Path, kind: str) -> list[Path]:
    if not source.is_dir():
        raise UserError(f"{source} is not a folder")
    files = sorted(path for path in source.rglob("*") if path.suffix[1:].lower() in EXTENSIONS[kind] and path.is_file())
    if not files:
        raise UserError(f"no {kind} file under {source} (looked for {', '.join(sorted(EXTENSIONS[kind]))})")
    return files


def _require_new(out: Path, split: str) -> None:
    present = sorted(out.glob(f"{split}-[0-9]*.tar"))
    if present:
        raise UserError(f"{present[0]} exists: remove the shards of split {split!r} or choose another folder")


def _samples(source: Path, files: Iterator[Path], kind: str, rejected: list[dict]) -> Iterator[dict]:
    """webdataset samples; unreadable files are added to `rejected` instead."""
    for path in files:
        name = path.relative_to(source)
        data = path.read_bytes()
        try:
            facts = _describe(data, kind)
        except BadSample as bad:
            rejected.append({"path": str(name), "reason": str(bad)})
            continue
        key = "_".join(name.with_suffix("").parts).replace(".", "_")
        yield {
            "__key__": key,
            path.suffix[1:].lower(): data,
            "json": json.dumps({"source": str(name), **facts}, sort_keys=True).encode(),
        }


def _describe(data: bytes, kind: str) -> dict:
    if kind == "video":
        return asdict(probe(data, MAX_PIXELS))
    width, height = check_image(data, MAX_PIXELS)
    return {"width": width, "height": height}


def _shards(samples: Iterator[dict], max_bytes: int, max_samples: int) -> Iterator[list[dict]]:
    shard: list[dict] = []
    size = 0
    for sample in samples:
        weight = sum(len(value) for name, value in sample.items() if name != "__key__")
        if shard and (len(shard) == max_samples or size + weight > max_bytes):
            yield shard
            shard, size = [], 0
        shard.append(sample)
        size += weight
    if shard:
        yield shard


def _write_shard(path: Path, samples: list[dict]) -> int:
    """One tar, with nothing of the time, the user or the machine in its headers."""
    buffer = io.BytesIO()
    with TarWriter(buffer, user="root", group="root", mtime=0) as writer:
        for sample in samples:
            writer.write(sample)
    write_atomic(path, buffer.getvalue())
    return len(samples)
