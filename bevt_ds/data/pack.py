"""Media files -> WebDataset shards: `{split}-{number:06d}.tar` with `<key>.mp4|jpg|...` and `<key>.json`."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm
from webdataset import TarWriter

from bevt_ds.data.images import check_image
from bevt_ds.data.index import EXTENSIONS, write_atomic
from bevt_ds.data.limits import BadSample, Limits
from bevt_ds.data.video import probe
from bevt_ds.errors import UserError

SHARD_BYTES = 1 << 30
SHARD_SAMPLES = 10_000


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
    """Pack the media of `kind` ("video" or "image") under a folder: bytes as they are, in the order of their paths.

    A shard is closed before it would pass `shard_bytes` or `shard_samples`. The same input gives the same tars. What
    cannot be read is listed in `{split}-rejected.jsonl` with the reason. UserError: no such media under `source`, or
    shards of this split are already in `out`.
    """
    files = _media(source, kind)
    _require_new(out, split)
    out.mkdir(parents=True, exist_ok=True)
    rejected: list[dict[str, str]] = []
    samples = _samples(source, tqdm(files, disable=not progress, unit="file"), kind, rejected)
    with tempfile.TemporaryDirectory(dir=out, prefix=f".{split}.") as unfinished:
        shards, total = _write_shards(samples, Path(unfinished), split, shard_bytes, shard_samples)
        for shard in shards:
            shard.rename(out / shard.name)
    if rejected:
        lines = "".join(json.dumps(event) + "\n" for event in rejected)
        write_atomic(out / f"{split}-rejected.jsonl", lines.encode())
    if not shards:
        raise UserError(f"none of the {len(files)} {kind} files under {source} is usable: see {out}")
    return Packed(tuple(out / shard.name for shard in shards), total, len(rejected))


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


def _samples(source: Path, files: Iterable[Path], kind: str, rejected: list[dict]) -> Iterator[dict]:
    """webdataset samples; files that cannot be used are added to `rejected` instead."""
    keys: set[str] = set()
    for path in files:
        name = path.relative_to(source)
        # webdataset ends a key at its first dot
        key = str(name.with_name(name.stem.replace(".", "_")))
        data = path.read_bytes()
        try:
            if key in keys:
                raise BadSample(f"another file has the key {key!r} too")
            facts = _describe(data, kind)
        except BadSample as bad:
            rejected.append({"path": str(name), "reason": str(bad)})
            continue
        keys.add(key)
        facts = {"source": str(name), **facts}
        yield {
            "__key__": key,
            path.suffix[1:].lower(): data,
            "json": json.dumps(facts, sort_keys=True).encode(),
        }


def _describe(data: bytes, kind: str) -> dict:
    if kind == "video":
        return asdict(probe(data, Limits()))
    width, height = check_image(data, Limits())
    return {"width": width, "height": height}


def _write_shards(
    samples: Iterator[dict], folder: Path, split: str, max_bytes: int, max_samples: int
) -> tuple[list[Path], int]:
    """Fill one tar after another; returns them and the number of samples."""
    shards: list[Path] = []
    total = count = size = 0
    with ExitStack() as writers:
        for sample in samples:
            weight = sum(len(value) for name, value in sample.items() if name != "__key__")
            if not shards or count == max_samples or size + weight > max_bytes:
                writers.close()
                shards.append(folder / f"{split}-{len(shards):06d}.tar")
                writer = writers.enter_context(_writer(shards[-1]))
                count = size = 0
            writer.write(sample)
            count, size, total = count + 1, size + weight, total + 1
    return shards, total


def _writer(path: Path) -> TarWriter:
    """A tar with nothing of the time, the user or the machine in its headers."""
    return TarWriter(str(path), user="root", group="root", mtime=0)
