"""Test a classifier: `deepspeed bevt_ds/evaluate.py weights=RUN_OR_WEIGHTS [data.val=...] [key=value ...]`.

config/command_line.py turns the command line into a configuration; the work is in eval/multi_view.py.
"""

from __future__ import annotations

import sys

try:
    from bevt_ds.config.command_line import require_own_package
except ImportError as error:
    sys.exit(f"error: {error}. Run `pip install -e .` in the checkout with {sys.executable}, or `make env`.")
require_own_package(__file__)

from collections.abc import Sequence

from bevt_ds.config.command_line import run, start_inference
from bevt_ds.config.recipes import get_recipe
from bevt_ds.config.schema import Config, EvaluateConfig, FinetuneConfig

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
    return start_inference(argv, EvaluateConfig, USAGE, starting_point, work)


def work(config: EvaluateConfig) -> int:
    """Import what needs torch, and test."""
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
    base = saved or get_recipe(recipe or "finetune_k400", FinetuneConfig)
    return EvaluateConfig(
        recipe=base.recipe,
        weights=weights,
        data=base.data,
        views=base.views,
        precision=base.train.precision,
        kernels=base.model.kernels,
    )


if __name__ == "__main__":
    run(main)
