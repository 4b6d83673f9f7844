"""How good the encoder's features are, and how many visual tokens are in use, while a run is pretraining.

Nothing here draws a random number or changes a weight, and every figure is a function of the weights and the step: the
run goes on as if it had not been looked at, and a resumed run logs what an uninterrupted one does.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bevt_ds.batch import Batch
from bevt_ds.config.samples import ViewsConfig, labelled_as
from bevt_ds.config.schema import Config
from bevt_ds.data.labels import read_classes
from bevt_ds.data.reading.members import Shard
from bevt_ds.eval.features import Features, extract, feature_rank, features_of, gathered, ridge_predictions
from bevt_ds.eval.held_out import count_ids, unigram
from bevt_ds.eval.metrics import Scores
from bevt_ds.eval.videos import each_video, require_decodable_sets, shards_of
from bevt_ds.runtime.distributed import Ranks
from bevt_ds.runtime.engine import Engine

MOST_BYTES = 4 << 30  # of pooled features on a rank: far more than a small labelled set has


class OnlineProbe:
    """The labelled videos of a run's `probe` section, and the visual tokens counted since the last measurement."""

    def __init__(self, config: Config, vocab_size: int, ranks: Ranks, steps: int) -> None:
        """Read the labels and try a few videos.

        vocab_size: of the ids that are counted; 0: the targets are none. steps: of the whole run; the last is followed
        by a measurement.

        Raises:
            UserError: shards or labels that cannot be used, or a set without a video that can be decoded.
        """
        self.ranks, self.every, self.steps = ranks, config.probe.every, steps
        self.data = labelled_as(config.data)
        self.views = ViewsConfig(
            clips=1, crops=1, short_side=self.data.short_side, micro_videos=config.train.micro_clips
        )
        self.train, self.val = (shards_of(p, self.data) for p in (config.probe.train, config.probe.val))
        self.classes = read_classes(self.train, self.val)
        require_decodable_sets({"probe.train": self.train, "probe.val": self.val}, self.data)
        self.counts = torch.zeros(vocab_size, dtype=torch.int64, device=ranks.device)

    def due(self, step: int) -> bool:
        """Whether the update number `step` is followed by a measurement."""
        return (step + 1) % self.every == 0 or step + 1 == self.steps

    def count(self, batch: Batch) -> None:
        """Count the target ids of a micro-batch of a step that is due."""
        for stream in (batch.video, batch.image):
            if len(self.counts) and stream is not None and stream.targets is not None:
                self.counts += count_ids(stream.targets, len(self.counts))

    def measure(self, engine: Engine) -> dict[str, float]:
        """The figures of a log line, on rank 0; empty elsewhere. Collective.

        probe_top1: ridge regression on the pooled features. feature_rank: their effective rank. codebook_use and
        codebook_perplexity: of the target ids of the step's global batch.
        """
        with engine.evaluating():
            train, val = (self._features(engine, shards) for shards in (self.train, self.val))
        counts = self.ranks.sum(self.counts).cpu()
        self.counts = torch.zeros_like(self.counts)
        if not self.ranks.is_main:
            return {}
        scores = Scores(len(self.classes))
        scores.add(ridge_predictions(train.values, train.labels, val.values, len(self.classes)), val.labels)
        result = scores.result()
        return {
            "probe_top1": result["top1"],
            "probe_videos": result["videos"],
            "feature_rank": feature_rank(torch.cat([train.values, val.values])),
            **(codebook_use(counts) if len(counts) else {}),
        }

    def _features(self, engine: Engine, shards: list[Shard]) -> Features:
        encode = features_of(engine.module.encoder, engine.dtype, "linear")
        batches = each_video(self.data, self.views, shards, self.classes, None, self.ranks, "online probe")
        return gathered(extract(encode, batches, self.ranks, MOST_BYTES), self.ranks)


def codebook_use(counts: Tensor) -> dict[str, float]:
    """From ids counted in `counts` (V,): the share of ids that occur, and exp of the ids' entropy (at most V)."""
    return {
        "codebook_use": float((counts > 0).double().mean()),
        "codebook_perplexity": math.exp(unigram(counts)[0]),
    }
