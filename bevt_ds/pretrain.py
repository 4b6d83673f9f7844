"""Pretrain BEVT: `deepspeed bevt_ds/pretrain.py --deepspeed_config FILE [recipe=NAME] [key=value ...]`.

This file turns a command line into a configuration; the set-up is in train/pretraining.py. Neither torch nor
deepspeed is imported before the command line has proved right, so that a mistake in it shows at once.
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

from bevt_ds.config.command_line import Arguments, parse_arguments, run, shipped_json  # noqa: E402
from bevt_ds.config.deepspeed import merge, read_json  # noqa: E402
from bevt_ds.config.help import help_text  # noqa: E402
from bevt_ds.config.parse import apply_overrides, parse_overrides  # noqa: E402
from bevt_ds.config.recipes import get_recipe  # noqa: E402
from bevt_ds.config.schema import Config  # noqa: E402
from bevt_ds.config.validate import micro_steps, require_inputs, validate  # noqa: E402


def main(argv: Sequence[str]) -> int:
    """The whole program; returns the exit code."""
    arguments = parse_arguments(argv, default_recipe="demo", default_json=shipped_json("zero2.json"))
    if arguments.wants_help:
        print(help_text(arguments.recipe))
        return 0
    config, values, notes = resolve_config(arguments, world=int(os.environ.get("WORLD_SIZE", "1")))
    if config.dry_run:
        from bevt_ds.train.dry_run import report

        if os.environ.get("RANK", "0") == "0":
            print(report(config, notes, world=int(os.environ.get("WORLD_SIZE", "1"))))
        return 0
    require_inputs(config)
    from bevt_ds.train.pretraining import pretrain

    return pretrain(config, values, notes)


def resolve_config(arguments: Arguments, world: int) -> tuple[Config, dict, list[str]]:
    """Recipe, command line and DeepSpeed JSON as one valid config; the JSON; and what the JSON changed.

    Raises:
        UserError: any mistake that shows without looking at shards or weights.
    """
    overrides = parse_overrides(arguments.overrides)
    config = apply_overrides(get_recipe(arguments.recipe), overrides)
    values = read_json(arguments.deepspeed_config)
    config, notes = merge(config, set(overrides), values, world)
    micro_steps(validate(config), world)
    return config, values, notes


if __name__ == "__main__":
    run(main)
