"""Metrics: accuracies counted by hand, ties, padding, sums over ranks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bevt_ds.errors import UserError
from bevt_ds.eval.metrics import Scores, rank_classes
from bevt_ds.runtime.distributed import Ranks


class World(Ranks):
    """Three ranks in one process, of which the others' counts are known."""

    def sum(self, value):
        return value + self.host


def counted(scores, labels, classes=None):
    counts = Scores(classes or scores.shape[1])
    counts.add(scores, torch.tensor(labels))
    return counts


def test_accuracies_counted_by_hand():
    """Class 0: 1 of 3, class 1: 1 of 1; class 2 never occurs and does not enter the mean."""
    scores = torch.eye(3)[[0, 1, 2, 1]]
    result = counted(scores, [0, 0, 0, 1]).result()
    assert result == {"top1": 0.5, "mean_class_accuracy": pytest.approx((1 / 3 + 1) / 2), "videos": 4}


def test_confusion_matrix_has_labels_in_rows():
    assert counted(torch.eye(3)[[2, 2]], [0, 1]).confusion.tolist() == [[0, 0, 1], [0, 0, 1], [0, 0, 0]]


def test_top5_accuracy_of_many_classes():
    scores = torch.arange(7.0).expand(7, 7)  # best to worst: 6, 5, 4, 3, 2, 1, 0
    assert counted(scores, list(range(7))).result()["top5"] == 5 / 7


def test_tied_scores_do_not_count_as_right():
    """A constant output must score as one guess, the lowest class, not as all of them."""
    result = counted(torch.ones(10, 10), list(range(10))).result()
    assert (result["top1"], result["top5"]) == (0.1, 0.5)


def test_padding_is_not_counted():
    assert counted(torch.eye(2)[[0, 1, 1]], [0, -1, -1]).result()["videos"] == 1
    with pytest.raises(UserError, match="no labelled video"):
        counted(torch.eye(2), [-1, -1]).result()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 12), st.integers(0, 20))
def test_metric_counts_add_up_over_batches_and_ranks(seed, classes, cut):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(20, classes, generator=generator)
    labels = torch.randint(-1, classes, (20,), generator=generator)
    labels[0] = 0
    whole, mine, theirs = (Scores(classes) for _ in range(3))
    whole.add(scores, labels)
    mine.add(scores[:cut], labels[:cut])
    theirs.add(scores[cut:], labels[cut:])
    other = torch.cat([theirs.confusion.flatten(), torch.tensor([theirs.hits_top5])])
    total = mine.summed(World(0, 2, torch.device("cpu"), other))
    assert total.confusion.equal(whole.confusion)
    assert total.result() == whole.result()


def test_invalid_scores_or_labels_are_refused():
    with pytest.raises(UserError, match="finite"):
        rank_classes(torch.tensor([[0.0, float("nan")]]))
    with pytest.raises(ValueError, match="for 3 classes"):
        counted(torch.eye(2), [0, 1], classes=3)
    with pytest.raises(ValueError, match="for 2 classes"):
        counted(torch.eye(2), [0, 2])
