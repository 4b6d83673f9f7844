"""`dry_run=true`: what a run would be, without shards, weights or a device."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

import torch
from torch import nn

from bevt_ds.config.parse import to_dict
from bevt_ds.config.schema import Config, FinetuneConfig, TrainingConfig
from bevt_ds.config.validate import micro_steps, require_inputs
from bevt_ds.errors import UserError
from bevt_ds.model.arch import SwinArch
from bevt_ds.model.presets import create_model
from bevt_ds.runtime.flops import backbone_macs, training_flops
from bevt_ds.runtime.logging import expected_step_flops

DALLE_VOCABULARY = 8192


def report_pretraining(config: Config, notes: Sequence[str], world: int) -> str:
    """The resolved config as JSON, then parameters, steps and arithmetic, and what is still missing."""
    train = config.train
    vocabulary = DALLE_VOCABULARY if config.tokenizer.name == "dalle" else config.tokenizer.vocab_size
    options = asdict(config.model)
    with torch.device("meta"):
        model = create_model(options.pop("name"), vocab_size=vocabulary, **options)
    return _report(
        config,
        notes,
        world,
        parameters=f"{_parameters(model):,}",
        steps=f"{train.steps:,} of {train.global_clips} clips + {train.global_images} images",
        micro=f"{train.micro_clips} clips + {train.micro_images} images",
        flops=expected_step_flops(config, model.arch),
        flops_of="masked head, no recompute, no tokenizer",
    )


def report_finetuning(config: FinetuneConfig, notes: Sequence[str], world: int) -> str:
    """The same for fine-tuning, whose head has as many classes as the shards, which are not read."""
    data, train = config.data, config.train
    options = asdict(config.model)
    del options["dropout"]
    with torch.device("meta"):
        encoder = create_model(f"video_{options.pop('name')}", **options)
    arch = SwinArch.of(encoder.arch)
    epochs = f"{train.epochs} epochs of (training videos // {train.global_clips})"
    return _report(
        config,
        notes,
        world,
        parameters=f"{_parameters(encoder):,} + {arch.width + 1:,} for each class",
        steps=f"{f'{train.steps:,}' if train.steps else epochs}, each of {train.global_clips} clips",
        micro=f"{train.micro_clips} clips",
        flops=training_flops(train.global_clips * backbone_macs(arch, (data.frames, data.size, data.size))),
        flops_of="no recompute",
    )


def _report(
    config: TrainingConfig,
    notes: Sequence[str],
    world: int,
    *,
    parameters: str,
    steps: str,
    micro: str,
    flops: float,
    flops_of: str,
) -> str:
    lines = [
        json.dumps(to_dict(config), indent=1),
        *notes,
        f"parameters     {parameters}",
        f"steps          {steps}",
        f"{f'on {world} rank' + 's' * (world > 1):<15}{micro_steps(config, world)} forward passes a step of {micro}",
        f"arithmetic     {flops / 1e12:,.2f} TFLOP a step ({flops_of})",
    ]
    return "\n".join([*lines, *_missing(config)])


def _parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _missing(config: TrainingConfig) -> list[str]:
    try:
        require_inputs(config)
    except UserError as error:
        return [f"not yet there  {error}"]
    if isinstance(config, FinetuneConfig) and not config.data.val:
        return ["not yet there  data.val is empty: nothing would be validated"]
    return []
