"""Predictions of an evaluation: averages over views, ranks, the Parquet file, the confusion image."""

from __future__ import annotations

import json

import numpy as np
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from bevt_ds.batch import LabelledBatch
from bevt_ds.errors import UserError
from bevt_ds.eval.confusion import draw_confusion, mistakes, row_shares, shortened
from bevt_ds.eval.predictions import Predictions, predict, write_parquet
from tests.downstream.worlds import on_ranks

CLASSES, VIEWS, VIDEOS = 7, 3, 11


def batch_of(videos: list[int]) -> LabelledBatch:
    """Views whose only pixel names the video and the view; -1 is padding."""
    pixels = torch.tensor([[v * 10.0 + i for i in range(VIEWS)] for v in videos]).view(-1, VIEWS, 1, 1, 1, 1)
    labels = torch.tensor([v % CLASSES if v >= 0 else -1 for v in videos])
    keys = tuple(f"val-0/{v:02d}" if v >= 0 else "" for v in videos)
    return LabelledBatch(pixels, labels, torch.zeros_like(labels), keys, count=len(videos))


def classify(clips: torch.Tensor) -> torch.Tensor:
    seeds = clips.flatten(1)[:, :1]
    return torch.sin(seeds + torch.arange(CLASSES) * 1.7).softmax(-1)


def of_world(world: int, micro: int = 1) -> list[Predictions]:
    """Each rank gets every world-th group of videos, and all equally many batches."""

    def work(ranks):
        groups = [list(range(i, min(i + micro, VIDEOS))) for i in range(0, VIDEOS, micro)]
        groups += [[]] * (-len(groups) % world)
        mine = [group + [-1] * (micro - len(group)) for group in groups[ranks.rank :: world]]
        return predict(classify, map(batch_of, mine), ranks)

    return on_ranks(world, work)


def test_views_are_averaged_as_probabilities():
    result = of_world(1)[0]
    expected = torch.stack([classify(batch_of([v]).pixels[0]).mean(0) for v in range(VIDEOS)])
    assert result.probabilities.equal(expected)
    assert result.labels.tolist() == [v % CLASSES for v in range(VIDEOS)]


@pytest.mark.parametrize(("world", "micro"), [(3, 1), (2, 2), (3, 4)])
def test_predictions_do_not_depend_on_ranks(world, micro):
    alone = of_world(1)[0]
    for result in of_world(world, micro):
        assert result.keys == alone.keys == tuple(f"val-0/{v:02d}" for v in range(VIDEOS))
        assert result.labels.equal(alone.labels)
        assert result.probabilities.equal(alone.probabilities)


def test_nothing_to_evaluate_is_an_error():
    with pytest.raises(UserError, match="no video"):
        on_ranks(1, lambda ranks: predict(classify, [batch_of([-1])], ranks))


def test_parquet_file_of_predictions(tmp_path):
    predictions, names = of_world(1)[0], tuple("abcdefg")
    write_parquet(tmp_path / "p.parquet", predictions, names)
    table = pyarrow.parquet.read_table(tmp_path / "p.parquet")
    assert json.loads(table.schema.metadata[b"classes"]) == list(names)
    rows = table.to_pylist()
    assert [row["key"] for row in rows] == list(predictions.keys)
    for row, probabilities in zip(rows, predictions.probabilities, strict=True):
        assert row["probabilities"] == probabilities.tolist()
        assert row["prediction"] == row["top5"][0] == int(probabilities.argmax())
        assert row["top5"] == sorted(range(CLASSES), key=lambda k: -probabilities[k])[:5]


@pytest.mark.parametrize("classes", [2, 5, 61, 400])
def test_confusion_image(tmp_path, classes):
    rng = np.random.default_rng(classes)
    counts = rng.poisson(0.2, (classes, classes)) + 9 * np.eye(classes, dtype=int)
    counts[1] = 0  # a class that does not occur
    draw_confusion(counts, tuple(f"doing something with object {i}" for i in range(classes)), tmp_path / "c.png")
    width, height = Image.open(tmp_path / "c.png").size
    assert 400 < width < 2500
    assert 300 < height < 2500


def test_confusions_are_ranked_by_share_of_the_label():
    counts = np.array([[90, 10, 0], [0, 1, 1], [0, 0, 0]])
    assert mistakes(counts, 5) == [(1, 2), (0, 1)]
    assert np.isnan(row_shares(counts)[2]).all()


def test_long_class_names_keep_both_ends():
    name = shortened("Pretending to put something behind something")
    assert (name[:10], name[-9:]) == ("Pretending", "something")
    assert len(name) <= 28
