"""What pretraining predicts: ids of a tokenizer, or features of a frozen network; and what is measured of each.

`open_targets` makes the one that a configuration names. All else of a run is the same for both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from bevt_ds.batch import Batch
from bevt_ds.config.schema import Config
from bevt_ds.eval import feature_targets
from bevt_ds.eval.held_out import Summary, evaluate
from bevt_ds.eval.visualize import draw, draw_features
from bevt_ds.model.teacher import SwinTeacher, Teacher, with_features
from bevt_ds.model.tokenizers import Tokenizer, require_vocabulary, tokenize
from bevt_ds.model.video_swin import compile_blocks
from bevt_ds.runtime.engine import Engine
from bevt_ds.runtime.logging import require_known_targets
from bevt_ds.runtime.tokenizer import file_of, open_teacher, open_tokenizer


class Targets(Protocol):
    """What a run's targets are made with, on its device.

    head: arguments of BEVT for the head that predicts them. vocabulary: how many ids there are; 0: they are none.
    files: of the weights of what makes them, by what that is; "": it has none.
    """

    head: Mapping[str, int]
    vocabulary: int
    files: Mapping[str, str]

    def fill(self, batch: Batch) -> Batch:
        """The batch, on the device, with its targets. Collective."""
        ...

    def require(self, sums: Mapping[str, Any], where: str) -> None:
        """UserError: targets that the head cannot predict are among a step's sums."""
        ...

    def require_head(self, arch: Mapping[str, Any]) -> None:
        """UserError: the model's head, by its `arch`, is for others."""
        ...

    def draw(self, engine: Engine, batch: Batch, path: Path) -> None:
        """Write what the network predicts for the first samples of a filled batch. Collective."""
        ...

    def evaluate(self, engine: Engine, batches: Sequence[Batch]) -> Mapping[str, Summary]:
        """By stream, the loss on held-out micro-batches next to one without looking. Collective; see held_out.py."""
        ...

    def describe(self) -> str:
        """A line for the run's start, or nothing."""
        ...


class IdTargets:
    """Ids of a tokenizer. See Targets."""

    def __init__(self, tokenizer: Tokenizer, file: str = ""):
        """tokenizer: on the run's device. file: of its weights; "": it has none."""
        self.tokenizer, self.vocabulary = tokenizer, tokenizer.vocab_size
        self.encoder: Tokenizer = tokenizer  # what training encodes with
        self.after_fill: Callable[[], None] = lambda: None  # what that has to do after each micro-batch, on all ranks
        self.head, self.files = {"vocab_size": self.vocabulary}, {"tokenizer": file}

    def fill(self, batch: Batch) -> Batch:
        filled = tokenize(self.encoder, batch)
        self.after_fill()
        return filled

    def require(self, sums: Mapping[str, Any], where: str) -> None:
        require_known_targets(sums, self.vocabulary, where)

    def require_head(self, arch: Mapping[str, Any]) -> None:
        require_vocabulary(self.tokenizer, arch["vocab_size"])

    def draw(self, engine: Engine, batch: Batch, path: Path) -> None:
        draw(engine, batch, path, self.tokenizer)

    def evaluate(self, engine: Engine, batches: Sequence[Batch]) -> Mapping[str, Summary]:
        return evaluate(engine, self.tokenizer, batches)

    def describe(self) -> str:
        return ""


class FeatureTargets:
    """Features of a frozen network. See Targets."""

    vocabulary = 0

    def __init__(self, config: Config, device: torch.device, dtype: torch.dtype):
        self.teacher: Teacher = open_teacher(config).to(device, dtype)
        if config.model.compile and isinstance(self.teacher, SwinTeacher):
            compile_blocks(self.teacher)
        self.head, self.files = {"target_dim": self.teacher.dim}, {"teacher": file_of(config.teacher)}

    def fill(self, batch: Batch) -> Batch:
        return with_features(self.teacher, batch)

    def require(self, sums: Mapping[str, Any], where: str) -> None:
        """Nothing to find: every vector can be predicted."""

    def require_head(self, arch: Mapping[str, Any]) -> None:
        """Nothing to find: the head is made for the teacher."""

    def draw(self, engine: Engine, batch: Batch, path: Path) -> None:
        draw_features(engine, batch, path)

    def evaluate(self, engine: Engine, batches: Sequence[Batch]) -> Mapping[str, Summary]:
        return feature_targets.evaluate(engine, self.fill, batches)

    def describe(self) -> str:
        return f"targets: {self.teacher.dim} features of {self.teacher.describe()}"


def open_targets(config: Config, device: torch.device, dtype: torch.dtype) -> Targets:
    """The targets of a run, on its device; a teacher computes in `dtype`. UserError: see what they are made with."""
    return FeatureTargets(config, device, dtype) if config.target == "features" else _open_ids(config, device)


def _open_ids(config: Config, device: torch.device) -> IdTargets:
    tokenizer = open_tokenizer(config.tokenizer, device)
    if hasattr(tokenizer, "kernels"):
        tokenizer.kernels = config.model.kernels
    if config.model.compile and isinstance(tokenizer, nn.Module):
        tokenizer.compile()
    return IdTargets(tokenizer, file_of(config.tokenizer))
