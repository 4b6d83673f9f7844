"""Pixels that another process makes: what its graphs are fed with, on one side, and the graphs on the other."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate, chain, pairwise
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from bevt_ds.data.pixels.pipeline import PixelPipeline, decoder_of, graph_inputs
from bevt_ds.data.plan import PlanEntry


class GraphInputs(NamedTuple):
    """What one run of a graph takes: see PixelPipeline.run_on. Files lie one behind the other: each costs less then."""

    dali_decoder: str
    inputs: dict[str, Any]
    ends: Sequence[int]  # of the files in inputs["encoded"]
    masked: np.ndarray

    def fed(self) -> dict[str, Any]:
        """The inputs with the files apart."""
        if not self.ends:
            return self.inputs
        data = self.inputs["encoded"]
        return self.inputs | {"encoded": [data[begin:end] for begin, end in pairwise([0, *self.ends])]}


class SentPixels:
    """In the place of a PixelPipeline: makes what another process feeds its graphs with."""

    def __init__(self, kind: str, dali_decoder: str | None = None) -> None:
        self.kind, self.dali_decoder = kind, decoder_of(kind, dali_decoder)

    def without_decoder(self) -> SentPixels:
        return SentPixels(self.kind, "")

    def placed(self, clip: np.ndarray) -> np.ndarray:
        return np.asarray(clip)

    def run(
        self, payloads: Sequence, entries: Sequence[PlanEntry], masked: np.ndarray
    ) -> tuple[list[GraphInputs], None]:
        inputs, ends = graph_inputs(self.kind, self.dali_decoder, payloads, entries), []
        if files := inputs.get("encoded"):
            inputs["encoded"], ends = np.concatenate(files), list(accumulate(map(len, files)))
        return [GraphInputs(self.dali_decoder, inputs, ends, masked)], None

    @staticmethod
    def joined(parts: Sequence[tuple[list[GraphInputs], None]]) -> tuple[list[GraphInputs], None]:
        return list(chain.from_iterable(inputs for inputs, _ in parts)), None


class ReceivedPixels:
    """The graphs that make a stream's pixels of what SentPixels has sent."""

    def __init__(self, pixels: PixelPipeline) -> None:
        self._pixels = pixels

    def made(self, parts: Sequence[GraphInputs]) -> tuple[Tensor, Tensor]:
        """Pixels and view of a micro-batch. BadSample: as PixelPipeline.run."""
        made = [self._graph(part.dali_decoder).run_on(part.fed(), part.masked) for part in parts]
        return made[0] if len(made) == 1 else self._pixels.joined(made)

    def _graph(self, dali_decoder: str) -> PixelPipeline:
        return self._pixels if dali_decoder == self._pixels.dali_decoder else self._without_decoder

    @cached_property
    def _without_decoder(self) -> PixelPipeline:
        return self._pixels.without_decoder()
