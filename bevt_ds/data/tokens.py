"""Ids kept in files, one a shard and kind: what a tokenizer makes of each of a sample's data.crops crops.

`bevt tokens` writes them (train/tokens.py). A file says what decides its ids, its contract, and of which bytes they
are; where a run differs from that, the file is refused. Letters: N samples, K crops, T frames (of an
image 1), h w the grid.

DIR/SHARD.KIND.tokens.safetensors:
  ids      uint16, or int32 where there are more than 65536 (N,K,T,h,w)
  crcs     uint32 (N,K): CRC-32 of the ids of each crop, as they lie in the file
  samples  uint32 (N,): CRC-32 of the samples themselves
  metadata "tokens", JSON: contract; keys of the samples; unreadable: [[sample, crop, reason], ...]; versions
"""

from __future__ import annotations

import json
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from bevt_ds.config.schema import Config
from bevt_ds.config.targets import TokenizerConfig
from bevt_ds.data.limits import BadSample
from bevt_ds.data.reading.deadline import heartbeat
from bevt_ds.data.reading.index import write_atomic
from bevt_ds.data.reading.members import Shard, read_at
from bevt_ds.data.reading.remote import redacted
from bevt_ds.data.reading.storage import Storage
from bevt_ds.errors import UserError
from bevt_ds.folders import weights_hash, weights_of

CROP = ("crops", "size", "token_size", "short_side", "flip")  # of data.*: they decide which pixels a crop has
OF_KIND = {"video": ("frames", "stride", "clips_per_video"), "image": ("image_jitter",)}
FORMAT = 1  # to be raised where the same settings give other crops, pixels or ids than before
TYPES = {"U16": "uint16", "I32": "int32"}  # of ids, by safetensors' names
NOT_IDS = ("weights", "decoder")  # of tokenizer.*: paths, of which the first counts by what is there
AGAIN = "remove it, and run `bevt tokens` with the words of this run"
SHOWN = 100  # characters of a value in a message

Contract = Mapping[str, Any]


@dataclass(frozen=True)
class KeptIds:
    """The ids of one shard's samples, as a run has them."""

    path: Path
    start: int  # bytes: where the ids begin in the file
    dtype: np.dtype
    shape: tuple[int, ...]  # (N,K,T,h,w)
    rows: tuple[int, ...]  # of each of the shard's members, which sample of the file it is
    crcs: np.ndarray  # uint32 (N,K)
    unreadable: Mapping[tuple[int, int], str]  # (sample, crop) -> why there are no ids

    def read(self, member: int, crop: int) -> np.ndarray:
        """int64 (T,h,w) of a member's crop. BadSample: there are none, or they cannot be read, or are damaged."""
        row, shape = self.rows[member], self.shape[2:]
        if reason := self.unreadable.get((row, crop)):
            raise BadSample(f"{self.path} has no ids of it: {reason}")
        size = int(np.prod(shape)) * self.dtype.itemsize
        try:
            with self.path.open("rb") as file:
                data = read_at(file, self.start + (row * self.shape[1] + crop) * size, size)
        except OSError as error:
            raise BadSample(f"cannot read {self.path}: {error.strerror}", transient=True) from error
        if zlib.crc32(data) != self.crcs[row, crop]:
            raise BadSample(f"its ids in {self.path} are damaged: {AGAIN}")
        return np.frombuffer(data, self.dtype).reshape(shape).astype(np.int64)


def contract_of(config: Config, kind: str) -> dict[str, Any]:
    """What decides the ids of a run's crops, by field; weights count by their SHA-256.

    Raises:
        UserError: the weights' folder is a run that has none yet.
    """
    of = config.tokenizer
    names = [f.name for f in fields(TokenizerConfig) if f.name not in NOT_IDS]
    there = bool(of.weights) and Path(of.weights).exists()
    return {
        "format": FORMAT,
        **{f"data.{name}": getattr(config.data, name) for name in (*CROP, *OF_KIND[kind])},
        **{f"tokenizer.{name}": getattr(of, name) for name in names},
        "tokenizer.weights": f"sha256 {weights_hash(weights_of(of.weights))}" if there else of.weights,
    }


def shape_of(contract: Contract) -> tuple[int, ...]:
    """(K,T,h,w) of the ids of one sample."""
    side = contract["data.size"] // 16
    return contract["data.crops"], contract.get("data.frames", 1), side, side


def place_of(folder: str | Path, shard: str, kind: str) -> Path:
    """The file of a shard's ids."""
    return Path(folder) / f"{PurePosixPath(redacted(shard)).name}.{kind}.tokens.safetensors"


def open_all(storage: Storage, folder: str, shards: Sequence[Shard], kind: str, contract: Contract) -> list[KeptIds]:
    """The ids of each shard. The arguments: see `open_ids`.

    Raises:
        UserError: a file that is missing, damaged, foreign, of another contract, or of other samples.
        StorageStalled: the disk or file server does not answer.
    """
    require_own_names(folder, [shard.path for shard in shards], kind)
    work = partial(open_ids, folder, kind=kind, contract=contract)
    calls = [storage.executor.submit(partial(storage.ask, work, shard, place=folder)) for shard in shards]
    return [call.result() for call in calls]


