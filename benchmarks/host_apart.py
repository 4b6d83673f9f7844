"""What is left to the process that trains where the loader has a process of its own: CPU time for each sample.

Micro-batches of drawn files, decoded on the CPU, of which the other process sends frames and files, as on a GPU. Here
they are fed into DALI graphs with the inputs of a GPU run, which make nothing of them: what a GPU would do
costs no CPU. CUDA's calls are not in here.
"""

from __future__ import annotations

import threading
from itertools import islice
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from nvidia.dali import Pipeline, fn, types
from torch import Tensor

from bevt_ds.config.schema import Config
from bevt_ds.data import loader as loader_module
from bevt_ds.data.loader import ALONE, BackgroundLoader
from bevt_ds.data.pixels.pipeline import PixelPipeline
from bevt_ds.data.process.messages import Opening
from bevt_ds.data.process.remote import RemoteReader

BY_GRAPHS = {"VIDEO": "cpu", "IMAGE": "cpu"}  # decoders: frames of clips, files of images


class FreeGraph(PixelPipeline):
    """Takes what a PixelPipeline takes; its pixels are there at once."""

    def _build(self) -> None:
        batch_size, size, threads, _ = self._settings
        self.graph = Pipeline(
            batch_size=batch_size, num_threads=1, device_id=None, prefetch_queue_depth=1, exec_dynamic=True
        )
        scalars = {"short_side": types.FLOAT, "crop_y": types.FLOAT, "crop_x": types.FLOAT, "flip": types.INT32}
        with self.graph:
            inputs = [fn.external_source(name=name, dtype=dtype, ndim=0) for name, dtype in scalars.items()]
            if self.kind == "image":
                matrix = fn.external_source(name="jitter_matrix", dtype=types.FLOAT, ndim=2)
                inputs += [matrix, fn.external_source(name="jitter_luma", dtype=types.FLOAT, ndim=0)]
            name = "encoded" if self.kind == "image" else "frames"
            payload = fn.external_source(name=name, dtype=types.UINT8, no_copy=True)
            self.graph.set_outputs(*inputs, payload)
        self.graph.build()
        shape = (batch_size, 3, 16, size, size) if self.kind == "video" else (batch_size, 3, size, size)
        self._made = torch.zeros(shape), torch.zeros(1, 3, size // 2, size // 2)

    def _copied(self, outputs: tuple, frames: Any) -> tuple[Tensor, Tensor]:
        pixels, view = self._made
        return pixels, view.expand(len(frames), -1, -1, -1)


def python_seconds() -> float:
    """CPU time of this process's threads that may hold Python's lock: DALI's own do not."""
    places = [f"/proc/self/task/{thread.native_id}/schedstat" for thread in threading.enumerate()]
    return sum(int(Path(place).read_text().split()[0]) for place in places) / 1e9


def measure(config: Config, rounds: int, steps: int = 10) -> dict[str, Any]:
    """CPU milliseconds a sample of Python's threads here: the least of the rounds, as what disturbs only adds."""
    size, costs = config.train.micro_clips + config.train.micro_images, []
    with patch("bevt_ds.data.open_stream.PixelPipeline", FreeGraph):
        opening = Opening(config, loader_module._training_sources(config), 0, 1, decoders=BY_GRAPHS)
        reader = RemoteReader(opening, torch.device("cpu"))
        with BackgroundLoader(reader, 1, config.data, ALONE) as loader:
            list(islice(loader, 2 * config.data.prefetch + 2))
            for _ in range(rounds):
                before = python_seconds()
                for _ in islice(loader, steps):
                    pass
                costs.append(1000 * (python_seconds() - before) / (steps * size))
    return {"free_cpu_per_sample_ms": round(min(costs), 4), "highest_ms": round(max(costs), 4), "rounds": rounds}
