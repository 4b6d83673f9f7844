"""What the optimizer is given: groups of parameters, and the learning rate of every step.

A group is what torch's optimizers take, plus "lr_scale", the factor on the schedule's rate. Pretraining decays all but
norms and tables at one rate; fine-tuning has rates that shrink from the head to the stem.

The original states fine-tuning's groups as mmcv's custom_keys, of which mmcv applies only the longest that a name
contains (mmcv 1.3.9, DefaultOptimizerConstructor; configs of xyzforever/BEVT@8881b21). Its optimizer therefore does
other than its configuration says: "relative_position_bias_table" is longer than any layer's key, so that the tables run
at the head's rate, and a layer's key is longer than "norm", so that the norms in it are decayed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Sequence
from typing import Any

from torch import nn

from bevt_ds.config.schema import AdamWConfig, FinetuneOptimConfig
from bevt_ds.model.convert import STREAM_PARTS, TABLE

# mmcv's custom_keys of the original's config: a parameter whose name contains one of these is not decayed.
# Biases, the mask token, stems, decoders and the head are decayed, as in the original.
NO_DECAY = ("norm", "relative_position_bias_table", "absolute_pos_embed")
ENCODER = "encoder."
STEM = "encoder.patch_embed."
NORM = "encoder.norm."
LAYER = re.compile(r"encoder\.layers\.(\d+)\.(?:blocks\.(\d+)|downsample)\.")


def learning_rate(step: int, optim: AdamWConfig, steps: int, warmup: float, steps_an_epoch: int = 1) -> float:
    """The rate of update number `step` (from 0): cosine to 0 over all `steps`, times a linear warm-up.

    mmcv's CosineAnnealing with linear warm-up by iteration: the cosine stays the same for an epoch, or follows every
    step where `steps_an_epoch` is 1; in the first `warmup` steps it is multiplied by a factor that goes from
    `warmup_ratio` to 1.
    """
    begun = step // steps_an_epoch * steps_an_epoch
    cosine = 0.5 * optim.lr * (1 + math.cos(math.pi * begun / steps))
    if step >= warmup:
        return cosine
    return cosine * (1 - (1 - step / warmup) * (1 - optim.warmup_ratio))


def freeze_unused(model: nn.Module, streams: Collection[str]) -> None:
    """Take the stem and decoder of a stream that is not among `streams` out of the training: they stay as they are.

    Left to the optimizer they would get gradients of zero, and AdamW would shrink them step by step.
    """
    unused = tuple(part for stream, parts in STREAM_PARTS.items() if stream not in streams for part in parts)
    for name, parameter in model.named_parameters():
        if name.startswith(unused):
            parameter.requires_grad_(False)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW groups of pretraining: decayed parameters, and the others (weight decay 0)."""
    return _grouped(model, lambda name: (1.0, 0.0 if any(word in name for word in NO_DECAY) else weight_decay))


def layer_decay_groups(model: nn.Module, depths: Sequence[int], optim: FinetuneOptimConfig) -> list[dict[str, Any]]:
    """AdamW groups of a VideoClassifier whose stages have `depths` blocks."""
    return _grouped(model, lambda name: scale_and_decay(name, depths, optim))


def _grouped(model: nn.Module, rule: Callable[[str], tuple[float, float]]) -> list[dict[str, Any]]:
    """A group for each pair of rate's factor and decay that `rule` gives; every trainable parameter is in one."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault(rule(name), []).append(parameter)
    return [
        {"params": parameters, "lr_scale": scale, "weight_decay": decay}
        for (scale, decay), parameters in groups.items()
    ]


def scale_and_decay(name: str, depths: Sequence[int], optim: FinetuneOptimConfig) -> tuple[float, float]:
    """The factor on the learning rate, and the weight decay, of a VideoClassifier's parameter."""
    scale = optim.layer_decay ** level(name, depths)
    if name.startswith(ENCODER):
        scale *= optim.backbone_scale
    table, norm = name.endswith(TABLE), "norm" in name
    decayed = not (table or norm)
    if optim.groups == "official":
        scale = 1.0 if table else scale
        decayed |= norm and _layer_key_wins(name, optim)
    return scale, optim.weight_decay if decayed else 0.0


def level(name: str, depths: Sequence[int]) -> int:
    """Layers between a parameter and the head, the head's own being 0: the exponent of layer_decay.

    The last norm and the last block are 1; every other block and merging has a level of its own, the stem the deepest.
    """
    if name.startswith(NORM):
        return 1
    if name.startswith(STEM):
        return sum(depths) + len(depths)  # one fewer merging than stages, and the stem itself
    if found := LAYER.match(name):
        stage, block = int(found[1]), found[2]
        above = sum(depth + 1 for depth in depths[stage + 1 :])  # later stages, each with the merging before it
        return 1 + above + (depths[stage] - 1 - int(block) if block else -1)
    return 0


def _layer_key_wins(name: str, optim: FinetuneOptimConfig) -> bool:
    """Whether the original's configuration has a key for the layer of a norm, which then is decayed.

    With layer decay every layer has its key, and the one of the last norm says "no decay"; the recipes that scale the
    whole backbone have a single key for all of it.
    """
    if optim.layer_decay != 1:
        return name.startswith(ENCODER) and not name.startswith(NORM)
    return optim.backbone_scale != 1 and name.startswith(ENCODER)
