"""What a classifier says of every video of a split, whichever rank saw it; and its file for other programs.

Letters: N videos, B videos of a batch, V views of a video, K classes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import torch
from torch import Tensor

from bevt_ds.batch import LabelledBatch
from bevt_ds.errors import UserError
from bevt_ds.eval.metrics import TOP, rank_classes
from bevt_ds.runtime.distributed import Ranks

Classify = Callable[[Tensor], Tensor]  # clips (B*V,3,T,H,W) -> probabilities (B*V,K)


@dataclass(frozen=True)
class Predictions:
    """Probabilities by video, sorted by key: the same however the videos were spread over ranks."""

    keys: tuple[str, ...]  # "shard name/key"
    labels: Tensor  # int64 (N,)
    probabilities: Tensor  # float32 (N,K), the mean over views


def predict(classify: Classify, batches: Iterable[LabelledBatch], ranks: Ranks) -> Predictions:
    """Classify every video of all ranks' test batches; padding is left out. Collective, as many batches on each rank.

    The probabilities of a video's views are averaged, as the original's test does (average_clips="prob").

    Raises:
        UserError: no video at all.
    """
    seen: list[tuple[str, int, np.ndarray]] = []
    with torch.no_grad():
        for batch in batches:
            views = batch.pixels.shape[1]
            probabilities = classify(batch.pixels.flatten(0, 1)).float()
            means = probabilities.unflatten(0, (-1, views)).mean(1).cpu().numpy()
            rows = zip(batch.keys, batch.labels.tolist(), means, strict=True)
            seen += [row for row in rows if row[1] >= 0]
    everything = sorted((row for part in ranks.gather(seen) for row in part), key=lambda row: row[:2])
    if not everything:
        raise UserError("no video could be evaluated: bad_samples.jsonl says why, or the shards hold none.")
    keys, labels, probabilities = zip(*everything, strict=True)
    return Predictions(keys, torch.tensor(labels, dtype=torch.int64), torch.from_numpy(np.stack(probabilities)))


def write_parquet(path: Path, predictions: Predictions, names: tuple[str, ...]) -> None:
    """A row a video: key, label, prediction, top5 (best first), probabilities; class names in the schema's metadata.

    `names` (K,) are also what `label` and `prediction` are numbers of.
    """
    order = rank_classes(predictions.probabilities)
    table = pa.table(
        {
            "key": pa.array(predictions.keys, pa.string()),
            "label": pa.array(predictions.labels.numpy(), pa.int32()),
            "prediction": pa.array(order[:, 0].numpy(), pa.int32()),
            "top5": _lists(order[:, :TOP], pa.int32()),
            "probabilities": _lists(predictions.probabilities, pa.float32()),
        }
    )
    pa.parquet.write_table(table.replace_schema_metadata({"classes": json.dumps(names)}), path)


def _lists(rows: Tensor, kind: pa.DataType) -> pa.Array:
    """(N,M) as N lists of M."""
    return pa.FixedSizeListArray.from_arrays(pa.array(rows.numpy().ravel(), kind), rows.shape[1])
