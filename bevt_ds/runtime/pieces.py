"""What training changes, cut into pieces of parameters: how ranks write it, and read it in any other layout.

A checkpoint's `state/` holds, of every rank, `rank-00000.safetensors`: 1-D fp32 tensors `weights/NAME` (the master
weights), `exp_avg/NAME`, `exp_avg_sq/NAME` and, where a run keeps one, `average/NAME`, each a run of elements of the
flattened parameter NAME. Where it begins stands in the header's `starts`. `whole.safetensors` has frozen parameters and
buffers, `counters.json` the numbers. So a reader need not know the number of ranks and the ZeRO stage of the writer.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bevt_ds.errors import UserError
from bevt_ds.model.tensor_file import read_tensors, write_tensors

WEIGHTS = "weights"
MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW
AVERAGE = "average"
COUNTERS = "counters.json"
WHOLE = "whole.safetensors"


@dataclass(frozen=True)
class Piece:
    """`size` elements, from `start` on, of a flattened parameter; a rank has them at `offset` of its tensor `flat`."""

    name: str
    start: int
    size: int
    flat: int
    offset: int

    def of(self, flats: Sequence[Tensor]) -> Tensor:
        """Its elements among the tensors of a rank, as a view (size,)."""
        return flats[self.flat].detach().view(-1)[self.offset : self.offset + self.size]


@dataclass(frozen=True)
class Snapshot:
    """What one rank writes into a checkpoint, on the CPU; the training may go on meanwhile."""

    tensors: dict[str, Tensor]  # KIND/NAME -> (size,) fp32
    starts: dict[str, int]  # NAME -> where its piece begins
    whole: dict[str, Tensor]  # frozen parameters and buffers
    counters: dict[str, Any]  # plain numbers, and the parameters' shapes

    @property
    def size(self) -> int:
        """Bytes of this rank's own file."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())

    def write(self, folder: Path, rank: int) -> None:
        """Write this rank's files; those that are the same on every rank are written by rank 0."""
        folder.mkdir(parents=True, exist_ok=True)
        write_tensors(folder / f"rank-{rank:05d}.safetensors", self.tensors, {"starts": json.dumps(self.starts)})
        if rank == 0:
            write_tensors(folder / WHOLE, self.whole, {})
            (folder / COUNTERS).write_text(json.dumps(self.counters, indent=1) + "\n", encoding="utf-8")


def share(pieces: Sequence[Piece], rank: int, world: int) -> list[Piece]:
    """Of pieces that every rank holds, what this one writes: as many elements as any other, up to one."""
    total, begun, own = sum(piece.size for piece in pieces), 0, []
    first, last = (total * r // world for r in (rank, rank + 1))
    for piece in pieces:
        low, high = (min(max(edge - begun, 0), piece.size) for edge in (first, last))
        if low < high:
            own.append(Piece(piece.name, piece.start + low, high - low, piece.flat, piece.offset + low))
        begun += piece.size
    return own


def take_snapshot(
    pieces: Sequence[Piece], kinds: Mapping[str, Sequence[Tensor]], whole: dict[str, Tensor], counters: dict[str, Any]
) -> Snapshot:
    """Copy the pieces of each kind of tensors to the CPU."""
    tensors = {f"{kind}/{p.name}": p.of(flats).to("cpu", copy=True) for kind, flats in kinds.items() for p in pieces}
    return Snapshot(tensors, {piece.name: piece.start for piece in pieces}, whole, counters)


class SavedPieces:
    """Reads a checkpoint's `state/`, only the elements that are asked for. Use it in `with`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._runs: dict[str, list[tuple[int, int, Any]]] = defaultdict(list)  # KIND/NAME -> start, size, slice
        self._files = ExitStack()

    def __enter__(self) -> SavedPieces:
        """UserError: a file is no safetensors file, or not of a checkpoint."""
        for path in sorted(self.folder.glob("rank-*.safetensors")):
            try:
                file = self._files.enter_context(safe_open(path, "pt"))
                starts = json.loads(file.metadata()["starts"])
                for key in file.keys():  # noqa: SIM118  (not a dict)
                    part = file.get_slice(key)
                    self._runs[key].append((int(starts[key.partition("/")[2]]), part.get_shape()[0], part))
            except (SafetensorError, KeyError, TypeError, ValueError, IndexError) as error:
                self._files.close()
                raise UserError(f"{path} is not a rank's part of a checkpoint ({error}).") from None
        for runs in self._runs.values():
            runs.sort(key=lambda run: run[0])
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._runs.clear()
        self._files.close()

    @property
    def counters(self) -> dict[str, Any]:
        """The plain numbers. UserError: the file is not of a checkpoint."""
        path = self.folder / COUNTERS
        try:
            counters = json.loads(path.read_text(encoding="utf-8"))
            named = all(isinstance(size, int) for shape in counters["shapes"].values() for size in shape)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            named = False
        if not named:
            raise UserError(f"{path} is not of a checkpoint.")
        return dict(counters)

    def whole(self) -> dict[str, Tensor]:
        """Frozen parameters and buffers by name."""
        return read_tensors(self.folder / WHOLE)

    def sizes(self) -> dict[str, int]:
        """KIND/NAME -> elements."""
        return {key: runs[-1][0] + runs[-1][1] for key, runs in self._runs.items()}

    def read(self, key: str, start: int, size: int) -> Tensor:
        """Elements `start` to `start + size` of KIND/NAME, fp32 (size,).

        Raises:
            UserError: the files do not hold them all.
        """
        parts, at = [], start
        for begin, length, part in self._runs.get(key, ()):
            if begin <= at < min(begin + length, start + size):
                high = min(begin + length, start + size)
                parts.append(part[at - begin : high - begin])
                at = high
        if at < start + size:
            raise UserError(f"{self.folder} lacks elements {at} to {start + size} of {key}: it is of another model.")
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def weights(self, kind: str = "") -> dict[str, Tensor]:
        """A checkpoint's tensors of a kind, all whole, by name; else what it exports: averages where there are some."""
        kind = kind or (AVERAGE if any(key.startswith(f"{AVERAGE}/") for key in self._runs) else WEIGHTS)
        shapes = self.counters["shapes"].items()
        return {n: self.read(f"{kind}/{n}", 0, prod(s)).reshape(s) for n, s in shapes} | self.whole()

    def load(self, pieces: Sequence[Piece], kinds: Mapping[str, Sequence[Tensor]]) -> None:
        """Fill the pieces of each kind of tensors, in place. UserError: the files are of another model."""
        for kind, flats in kinds.items():
            for piece in pieces:
                piece.of(flats).copy_(self.read(f"{kind}/{piece.name}", piece.start, piece.size))
