"""Fine-tune a classifier: `deepspeed bevt_ds/finetune.py recipe=NAME data.train=SHARDS [key=value ...]`.

This file turns a command line into a configuration; the set-up is in train/finetuning.py. Neither torch nor
deepspeed is imported before the command line has proved right.
"""

from __future__ import annotations

import sys

try:
    from bevt_ds.config.command_line import require_own_package
except ImportError as error:
    sys.exit(f"error: {error}. Run `pip install -e .` in the checkout with {sys.executable}, or `make env`.")
require_own_package(__file__)

import os  # noqa: E402
from collections.abc import Sequence  # noqa: E402
from typing import Any  # noqa: E402

from bevt_ds.config.command_line import Arguments, parse_arguments, run, shipped_json  # noqa: E402
from bevt_ds.config.deepspeed import merge, read_json  # noqa: E402
from bevt_ds.config.help import page  # noqa: E402
from bevt_ds.config.parse import apply_overrides, parse_overrides  # noqa: E402
from bevt_ds.config.recipes_downstream import RECIPES, get_recipe  # noqa: E402
from bevt_ds.config.schema_downstream import FinetuneConfig  # noqa: E402
from bevt_ds.config.validate import micro_steps  # noqa: E402
from bevt_ds.config.validate_downstream import require_inputs, validate  # noqa: E402

USAGE = """\
usage: deepspeed bevt_ds/finetune.py [--deepspeed_config FILE] recipe=NAME data.train=SHARDS [key=value ...]

Fine-tune a classifier of clips on labelled shards, from pretrained weights or from scratch, and validate it as it goes.
`torchrun bevt_ds/finetune.py ...` and `python bevt_ds/finetune.py ...` work as well.

  deepspeed bevt_ds/finetune.py --deepspeed_config ds_configs/zero2.json recipe=finetune_k400 \\
      'data.train=k400-train-{000000..000099}.tar' 'data.val=k400-val-*.tar' init_from=runs/joint
  deepspeed bevt_ds/finetune.py --deepspeed_config ds_configs/zero2.json recipe=finetune_ssv2 \\
      'data.train=ssv2-train-*.tar' 'data.val=ssv2-val-*.tar' init_from=swin_base_image_stream_pretrain.pth

  --deepspeed_config FILE   engine knobs (default: ZeRO-2 as ds_configs/zero2.json); "auto" is filled in from the recipe
  --help                    this text; with recipe=NAME the defaults shown are that recipe's
"""


def main(argv: Sequence[str]) -> int:
    """The whole program; returns the exit code."""
    arguments = parse_arguments(argv, default_recipe="", default_json=shipped_json("zero2.json"))
    if arguments.wants_help:
        print(page(USAGE, RECIPES, get_recipe(arguments.recipe or "finetune_k400")))
        return 0
    world = int(os.environ.get("WORLD_SIZE", "1"))
    config, values, notes = resolve_config(arguments, world)
    if config.dry_run:
        from bevt_ds.train.dry_run_downstream import report

        if os.environ.get("RANK", "0") == "0":
            print(report(config, notes, world))
        return 0
    require_inputs(config)
    from bevt_ds.train.finetuning import finetune

    return finetune(config, values, notes)


def resolve_config(arguments: Arguments, world: int) -> tuple[FinetuneConfig, dict[str, Any], list[str]]:
    """Recipe, command line and DeepSpeed JSON as one valid config; the JSON; and what the JSON changed.

    Raises:
        UserError: any mistake that shows without looking at shards or weights.
    """
    overrides = parse_overrides(arguments.overrides, FinetuneConfig)
    config = apply_overrides(get_recipe(arguments.recipe), overrides)
    values = read_json(arguments.deepspeed_config)
    config, notes = merge(config, set(overrides), values, world)
    micro_steps(validate(config, values), world)
    return config, values, notes


if __name__ == "__main__":
    run(main)
