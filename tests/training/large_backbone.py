"""Two ZeRO-3 steps of a large backbone at full depth and four channels a head: `python -m ... large_backbone NAME`.

The recipe's own network options and engine, on small frames of noise. Rank 0 prints one JSON line last.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.step_batch import resident_batch
from bevt_ds.config.deepspeed import read_json
from bevt_ds.config.recipes import PRETRAINING
from bevt_ds.config.schema import Config
from bevt_ds.config.targets import TokenizerConfig
from bevt_ds.config.validate import validate
from bevt_ds.model.presets import SIZES
from bevt_ds.runtime.background import Commits
from bevt_ds.runtime.engine_setup import start_ranks
from bevt_ds.runtime.logging import step_metrics
from bevt_ds.train.loop import train_step
from bevt_ds.train.pretraining import Pretraining, make_engine
from bevt_ds.train.targets import open_targets
from bevt_ds.train.task import Setup

STEPS = 2


def small(name: str, world: int) -> Config:
    """The recipe of a backbone with small frames and batch; the rate that a warm-up of no steps gives at once."""
    base = PRETRAINING[f"joint_{name}"]()
    mask = replace(base.data.mask, ratio=0.4, min_block=2)
    data = replace(base.data, size=64, token_size=32, frames=4, short_side=(64, 80), mask=mask)
    sizes = {"micro_clips": 1, "micro_images": 2, "global_clips": world, "global_images": 2 * world}
    train = replace(base.train, precision="fp32", steps=STEPS, **sizes)
    return replace(
        base,
        model=replace(base.model, window=(2, 2, 2)),
        data=data,
        train=train,
        tokenizer=TokenizerConfig(name="random_projection", vocab_size=64),
        optim=replace(base.optim, lr=1e-3, warmup_steps=0),
    )


def main() -> None:
    """Train, and say what became of the model."""
    name = sys.argv[1]
    SIZES[name] = replace(SIZES[name], embed_dim=4 * SIZES[name].num_heads[0])
    ranks = start_ranks()
    config = validate(small(name, ranks.world))
    setup = Setup(config, read_json("zero3"), Path(), ranks, Commits(ranks))
    targets = open_targets(config, ranks.device, torch.float32)
    task = Pretraining(setup, None, make_engine(config, setup, targets.head, STEPS), STEPS, 0.0, targets, probe=None)
    data, module = config.data, task.engine.module
    batch = resident_batch(1, 2, data.frames, data.size, ranks.rank, data.mask).to(ranks.device)
    held = {key: p.ds_tensor.detach().clone() for key, p in module.named_parameters()}
    losses = [step_metrics(train_step(task, iter([batch]), step).totals(ranks))["loss"] for step in range(STEPS)]
    moved = [float((p.ds_tensor - held[key]).abs().sum()) > 0 for key, p in module.named_parameters()]
    result = {
        "losses": losses,
        "blocks": [len(layer.blocks) for layer in module.encoder.layers],
        "checkpointing": module.encoder.checkpointing,
        "norm": SIZES[name].norm,
        "parameters": sum(p.ds_numel for p in module.parameters()),
        "held": sum(p.ds_tensor.numel() for p in module.parameters()),
        "released": all(p.numel() == 0 for p in module.parameters() if not p.ds_persist),
        "moved": sum(moved) / len(moved),
    }
    if ranks.is_main:
        print(json.dumps(result), flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
