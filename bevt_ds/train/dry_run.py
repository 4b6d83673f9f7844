"""`dry_run=true`: what a run would be, without shards, weights or a device."""

from __future__ import annotations

import json
from dataclasses import asdict

import torch

from bevt_ds.config.parse import to_dict
from bevt_ds.config.schema import Config
from bevt_ds.config.validate import micro_steps, require_inputs
from bevt_ds.errors import UserError
from bevt_ds.model.presets import create_model
from bevt_ds.runtime.flops import Sizes
from bevt_ds.runtime.logging import expected_step_flops

DALLE_VOCABULARY = 8192


def report(config: Config, notes: list[str], world: int) -> str:
    """The resolved config as JSON, then parameters, steps and arithmetic, and what is still missing."""
    vocabulary = DALLE_VOCABULARY if config.tokenizer.name == "dalle" else config.tokenizer.vocab_size
    options = asdict(config.model)
    with torch.device("meta"):
        model = create_model(options.pop("name"), vocab_size=vocabulary, **options)
    sizes = Sizes.of(model.arch)
    train = config.train
    lines = [
        json.dumps(to_dict(config), indent=1),
        *notes,
        f"parameters     {sum(p.numel() for p in model.parameters()):,}",
        f"steps          {train.steps:,} of {train.global_clips} clips + {train.global_images} images",
        f"on {world} rank{'s' if world > 1 else ' '}      {micro_steps(config, world)} forward passes a step of"
        f" {train.micro_clips} clips + {train.micro_images} images",
        f"arithmetic     {expected_step_flops(config, sizes) / 1e12:,.2f} TFLOP a step"
        " (masked head, no recompute, no tokenizer)",
    ]
    return "\n".join([*lines, *_missing(config)])


def _missing(config: Config) -> list[str]:
    try:
        require_inputs(config)
    except UserError as error:
        return [f"not yet there  {error}"]
    return []
