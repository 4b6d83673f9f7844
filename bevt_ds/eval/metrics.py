"""How well a classifier names videos: counts that add up over batches and ranks, and what follows from them.

Letters: B videos, K classes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bevt_ds.errors import UserError
from bevt_ds.runtime.distributed import Ranks

TOP = 5


class Scores:
    """Counts over videos. `confusion` int64 (K,K) on the CPU: rows are labels, columns predictions."""

    def __init__(self, classes: int) -> None:
        self.confusion = torch.zeros(classes, classes, dtype=torch.int64)
        self.hits_top5 = 0

    def add(self, scores: Tensor, labels: Tensor) -> None:
        """Count videos by class scores (B,K), probabilities or logits, and labels int64 (B,); label -1 is padding.

        Raises:
            UserError: a score that is not a finite number.
            ValueError: a number of classes, or a label, that is not this object's.
        """
        classes = len(self.confusion)
        real = labels >= 0
        order, labels = rank_classes(scores[real]), labels[real].cpu()
        if order.shape[1] != classes or (labels >= classes).any():
            raise ValueError(f"scores {tuple(order.shape)} and labels {labels.tolist()} for {classes} classes")
        pairs = labels * classes + order[:, 0]
        self.confusion += torch.bincount(pairs, minlength=classes**2).view(classes, classes)
        self.hits_top5 += int((order[:, :TOP] == labels[:, None]).sum())

    def summed(self, ranks: Ranks) -> Scores:
        """The counts of all ranks together. Collective."""
        mine = torch.cat([self.confusion.flatten(), torch.tensor([self.hits_top5])]).to(ranks.device)
        sums = ranks.sum(mine).cpu()
        total = Scores(len(self.confusion))
        total.confusion += sums[:-1].view_as(total.confusion)
        total.hits_top5 = int(sums[-1])
        return total

    def result(self) -> dict[str, float]:
        """Shares in [0,1] top1, top5 and mean_class_accuracy (over the classes that occur), and the number of videos.

        top5 is left out where there are no more than five classes: it would be 1 whatever the classifier does.

        Raises:
            UserError: nothing was counted.
        """
        videos, hits, each = int(self.confusion.sum()), self.confusion.diagonal(), self.confusion.sum(1)
        if not videos:
            raise UserError("there is no labelled video to score: none could be decoded, or the shards hold none.")
        occurs = each > 0
        return {
            "top1": int(hits.sum()) / videos,
            **({"top5": self.hits_top5 / videos} if len(hits) > TOP else {}),
            "mean_class_accuracy": float((hits[occurs].double() / each[occurs]).mean()),
            "videos": videos,
        }


def rank_classes(scores: Tensor) -> Tensor:
    """Classes int64 (B,K) on the CPU, the best first, from scores (B,K); of equal ones the lower number first.

    Raises:
        UserError: a score that is not a finite number.
    """
    scores = scores.detach().float().cpu()
    if not scores.isfinite().all():
        raise UserError("the network's output is not a finite number: the weights are damaged, or training diverged.")
    return scores.argsort(dim=-1, descending=True, stable=True)
