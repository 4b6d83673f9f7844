"""`dry_run=true` of fine-tuning: what a run would be, without shards, weights or a device."""

from __future__ import annotations

import json
from dataclasses import asdict

import torch

from bevt_ds.config.parse import to_dict
from bevt_ds.config.schema_downstream import FinetuneConfig
from bevt_ds.config.validate import micro_steps
from bevt_ds.config.validate_downstream import require_inputs
from bevt_ds.data.labelled_loader import check_labelled
from bevt_ds.errors import UserError
from bevt_ds.model.presets import create_model
from bevt_ds.runtime.flops import Sizes, backbone_macs, training_flops


def report(config: FinetuneConfig, notes: list[str], world: int) -> str:
    """The resolved config as JSON, then parameters, steps and arithmetic, and what is still missing."""
    check_labelled(config.data)
    data, train = config.data, config.train
    options = asdict(config.model)
    del options["dropout"]
    with torch.device("meta"):
        encoder = create_model(f"video_{options.pop('name')}", **options)
    sizes = Sizes.of(encoder.arch)
    flops = training_flops(train.global_clips * backbone_macs(sizes, (data.frames, data.size, data.size)))
    length = (
        f"{train.steps:,}" if train.steps else f"{train.epochs} epochs of (training videos // {train.global_clips})"
    )
    lines = [
        json.dumps(to_dict(config), indent=1),
        *notes,
        f"parameters     {sum(p.numel() for p in encoder.parameters()):,} + {sizes.width + 1:,} for each class",
        f"steps          {length}, each of {train.global_clips} clips",
        f"on {world} rank{'s' if world > 1 else ' '}      {micro_steps(config, world)} forward passes a step of"
        f" {train.micro_clips} clips",
        f"arithmetic     {flops / 1e12:,.2f} TFLOP a step (no recompute)",
    ]
    return "\n".join([*lines, *_missing(config)])


def _missing(config: FinetuneConfig) -> list[str]:
    try:
        require_inputs(config)
    except UserError as error:
        return [f"not yet there  {error}"]
    return [] if config.data.val else ["not yet there  data.val is empty: nothing would be validated"]
