"""The loader with decoders and pixels that cost nothing: what is left is the Python of a GPU run's loader.

A GPU decodes, resizes and normalises; its calls are not in here. Everything else of a batch is: the plan, its masks,
the threads, reading, checks, the split, index tensors.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from bevt_ds.config.schema import Config
from bevt_ds.data import loader
from bevt_ds.data.decoding.split import Split
from bevt_ds.data.graph_stream import NVDEC, WORKERS, GraphReader
from bevt_ds.data.loader import BatchReader, OneRank
from bevt_ds.data.plan import StreamPlan

FRAME = (256, 340, 3)


class FreePixels:
    """In the place of a PixelPipeline: tensors of the right shapes, made once."""

    dali_decoder = ""

    def __init__(self, kind: str, samples: int, frames: int, size: int) -> None:
        shape = (samples, 3, frames, size, size) if kind == "video" else (samples, 3, size, size)
        self._pixels, self._view = torch.zeros(shape), torch.zeros(1, 3, size // 2, size // 2)

    def placed(self, clip: Tensor) -> Tensor:
        return clip

    def run(self, payloads: list, entries: list, masked: np.ndarray) -> tuple[Tensor, Tensor]:
        return self._pixels, self._view.expand(int(masked.sum()), -1, -1, -1)


class FreeDecoder:
    """In the place of a GpuDecoder."""

    lanes = 14

    def __init__(self, frames: int) -> None:
        self._frames = torch.zeros(frames, *FRAME, dtype=torch.uint8)

    def clips(self, data: bytes, positions: list, frames: int, stride: int) -> tuple[list[Tensor], dict[str, Any]]:
        return [self._frames] * len(positions), {"demux": 0.0, "decode": 0.0, "decoded": 0, "total": frames * stride}


@contextmanager
def free_reader(config: Config) -> Iterator[BatchReader]:
    """A reader of batches whose frames and pixels are there at once."""

    def opened(source, shards, config, shared, device, decoder, ledger, *_: Any, **__: Any) -> GraphReader:
        data, kind = config.data, source.stream.kind
        plan = StreamPlan(source.stream, list(map(len, shards)), data, config.train.seed, source.global_size)
        split = Split({NVDEC: FreeDecoder.lanes, WORKERS: data.workers}) if kind == "video" else None
        shared = replace(shared, gpu=FreeDecoder(data.frames))
        pixels = FreePixels(kind, source.micro_size, data.frames, data.size)
        return GraphReader(plan, shards, data, shared, ledger, data.stride, pixels=pixels, split=split)

    with patch.object(loader, "open_reader", opened):
        reader = BatchReader(config, loader._training_sources(config), OneRank(0, 1), "cpu", None)
    try:
        yield reader
    finally:
        reader.close()


def batches(reader: BatchReader, first: int, count: int, ahead: int) -> None:
    """As the loader's thread makes them: some begun ahead."""
    under_way: deque = deque()
    for step in range(first, first + count):
        under_way.append(reader.begin(step, 0))
        if len(under_way) > ahead:
            reader.finish(under_way.popleft())
    while under_way:
        reader.finish(under_way.popleft())


def measure(config: Config, rounds: int, steps: int = 40) -> dict[str, Any]:
    """CPU milliseconds a sample of all threads: the least of the rounds, as what disturbs only adds."""
    size = config.train.micro_clips + config.train.micro_images
    costs = []
    with free_reader(config) as reader:
        batches(reader, 0, 4, config.data.prefetch)
        for i in range(rounds):
            before = time.process_time()
            batches(reader, 4 + i * steps, steps, config.data.prefetch)
            costs.append(1000 * (time.process_time() - before) / (steps * size))
    return {"free_cpu_per_sample_ms": round(min(costs), 3), "highest_ms": round(max(costs), 3), "rounds": rounds}
