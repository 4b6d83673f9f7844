"""DALL-E's encoder as a CUDA graph, replayed for every few frames. `train.graphs`; not yet run on a GPU.

How many frames are tokenized changes from step to step, a graph has one shape: frames come in chunks, the last one
filled up with zeros. With one shape cuDNN can also choose its algorithms by measurement, once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from bevt_ds.config.graphs import Graphs as Switch
from bevt_ds.errors import UserError
from bevt_ds.model.tokenizers.dalle import DalleTokenizer
from bevt_ds.runtime.graphs import REMEDY, Backend

FRAMES = 16  # of a chunk: on average half of them are computed for nothing
WARM_UP = 2  # calls in the ordinary way before the capture
SETTLED = 6  # micro-steps after which all ranks use their graphs, or none does
DIFFERENT = 0.01  # share of ids that may be others: another algorithm rounds otherwise where two logits are close


class _Graph(NamedTuple):
    """A captured pass. Whoever holds it holds its memory."""

    frames: Tensor  # its own, (FRAMES,3,v,v)
    replay: Callable[[], None]
    ids: Tensor  # its own, (FRAMES,v/8,v/8)


class ReplayedTokenizer:
    """A tokenizer whose `encode` replays a graph, once those of all ranks have given the ids of the ordinary way."""

    def __init__(
        self,
        tokenizer: DalleTokenizer,
        switch: Switch,
        backend: Backend,
        agree: Callable[[bool], bool],
        say: Callable[[str], None],
    ) -> None:
        """Args:
        switch: auto goes back to the ordinary way where capturing fails or gives other ids; on: an error.
        agree: whether all ranks hold something. Collective.
        say: prints a line.
        """
        self.vocab_size, self._tokenizer = tokenizer.vocab_size, tokenizer
        self._switch, self._backend, self._agree, self._say = switch, backend, agree, say
        self._calls = self._micro_steps = 0
        self._graph: _Graph | None = None
        self._problem = f"nothing to capture in {SETTLED} micro-steps"

    @torch.no_grad()
    def encode(self, frames: Tensor) -> Tensor:
        """Frames (N,3,v,v), float RGB in [0,1] -> ids (N,v/8,v/8), int64. UserError: frames that are none."""
        settled = self._micro_steps >= SETTLED
        if settled and self._graph and self._graph.frames.shape[1:] == frames.shape[1:]:
            self._tokenizer.require(frames)
            return _replayed(self._graph, frames)
        ids = self._tokenizer.encode(frames)
        self._calls += 1
        if self._calls == WARM_UP + 1 and not settled:
            self._prepare(frames, ids)
        return ids

    def after_micro_step(self) -> None:
        """Also one in which nothing was encoded: the last of SETTLED decides. Collective.

        Ranks capture at different calls, since one has no frames where nothing is masked.

        Raises:
            UserError: train.graphs=on, and a rank has no graph that can be relied on. On all ranks.
        """
        self._micro_steps += 1
        if self._micro_steps != SETTLED or self._agree(self._graph is not None):
            return
        problem = "another rank cannot" if self._graph else self._problem
        self._graph = None
        line = f"train.graphs={self._switch}: the tokenizer is not replayed, {problem}"
        if self._switch == "on":
            raise UserError(f"{line}. {REMEDY}")
        self._say(f"{line}: it goes on without a graph.")

    def _prepare(self, frames: Tensor, expected: Tensor) -> None:
        """Capture, and keep the graph if its ids of these frames are the ordinary ones."""
        own = frames.new_zeros((FRAMES, *frames.shape[1:]))
        run = lambda: self._tokenizer(own).argmax(1)  # noqa: E731
        measures, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
        try:
            self._backend.warm_up(run)
            ((replay, ids),) = self._backend.capture(run)
            graph = _Graph(own, replay, ids)
            different = float((_replayed(graph, frames) != expected).double().mean())
            self._problem = f"{different:.1%} of its ids are others than those of the ordinary way"
            self._graph = graph if different <= DIFFERENT else None
        except RuntimeError as error:
            self._problem = f"it cannot be captured ({str(error).splitlines()[0]})"
        finally:
            torch.backends.cudnn.benchmark = measures


def _replayed(graph: _Graph, frames: Tensor) -> Tensor:
    """The ids, chunk by chunk."""
    found = []
    for chunk in frames.split(FRAMES):
        graph.frames[: len(chunk)].copy_(chunk)
        graph.frames[len(chunk) :].zero_()
        graph.replay()
        found.append(graph.ids[: len(chunk)].clone())  # the next chunk overwrites them
    return torch.cat(found)
