"""The closing summary: held-out losses next to what one could score without looking at the input."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from bevt_ds.batch import Batch
from bevt_ds.model.tokenizers import Tokenizer, tokenize
from bevt_ds.runtime.engine import Engine
from bevt_ds.runtime.logging import STREAMS, require_known_targets


class Summary(ABC):
    """Held-out figures of one stream, a dataclass.

    baseline: what its loss is compared with. columns: the heads of `row`.
    """

    baseline: ClassVar[str]
    columns: ClassVar[str]

    @property
    @abstractmethod
    def gain(self) -> float:
        """How far the loss is below the baseline."""

    @abstractmethod
    def extent(self) -> str:
        """The gain without its sign, in a sentence."""

    @abstractmethod
    def row(self) -> str:
        """Its figures, for a table."""


@dataclass(frozen=True)
class StreamSummary(Summary):
    """Held-out figures of ids; losses and entropies in nats per masked cell."""

    baseline: ClassVar[str] = "the unigram entropy, the loss of a guess that ignores the input"
    columns: ClassVar[str] = "loss   unigram entropy     gain   masked accuracy   commonest id   perplexity"

    loss: float
    accuracy: float
    unigram_entropy: float  # of the same token ids: the loss of the best guess that ignores the input
    commonest_rate: float  # of the same token ids: the accuracy of always naming the commonest
    cells: int
    id_counts: tuple[int, ...] = ()  # of the ids that occur, the commonest first

    @property
    def gain(self) -> float:
        """Nats below the unigram entropy."""
        return self.unigram_entropy - self.loss

    def extent(self) -> str:
        return f"{abs(self.gain):.3f} nats"

    def row(self) -> str:
        return (
            f"{self.loss:10.3f}{self.unigram_entropy:18.3f}{self.gain:9.3f}{self.accuracy:18.1%}"
            f"{self.commonest_rate:15.1%}{math.exp(self.loss):13.1f}"
        )


def unigram(counts: Tensor) -> tuple[float, float]:
    """Entropy in nats and the largest share, of ids counted in `counts` (V,)."""
    shares = counts.double() / counts.sum()
    present = shares[shares > 0]
    return float(-(present * present.log()).sum()), float(shares.max())


def count_ids(targets: Tensor, vocabulary: int) -> Tensor:
    """How often each id occurs in `targets`: int64 (V,), on their device. What is no id is left out."""
    ids = targets[(targets >= 0) & (targets < vocabulary)]
    return torch.bincount(ids, minlength=vocabulary)


def by_frequency(counts: Tensor) -> tuple[int, ...]:
    """The counts that are not 0, the largest first."""
    return tuple(counts[counts > 0].sort(descending=True).values.tolist())


def evaluate(engine: Engine, tokenizer: Tokenizer, batches: Iterable[Batch]) -> dict[str, StreamSummary]:
    """Summaries by stream over held-out micro-batches; a stream without a masked position has none.

    Collective: every rank evaluates the same batches.

    Raises:
        UserError: a target is no id of the tokenizer's vocabulary.
    """
    sums = {s: [0.0, 0, 0] for s in STREAMS}  # loss sum, hits, cells
    counts = {s: torch.zeros(tokenizer.vocab_size, dtype=torch.int64) for s in STREAMS}
    with engine.evaluating():
        for batch in batches:
            batch = tokenize(tokenizer, batch.to(engine.ranks.device))
            metrics = engine.forward(batch).metrics
            require_known_targets(metrics, tokenizer.vocab_size, "of the held-out shards")
            for name in STREAMS:
                stream = getattr(batch, name)
                if stream is not None:
                    counts[name] += count_ids(stream.targets, tokenizer.vocab_size).cpu()
                    sums[name][0] += float(metrics[f"loss_{name}"])
                    sums[name][1] += int(metrics[f"hits_{name}"])
                    sums[name][2] += int(metrics[f"rows_{name}"])
    return {
        name: StreamSummary(loss / cells, hits / cells, *unigram(counts[name]), cells, by_frequency(counts[name]))
        for name, (loss, hits, cells) in sums.items()
        if cells
    }


def as_table(summaries: Mapping[str, Summary], data: Mapping[str, str]) -> str:
    """The summary as people read it; empty without a stream. data: what each stream's figures are of."""
    lines = [f"held-out        {s.columns}" for s in summaries.values()][:1]
    lines += [f"{name:<10}{s.row()}" for name, s in summaries.items()]
    return "\n".join([*lines, *(f"{name} figures are of {data[name]}" for name in summaries)])


def as_json(summaries: Mapping[str, Summary]) -> dict[str, Any]:
    """The summary as summary.json holds it."""
    return {name: {**asdict(s), "gain": s.gain} for name, s in summaries.items()}


def shortfall(summaries: Mapping[str, Summary], min_gain: float, data: Mapping[str, str]) -> str | None:
    """Why the run did not learn enough, or None. A gain that is not a number falls short. data: as in `as_table`."""
    if min_gain > 0 and not summaries:
        return f"the loss must end {min_gain} below that of a guess, and no masked position was held out"
    low = [f"the {name} loss on {data[name]} {_standing(s)}" for name, s in summaries.items() if not s.gain >= min_gain]
    if min_gain <= 0 or not low:
        return None
    baseline = next(iter(summaries.values())).baseline
    return (
        f"{'; '.join(low)} {baseline}, and must end {min_gain} below (train.min_gain). Train longer"
        " (train.steps, train.epochs), look at samples.png and at the loss in log.jsonl; train.min_gain=0 leaves the"
        " check out."
    )


def _standing(summary: Summary) -> str:
    if not math.isfinite(summary.gain):
        return "is not a number, against"
    return f"ended {summary.extent()} {'below' if summary.gain >= 0 else 'above'}"
