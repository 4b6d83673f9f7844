"""Probe an encoder: `deepspeed bevt_ds/probe.py weights=RUN data.train=... data.val=... [key=value ...]`.

config/command_line.py turns the command line into a configuration; the work is in eval/probe_run.py.
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
from bevt_ds.config.schema import ProbeRunConfig

USAGE = """\
usage: deepspeed bevt_ds/probe.py weights=RUN_OR_WEIGHTS data.train=SHARDS data.val=SHARDS [key=value ...]

Freeze an encoder and fit a small classifier to its features: top-1, top-5, mean class accuracy, a confusion matrix, and
the prediction of each video. `torchrun bevt_ds/probe.py ...` and `python bevt_ds/probe.py ...` work as well.

  deepspeed bevt_ds/probe.py weights=runs/joint 'data.train=k400-train-*.tar' 'data.val=k400-val-*.tar'
      attentive: a query attends to all tokens
  deepspeed bevt_ds/probe.py weights=runs/joint data.train=few-train.tar data.val=few-val.tar probe.kind=knn
      votes of the nearest training videos; low for masked modelling, see docs/evaluation.md
"""


def main(argv: Sequence[str]) -> int:
    """The whole program; returns the exit code."""
    return start_inference(argv, ProbeRunConfig, USAGE, starting_point, work)


def work(config: ProbeRunConfig) -> int:
    """Import what needs torch, and probe."""
    from bevt_ds.eval.probe_run import probe

    return probe(config)


def starting_point(weights: str, recipe: str = "") -> ProbeRunConfig:
    """One view of each video, sampled as by the run that the weights are from; if there is none, as the original's.

    Raises:
        UserError: a recipe is named, or another version of this project wrote the run.
    """
    from bevt_ds.eval.results import one_view

    return one_view(ProbeRunConfig, weights, recipe)


if __name__ == "__main__":
    run(main)
