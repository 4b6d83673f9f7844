"""What `bevt features` writes: files of samples, and the manifest that says what they are of.

OUT/
  _manifest.json             weights, sampling, views, shards, the shape of a view's features; written first
  features-00000.safetensors, or .parquet, ...
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import torch
from torch import Tensor

import bevt_ds
from bevt_ds.config.features import FeaturesConfig, FeaturesRunConfig
from bevt_ds.config.files import dotted
from bevt_ds.config.parse import to_dict
from bevt_ds.data.reading.members import Shard
from bevt_ds.data.reading.remote import redacted
from bevt_ds.disk import writing
from bevt_ds.errors import UserError
from bevt_ds.eval.results import run_of
from bevt_ds.folders import weights_hash, weights_of
from bevt_ds.model.frozen_swin import FrozenModel
from bevt_ds.model.tensor_file import write_tensors

MANIFEST = "_manifest.json"  # readers of folders of parquet pass over names that begin so
FREE = ("weights_path", "shards", "versions")  # what may differ when OUT is continued
SAMPLING = ("frames", "stride", "sampling", "size")  # of data.*: they decide the pixels, with views.*


@dataclass(frozen=True)
class Chunk:
    """Samples of a file that could be read, in order, and why the others could not."""

    features: Tensor  # (B,V,C), dense (B,V,T',H',W',C), of images (B,V,H',W',C)
    numbers: list[int]  # of each sample, in the order of the shards
    keys: list[str]  # "shard/key"
    labels: list[str]  # as the shard has them; "": none
    seconds: list[list[list[float]]]  # when each frame of each clip is shown, (clips,T); empty for images
    unreadable: dict[str, str]  # "shard/key" -> reason

    @staticmethod
    def joined(parts: Sequence[Chunk]) -> Chunk:
        """One of several, in order."""
        return Chunk(
            torch.cat([part.features for part in parts]),
            *(sum((getattr(part, name) for part in parts), []) for name in ("numbers", "keys", "labels", "seconds")),
            unreadable={key: why for part in parts for key, why in part.unreadable.items()},
        )


# Manifest


def manifest_of(config: FeaturesRunConfig, shards: Sequence[Shard], model: FrozenModel) -> dict[str, Any]:
    """What decides the numbers, and where it came from."""
    data = to_dict(config)["data"]
    path = weights_of(config.weights)
    return {
        "weights_sha256": weights_hash(path),
        "weights_path": str(path),
        "recipe": config.recipe if run_of(config.weights) else "",  # of the run that the weights are from
        "samples": sum(map(len, shards)),
        "samples_sha256": samples_hash(shards),
        "shards": [redacted(shard.path) for shard in shards],
        "channels": model.encoder.norm.normalized_shape[0],
        "features": to_dict(config)["features"],
        "data": {key: data[key] for key in SAMPLING},
        "views": to_dict(config)["views"],
        "precision": config.precision,
        "versions": {"bevt_ds": bevt_ds.__version__, "torch": torch.__version__},
    }


def samples_hash(shards: Sequence[Shard]) -> str:
    """Keys, sizes, checksums and labels of the samples; where the tars lie does not matter."""
    digest = hashlib.sha256()
    for shard in shards:
        digest.update(repr((shard.keys, shard.sizes, shard.crcs, shard.labels)).encode())
    return digest.hexdigest()


def require_same_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write the manifest, or hold it against the one that is there: any number of ranks may do so at a time.

    Raises:
        UserError: `folder` has features of other weights, samples or settings; which, is said.
    """
    path, aside = folder / MANIFEST, _aside(folder / MANIFEST)
    with writing(path):
        aside.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        try:
            os.link(aside, path)  # fails where there is one, and is never there in part
        except FileExistsError:
            pass
        finally:
            aside.unlink()
    there = dict(dotted(json.loads(path.read_text(encoding="utf-8"))))
    wanted = dict(dotted(json.loads(json.dumps(manifest))))
    other = [key for key in wanted if key.split(".")[0] not in FREE and there.get(key) != wanted[key]]
    if other:
        values = ", ".join(f"{key}={there.get(key)} (this command: {wanted[key]})" for key in other)
        raise UserError(f"{folder} has features of other settings: {values}. Name another OUT, or remove it.")


# Files


def chunk_path(folder: Path, features: FeaturesConfig, number: int) -> Path:
    """Where a chunk lies."""
    return folder / f"features-{number:05d}.{features.format}"


def write_chunk(folder: Path, features: FeaturesConfig, number: int, chunk: Chunk) -> None:
    """Write a chunk aside, then put it in its place."""
    path = chunk_path(folder, features, number)
    aside = _aside(path)
    with writing(path):
        _FORMATS[features.format](aside, chunk)
        os.replace(aside, path)


def remove_leftovers(folder: Path) -> None:
    """What a command that was killed had written aside, once all files are there."""
    for path in folder.glob(".*.partial"):
        path.unlink(missing_ok=True)


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")


def _write_safetensors(path: Path, chunk: Chunk) -> None:
    """Tensors `features`, `numbers` int64 (B,), of clips `seconds` float64 (B,clips,T); texts as JSON in metadata."""
    tensors = {"features": chunk.features.contiguous(), "numbers": torch.tensor(chunk.numbers, dtype=torch.int64)}
    if any(chunk.seconds):
        tensors["seconds"] = torch.tensor(chunk.seconds, dtype=torch.float64)
    texts = {"keys": chunk.keys, "labels": chunk.labels, "unreadable": chunk.unreadable}
    write_tensors(path, tensors, {"format": "pt"} | {name: json.dumps(value) for name, value in texts.items()})


def _write_parquet(path: Path, chunk: Chunk) -> None:
    """A row a view: number, key, label, clip, crop, seconds, features (flat; the schema's metadata has their shape)."""
    (samples, views), shape = chunk.features.shape[:2], list(chunk.features.shape[2:])
    clips = max(map(len, chunk.seconds), default=0) or 1
    each = [(i, view // (views // clips), view % (views // clips)) for i in range(samples) for view in range(views)]
    flat = pa.array(chunk.features.flatten().numpy())
    table = pa.table(
        {
            "number": pa.array([chunk.numbers[i] for i, _, _ in each], pa.int64()),
            "key": pa.array([chunk.keys[i] for i, _, _ in each], pa.string()),
            "label": pa.array([chunk.labels[i] or None for i, _, _ in each], pa.string()),
            "clip": pa.array([clip for _, clip, _ in each], pa.int32()),
            "crop": pa.array([crop for _, _, crop in each], pa.int32()),
            "seconds": pa.array(
                [chunk.seconds[i][clip] if chunk.seconds[i] else [] for i, clip, _ in each], pa.list_(pa.float64())
            ),
            "features": pa.FixedSizeListArray.from_arrays(flat, math.prod(shape)),
        }
    )
    texts = {"shape": json.dumps(shape), "unreadable": json.dumps(chunk.unreadable)}
    pa.parquet.write_table(table.replace_schema_metadata(texts), path)


_FORMATS = {"safetensors": _write_safetensors, "parquet": _write_parquet}
