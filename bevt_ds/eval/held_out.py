"""The closing summary: held-out losses next to what one could score without looking at the input."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from bevt_ds.batch import Batch
from bevt_ds.model.tokenizers import Tokenizer, tokenize
from bevt_ds.runtime.engine import Engine
from bevt_ds.runtime.logging import STREAMS, require_known_targets


@dataclass(frozen=True)
class StreamSummary:
    """Held-out figures of one stream; losses and entropies in nats per masked cell."""

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


def as_table(summaries: dict[str, StreamSummary], data: Mapping[str, str]) -> str:
    """The summary as people read it. data: what each stream's figures are of."""
    lines = [
        "held-out        loss   unigram entropy     gain   masked accuracy   commonest id   perplexity",
    ]
    for name, s in summaries.items():
        lines.append(
            f"{name:<10}{s.loss:10.3f}{s.unigram_entropy:18.3f}{s.gain:9.3f}{s.accuracy:18.1%}{s.commonest_rate:15.1%}"
            f"{math.exp(s.loss):13.1f}"
        )
    return "\n".join([*lines, *(f"{name} figures are of {data[name]}" for name in summaries)])


def as_json(summaries: dict[str, StreamSummary]) -> dict[str, Any]:
    """The summary as summary.json holds it."""
    return {name: {**asdict(s), "gain": s.gain} for name, s in summaries.items()}


def shortfall(summaries: dict[str, StreamSummary], min_gain: float, data: Mapping[str, str]) -> str | None:
    """Why the run did not learn enough, or None. A gain that is not a number falls short. data: as in `as_table`."""
    if min_gain > 0 and not summaries:
        return f"the loss must end {min_gain} nats below the unigram entropy, and no masked position was held out"
    low = [
        f"the {name} loss on {data[name]} {_standing(s.gain)}"
        for name, s in summaries.items()
        if not s.gain >= min_gain
    ]
    if min_gain <= 0 or not low:
        return None
    return (
        f"{'; '.join(low)} the unigram entropy, the loss of a guess that ignores the input, and must end"
        f" {min_gain} below (train.min_gain). Train longer (train.steps, train.epochs), look at samples.png and at the"
        " loss in log.jsonl; train.min_gain=0 leaves the check out."
    )


def _standing(gain: float) -> str:
    if not math.isfinite(gain):
        return "is not a number, against"
    return f"ended {abs(gain):.3f} nats {'below' if gain >= 0 else 'above'}"
