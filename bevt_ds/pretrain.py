"""Pretrain BEVT: `deepspeed bevt_ds/pretrain.py --deepspeed_config FILE [recipe=NAME] [key=value ...]`.

config/command_line.py turns the command line into a configuration; the set-up is in train/pretraining.py. Neither torch
nor deepspeed is imported before the command line has been checked, so that a mistake in it shows at once.
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
from bevt_ds.config.schema import Config
from bevt_ds.data.masks import check_empty_masks

USAGE = """\
usage: deepspeed bevt_ds/pretrain.py [--deepspeed_config FILE] [recipe=NAME] [key=value ...]

Pretrain BEVT: masked image modelling, or joint masked image and video modelling, with discrete visual tokens.
`torchrun bevt_ds/pretrain.py ...` and `python bevt_ds/pretrain.py ...` work as well.

  deepspeed bevt_ds/pretrain.py --deepspeed_config ds_configs/zero2.json
      the demo: draws its own shards and learns from them, minutes on a CPU
  deepspeed bevt_ds/pretrain.py --deepspeed_config ds_configs/zero2.json recipe=image_swin_b \\
      'data.images=in1k-{000000..000127}.tar' tokenizer.weights=encoder.pkl output_dir=runs/stage1
      stage 1, images only
  deepspeed bevt_ds/pretrain.py --deepspeed_config ds_configs/zero2.json recipe=joint_swin_b \\
      'data.videos=k400-{000000..000099}.tar' 'data.images=in1k-{000000..000127}.tar' \\
      tokenizer.weights=encoder.pkl init_from=runs/stage1 output_dir=runs/joint
      stage 2, both streams
"""


def main(argv: Sequence[str]) -> int:
    """The whole program; returns the exit code."""
    return start_training(argv, Config, USAGE, train, report, check_masks, default_recipe="demo")


def check_masks(config: Config) -> list[str]:
    """A note if a good part of the masks would be empty. UserError: most of them would."""
    side = config.data.size // 16
    return check_empty_masks((side, side), config.data.mask)


def train(config: Config, values: dict[str, Any], notes: list[str], given: set[str]) -> int:
    """Draw the demo's shards if they are the run's and absent; import what needs torch, and run."""
    from bevt_ds.shards.synthetic.draw import draw_what_is_read
    from bevt_ds.train.pretraining import pretrain

    draw_what_is_read(config)
    return pretrain(config, values, notes, given)


def report(asked: DryRun[Config]) -> tuple[str, list[str]]:
    """What a dry run prints, and what would stop the run."""
    from bevt_ds.train.dry_run import report_pretraining

    return report_pretraining(asked)


if __name__ == "__main__":
    run(main)
