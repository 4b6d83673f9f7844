"""Train a tokenizer: `deepspeed bevt_ds/train_tokenizer.py recipe=NAME data.images=SHARDS [key=value ...]`.

config/command_line.py turns the command line into a configuration; the set-up is in train/tokenizing.py. Neither torch
nor deepspeed is imported before the command line has been checked.
"""

from __future__ import annotations

import sys

try:
    from bevt_ds.config.command_line import require_own_package
except ImportError as error:
    sys.exit(f"error: {error}. Run `pip install -e .` in the checkout with {sys.executable}, or `make env`.")
require_own_package(__file__)

from collections.abc import Sequence
from typing import Any

from bevt_ds.config.command_line import DryRun, run, start_training
from bevt_ds.config.tokenizing import TokenizerTrainingConfig

USAGE = """\
usage: deepspeed bevt_ds/train_tokenizer.py [--deepspeed_config FILE] recipe=NAME [key=value ...]

Train a tokenizer: frames to ids and back, judged by a frozen network of timm's as well as by pixels.
`torchrun bevt_ds/train_tokenizer.py ...` and `python bevt_ds/train_tokenizer.py ...` work as well.

  deepspeed bevt_ds/train_tokenizer.py recipe=vq_demo output_dir=runs/vq
      draws its own images and learns from them, minutes on a CPU
  deepspeed bevt_ds/pretrain.py recipe=demo tokenizer.name=vq tokenizer.weights=runs/vq
      pretrains with what it has learned
  deepspeed bevt_ds/train_tokenizer.py recipe=vq_in1k 'data.images=in1k-{000000..000127}.tar' \\
      perceptual.network=vgg16 perceptual.weights=vgg16.safetensors
      8192 ids on a 14x14 grid, as BEVT's
"""


def main(argv: Sequence[str]) -> int:
    """The whole program; returns the exit code."""
    return start_training(argv, TokenizerTrainingConfig, USAGE, train, report, shown_recipe="vq_in1k")


def train(config: TokenizerTrainingConfig, values: dict[str, Any], notes: list[str], given: set[str]) -> int:
    """Draw the demo's shards if they are the run's and absent; import what needs torch, and run."""
    from bevt_ds.shards.synthetic.draw import draw_what_is_read
    from bevt_ds.train.tokenizing import train_tokenizer

    draw_what_is_read(config)
    return train_tokenizer(config, values, notes, given)


def report(asked: DryRun[TokenizerTrainingConfig]) -> tuple[str, list[str]]:
    """What a dry run prints, and what would stop the run."""
    from bevt_ds.train.dry_run import report_tokenizing

    return report_tokenizing(asked)


if __name__ == "__main__":
    run(main)
