"""bevt_ds/pretrain.py that also writes what its steps train on into the folder LEDGER: `soak_rank.py ARGUMENTS`."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from bevt_ds import pretrain
from bevt_ds.batch import Batch
from bevt_ds.config.command_line import run
from bevt_ds.train.pretraining import Pretraining


def samples(batch: Batch) -> Iterator[tuple[str, int]]:
    """Each sample's key, and a checksum of its pixels and its mask."""
    for name, stream in (("video", batch.video), ("image", batch.image)):
        if stream is not None:
            for key, pixels, mask in zip(stream.sample_keys.tolist(), stream.pixels, stream.mask, strict=True):
                yield f"{name}/{key}", zlib.crc32(pixels.numpy().tobytes() + mask.numpy().tobytes())


def main() -> None:
    forward = Pretraining.forward

    def recorded(self: Pretraining, batch: Batch, step: int, micro_step: int) -> tuple[Tensor, Mapping[str, Tensor]]:
        with Path(os.environ["LEDGER"], f"rank-{self.ranks.rank}.jsonl").open("a") as file:
            file.write(json.dumps([step, *samples(batch)]) + "\n")
        return forward(self, batch, step, micro_step)

    Pretraining.forward = recorded
    Pretraining.draw = lambda self, batch, path: None  # takes longer than all steps
    run(pretrain.main)


if __name__ == "__main__":
    main()
