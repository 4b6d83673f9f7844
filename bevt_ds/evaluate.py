"""Test a classifier: `deepspeed bevt_ds/evaluate.py weights=RUN_OR_WEIGHTS [data.val=...] [key=value ...]`.

This file turns a command line into a configuration; the work is in eval/multi_view.py.
"""

from __future__ import annotations

import sys

try:
    from bevt_ds.config.command_line import require_own_package
except ImportError as error:
    sys.exit(f"error: {error}. Run `pip install -e .` in the checkout with {sys.executable}, or `make env`.")
require_own_package(__file__)

from collections.abc import Sequence  # noqa: E402
from pathlib import Path  # noqa: E402

from bevt_ds.config.command_line import parse_arguments, run  # noqa: E402
from bevt_ds.config.help import page  # noqa: E402
from bevt_ds.config.parse import apply_overrides, parse_overrides  # noqa: E402
from bevt_ds.config.recipes_downstream import RECIPES, get_recipe  # noqa: E402
from bevt_ds.config.schema import Config  # noqa: E402
from bevt_ds.config.schema_downstream import EvaluateConfig  # noqa: E402
from bevt_ds.config.validate import check_bounds, need  # noqa: E402
from bevt_ds.config.validate_downstream import AT_LEAST_ONE, POSITIVE  # noqa: E402

USAGE = """\
usage: deepspeed bevt_ds/evaluate.py weights=RUN_OR_WEIGHTS [data.val=SHARDS] [recipe=NAME] [key=value ...]

Test a fine-tuned classifier on several views of every video: top-1, top-5, mean class accuracy, a confusion matrix, and
the prediction of each video. `torchrun bevt_ds/evaluate.py ...` and `python bevt_ds/evaluate.py ...` work as well; the
result does not depend on the number of processes.

  deepspeed bevt_ds/evaluate.py weights=runs/finetune_k400
      the run's validation shards, views and precision
  deepspeed bevt_ds/evaluate.py weights=runs/finetune_k400 'data.val=k400-val-*.tar' views.clips=4 views.crops=3
  deepspeed bevt_ds/evaluate.py weights=swin_base_ssv2.pth recipe=finetune_ssv2 'data.val=ssv2-val-*.tar'
      weights that are no run of ours: data and views are the recipe's
"""


def main(argv: Sequence[str]) -> int:
    """The whole program; returns the exit code."""
    arguments = parse_arguments(argv, default_recipe="", default_json="none")
    if arguments.wants_help:
        print(page(USAGE, RECIPES, starting_point("", arguments.recipe or "finetune_k400")))
        return 0
    overrides = parse_overrides(arguments.overrides, EvaluateConfig)
    config = apply_overrides(starting_point(overrides.get("weights", ""), arguments.recipe), overrides)
    require(config)
    from bevt_ds.eval.multi_view import evaluate

    return evaluate(config)


def starting_point(weights: str, recipe: str) -> EvaluateConfig:
    """The recipe's configuration, if one is named; else that of the run the weights are from; else K400's.

    Raises:
        UserError: no such recipe, or a run without a classifier.
    """
    from bevt_ds.eval.results import run_config, without_classifier

    saved = run_config(weights) if weights and not recipe else None
    if isinstance(saved, Config):
        raise without_classifier(weights)
    base = saved or get_recipe(recipe or "finetune_k400")
    return EvaluateConfig(base.recipe, weights, base.data, base.views, base.train.precision, base.model.kernels)


def require(config: EvaluateConfig) -> None:
    """Check that the weights are there, that shards are named, and the numbers.

    Raises:
        UserError: what is missing or cannot work.
    """
    need(bool(config.weights), "weights= is missing: name a fine-tuning run's folder, saved weights, or a file.")
    need(Path(config.weights).exists(), f"weights={config.weights}: no such file or folder.")
    need(bool(config.data.val), "data.val is empty: name the shards to test on.")
    check_bounds(config, AT_LEAST_ONE, POSITIVE)


if __name__ == "__main__":
    run(main)
