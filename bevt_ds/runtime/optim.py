"""Parameter groups and the learning-rate schedule of BEVT's pretraining.

A group is what torch's optimizers take, plus "lr_scale": the factor on the schedule's rate, 1 where it is absent.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

from torch import nn

from bevt_ds.config.schema import OptimConfig
from bevt_ds.model.convert import STREAM_PARTS

# mmcv's custom_keys of the original's config: a parameter whose name contains one of these is not decayed.
# Biases, the mask token, stems, decoders and the head are decayed, as in the original.
NO_DECAY = ("norm", "relative_position_bias_table", "absolute_pos_embed")


def freeze_unused(model: nn.Module, streams: Collection[str]) -> None:
    """Take the stem and decoder of a stream that is not among `streams` out of the training: they stay as they are.

    Left to the optimizer they would get gradients of zero, and AdamW would shrink them step by step.
    """
    unused = tuple(part for stream, parts in STREAM_PARTS.items() if stream not in streams for part in parts)
    for name, parameter in model.named_parameters():
        if name.startswith(unused):
            parameter.requires_grad_(False)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two AdamW groups: decayed parameters, then the others (wd 0). Every trainable parameter is in exactly one."""
    decayed, plain = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (plain if any(word in name for word in NO_DECAY) else decayed).append(parameter)
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]


def learning_rate(step: int, optim: OptimConfig, steps: int) -> float:
    """The rate of update number `step` (from 0): cosine to 0 over all steps, times a linear warm-up.

    mmcv's CosineAnnealing by iteration with linear warm-up: during warm-up the running cosine value is multiplied
    by a factor that goes from `warmup_ratio` to 1.
    """
    cosine = 0.5 * optim.lr * (1 + math.cos(math.pi * step / steps))
    if step >= optim.warmup_steps:
        return cosine
    return cosine * (1 - (1 - step / optim.warmup_steps) * (1 - optim.warmup_ratio))