def require_own_names(folder: str, shards: Sequence[str], kind: str) -> None:
    """UserError: two shards would have the same file."""
    for name, times in Counter(place_of(folder, path, kind).name for path in shards).items():
        if times > 1:
            raise UserError(
                f"tokens={folder}: {times} shards would have the file {name}: give them names of their own."
            )


def open_ids(folder: str, shard: Shard, kind: str, contract: Contract) -> KeptIds:
    """The ids of a shard's members of one kind, which may be some of them. UserError: see open_all."""
    path = place_of(folder, shard.path, kind)
    texts, tensors, start, shape, dtype = _read(path, contract)
    row_of = {key: i for i, key in enumerate(texts["keys"])}
    rows = tuple(row_of.get(key, -1) for key in shard.keys)
    for key, row, crc in zip(shard.keys, rows, shard.crcs, strict=True):
        if row < 0 or tensors["samples"][row] != crc:
            raise UserError(
                f"{path}: the sample {key!r} of {redacted(shard.path)} {'has changed' if row >= 0 else 'is not in it'}:"
                f" {AGAIN}."
            )
    unreadable = {(row, crop): reason for row, crop, reason in texts["unreadable"]}
    return KeptIds(path, start, dtype, shape, rows, tensors["crcs"], unreadable)


def require_contract(folder: str, shard: str, kind: str, contract: Contract) -> None:
    """Hold a shard's file against a run, as far as shows without the shard. UserError: see open_all."""
    _read(place_of(folder, shard, kind), contract)


def write_ids(
    path: Path,
    shard: Shard,
    ids: np.ndarray,
    unreadable: Mapping[tuple[int, int], str],
    contract: Contract,
    versions: Mapping[str, str],
) -> None:
    """Write the file of a shard, whole or not at all. ids: uint16 or int32 (N,K,T,h,w). OSError: it cannot be."""
    crcs = [[zlib.crc32(crop.tobytes()) for crop in sample] for sample in ids]
    tensors = {
        "ids": ids,
        "crcs": np.array(crcs, dtype=np.uint32),
        "samples": np.array(shard.crcs, dtype=np.uint32),
    }
    reasons = [[row, crop, reason] for (row, crop), reason in unreadable.items()]
    texts = {"contract": contract, "keys": shard.keys, "unreadable": reasons, "versions": versions}
    write_atomic(path, save(tensors, {"tokens": json.dumps(texts)}))


def _read(path: Path, contract: Contract) -> tuple[dict, dict[str, np.ndarray], int, tuple[int, ...], np.dtype]:
    """Texts and small tensors of a file, and of its ids place in bytes, shape and type. UserError: see open_all."""
    heartbeat(path)
    if not path.is_file():
        raise UserError(f"{path} is missing: run `bevt tokens` with the words of this run, which makes it.")
    try:
        with safe_open(path, "np") as file:
            texts = json.loads((file.metadata() or {}).get("tokens", "{}"))
            tensors = {name: file.get_tensor(name) for name in ("crcs", "samples")}
            shape, dtype = tuple(file.get_slice("ids").get_shape()), file.get_slice("ids").get_dtype()
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            start = 8 + length + json.loads(file.read(length))["ids"]["data_offsets"][0]
        _require_types(texts)
        _require_same(path, texts["contract"], contract)
        expected = (len(texts["keys"]), *shape_of(contract))
        if shape != expected or dtype not in TYPES or [t.shape for t in tensors.values()] != [shape[:2], shape[:1]]:
            raise ValueError(f"its ids are {dtype} {list(shape)}, not {list(expected)}")
    except (SafetensorError, ValueError, OSError) as error:
        raise UserError(f"{path} is no whole file of ids ({' '.join(str(error).split())[:SHOWN]}): {AGAIN}.") from error
    return texts, tensors, start, shape, np.dtype(TYPES[dtype])


def _require_types(texts: Any) -> None:
    """ValueError: a file's texts are not what `write_ids` writes."""
    texts = texts if isinstance(texts, dict) else {}
    for name, kind in (("contract", dict), ("keys", list), ("unreadable", list)):
        if not isinstance(texts.get(name), kind):
            raise ValueError(f"it has no {name}")
    if not all(isinstance(key, str) for key in texts["keys"]):
        raise ValueError("its keys are no texts")
    if not all(isinstance(row, list) and [type(x) for x in row] == [int, int, str] for row in texts["unreadable"]):
        raise ValueError("it does not say what is unreadable")


def _require_same(path: Path, there: Contract, wanted: Contract) -> None:
    """UserError: a field of the contract differs, which is named."""
    now = json.loads(json.dumps(wanted))
    if other := [name for name in {**now, **there} if there.get(name) != now.get(name)]:
        values = ", ".join(f"{name}={_short(there.get(name))}, this run {_short(now.get(name))}" for name in other)
        raise UserError(
            f"{path} has ids of other settings: {values}. Take the same, or name another folder, tokens=DIR."
        )


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text[:SHOWN] or "(none)"
