"""Probe an encoder: `deepspeed bevt_ds/probe.py weights=RUN data.train=... data.val=... [key=value ...]`.

This file turns a command line into a configuration; the work is in eval/probe_run.py.
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

from bevt_ds.config import validate_downstream as validate  # noqa: E402
from bevt_ds.config.command_line import parse_arguments, run  # noqa: E402
from bevt_ds.config.help import field_lines  # noqa: E402
from bevt_ds.config.parse import apply_overrides, parse_overrides  # noqa: E402
from bevt_ds.config.recipes import joint_swin_b  # noqa: E402
from bevt_ds.config.schema import Config, ViewsConfig  # noqa: E402
from bevt_ds.config.schema_downstream import ProbeRunConfig, labelled_as  # noqa: E402
from bevt_ds.config.validate import check_bounds, need  # noqa: E402
from bevt_ds.errors import UserError  # noqa: E402

USAGE = """\
usage: deepspeed bevt_ds/probe.py weights=RUN_OR_WEIGHTS data.train=SHARDS data.val=SHARDS [key=value ...]

Freeze an encoder and fit a small classifier to its features: top-1, top-5, mean class accuracy, a confusion matrix, and
the prediction of each video. `torchrun bevt_ds/probe.py ...` and `python bevt_ds/probe.py ...` work as well.

  deepspeed bevt_ds/probe.py weights=runs/joint 'data.train=k400-train-*.tar' 'data.val=k400-val-*.tar'
      attentive: a query attends to all tokens
  deepspeed bevt_ds/probe.py weights=runs/joint data.train=few-train.tar data.val=few-val.tar probe.kind=knn
      votes of the nearest training videos; low for masked modelling, see docs/evaluation.md
"""
AT_LEAST_ONE = {*validate.AT_LEAST_ONE, "probe.epochs", "probe.batch", "probe.k", "probe.cache_bytes"}
POSITIVE = {*validate.POSITIVE, "probe.lr", "probe.temperature"}


def main(argv: Sequence[str]) -> int:
    """The whole program; returns the exit code."""
    arguments = parse_arguments(argv, default_recipe="", default_json="none")
    if arguments.wants_help:
        print(f"{USAGE}\nfields, with the defaults for weights of joint_swin_b:\n{field_lines(starting_point(''))}")
        return 0
    if arguments.recipe:
        raise UserError("a probe has no recipe: sampling is the probed run's, the rest is probe.* and data.*.")
    overrides = parse_overrides(arguments.overrides, ProbeRunConfig)
    config = apply_overrides(starting_point(overrides.get("weights", "")), overrides)
    require(config)
    from bevt_ds.eval.probe_run import probe

    return probe(config)


def starting_point(weights: str) -> ProbeRunConfig:
    """One view of each video, sampled as by the run that the weights are from; if there is none, as the original's.

    Raises:
        UserError: another version of this project wrote the run.
    """
    from bevt_ds.eval.results import run_config

    run = (run_config(weights) if weights else None) or joint_swin_b()
    data = labelled_as(run.data) if isinstance(run, Config) else run.data
    views = ViewsConfig(clips=1, crops=1, short_side=data.short_side)
    return ProbeRunConfig(weights, data, views, precision=run.train.precision, kernels=run.model.kernels)


def require(config: ProbeRunConfig) -> None:
    """Check that the weights are there, that shards are named, and the numbers.

    Raises:
        UserError: what is missing or cannot work.
    """
    need(bool(config.weights), "weights= is missing: name a run's folder, saved weights, or an official file.")
    need(Path(config.weights).exists(), f"weights={config.weights}: no such file or folder.")
    need(bool(config.data.train), "data.train is empty: name the shards that the probe is fitted to.")
    need(bool(config.data.val), "data.val is empty: name the shards to test on.")
    check_bounds(config, AT_LEAST_ONE, POSITIVE)


if __name__ == "__main__":
    run(main)
