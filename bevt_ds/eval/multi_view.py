"""Test a fine-tuned classifier on several views of every video: `bevt_ds/evaluate.py` without its command line."""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext, redirect_stdout

import torch
from torch import Tensor

from bevt_ds.batch import DTYPES
from bevt_ds.config.parse import to_dict
from bevt_ds.config.samples import LabelledDataConfig
from bevt_ds.config.schema import EvaluateConfig
from bevt_ds.data.labels import Classes, expected_count, read_classes
from bevt_ds.data.reading.members import Shard
from bevt_ds.errors import UserError
from bevt_ds.eval.predictions import Classify, predict
from bevt_ds.eval.results import as_lines, claim_folder, without_classifier, write_results
from bevt_ds.eval.videos import each_video, shards_of
from bevt_ds.folders import weights_of
from bevt_ds.kernels import resolve
from bevt_ds.model.classifier import VideoClassifier
from bevt_ds.model.weights import read_weights
from bevt_ds.runtime.distributed import Ranks
from bevt_ds.runtime.joining import joined_to_measure


def evaluate(config: EvaluateConfig) -> int:
    """Test, write and print; returns the exit code."""
    with joined_to_measure() as ranks:
        model = load_classifier(config, ranks)
        shards = shards_of(config.data.val, config.data)
        classes = classes_of(model, config.data, shards)
        folder = claim_folder(config.output_dir, config.weights, "eval", ranks)
        batches = each_video(config.data, config.views, shards, classes, folder, ranks)
        predictions = predict(probabilities_of(model, DTYPES[config.precision]), batches, ranks)
        if ranks.is_main:
            expected = expected_count(shards, config.data.expected_val)
            values = write_results(folder, predictions, classes.names, expected, {"config": to_dict(config)})
            print(as_lines(values, folder), flush=True)
        return 0


def load_classifier(config: EvaluateConfig, ranks: Ranks) -> VideoClassifier:
    """The classifier that `config.weights` names, in evaluation mode on this rank's device.

    Raises:
        UserError: no such weights, or weights without a classifier; a precision or kernels that the device cannot do.
    """
    path = weights_of(config.weights, "weights")
    if "num_classes" not in read_weights(path).arch:
        raise without_classifier(config.weights)
    check_device(config.precision, config.kernels, ranks)
    with printing_once(ranks):
        model = VideoClassifier.from_pretrained(path, kernels=config.kernels)
    return model.to(ranks.device, DTYPES[config.precision]).eval()


def probabilities_of(model: VideoClassifier, dtype: torch.dtype) -> Classify:
    """Clips (B,3,T,H,W) of any float type -> probabilities float32 (B,K)."""

    def classify(clips: Tensor) -> Tensor:
        return model(clips.to(dtype)).float().softmax(-1)

    return classify


def classes_of(model: VideoClassifier, data: LabelledDataConfig, shards: Sequence[Shard]) -> Classes:
    """The classes of a classifier, after every label of `shards` has been checked against them.

    Their names are those of data.classes, or those saved with the weights, or their numbers.

    Raises:
        UserError: data.classes has other classes than the weights, or a label is none of them.
    """
    number, saved = model.arch["num_classes"], tuple(model.arch["classes"])
    names, found = saved or tuple(map(str, range(number))), read_classes([], shards, data.classes)
    if data.classes:
        names = found.names
        if len(names) != number:
            raise UserError(
                f"data.classes={data.classes} names {len(names)} classes, the classifier has {number}: leave it out."
            )
        other = [pair for pair in zip(names, saved, strict=False) if pair[0] != pair[1]]
        if other and not all(name.isdecimal() for name in saved):
            raise UserError(f"data.classes={data.classes} has {other[0][0]!r} where the weights have {other[0][1]!r}.")
    classes = Classes(names)
    for shard in shards:
        classes.labels(shard)
    return classes


def check_device(precision: str, kernels: str, ranks: Ranks) -> None:
    """Refuse what this device cannot do.

    Raises:
        UserError: fp16 on a CPU, or Triton's kernels where they cannot run.
    """
    if precision == "fp16" and ranks.device.type == "cpu":
        raise UserError("precision=fp16 needs a GPU: use bf16 or fp32.")
    try:
        resolve(kernels, ranks.device)
    except RuntimeError as error:
        raise UserError(str(error)) from error


def printing_once(ranks: Ranks) -> AbstractContextManager:
    """What is printed inside the block appears once, not on every rank."""
    return nullcontext() if ranks.is_main else redirect_stdout(io.StringIO())
