"""Fine-tune a classifier: `deepspeed bevt_ds/finetune.py recipe=NAME data.train=SHARDS [key=value ...]`.

config/command_line.py turns the command line into a configuration; the set-up is in train/finetuning.py. Neither torch
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
from bevt_ds.config.schema import FinetuneConfig

USAGE = """\
usage: deepspeed bevt_ds/finetune.py [--deepspeed_config FILE] recipe=NAME data.train=SHARDS [key=value ...]

Fine-tune a classifier of clips on labelled shards, from pretrained weights or from scratch, and validate it as it goes.
`torchrun bevt_ds/finetune.py ...` and `python bevt_ds/finetune.py ...` work as well.

  deepspeed bevt_ds/finetune.py --deepspeed_config ds_configs/zero2.json recipe=finetune_k400 \\
      'data.train=k400-train-{000000..000099}.tar' 'data.val=k400-val-*.tar' init_from=runs/joint
  deepspeed bevt_ds/finetune.py --deepspeed_config ds_configs/zero2.json recipe=finetune_ssv2 \\
      'data.train=ssv2-train-*.tar' 'data.val=ssv2-val-*.tar' init_from=swin_base_image_stream_pretrain.pth
"""


def main(argv: Sequence[str]) -> int:
    """The whole program; returns the exit code."""
    return start_training(argv, FinetuneConfig, USAGE, train, report, shown_recipe="finetune_k400")


def train(config: FinetuneConfig, values: dict[str, Any], notes: list[str], given: set[str]) -> int:
    """Import what needs torch, and run."""
    from bevt_ds.train.finetuning import finetune

    return finetune(config, values, notes, given)


def report(asked: DryRun[FinetuneConfig]) -> tuple[str, list[str]]:
    """What a dry run prints, and what would stop the run."""
    from bevt_ds.train.dry_run import report_finetuning

    return report_finetuning(asked)


if __name__ == "__main__":
    run(main)
