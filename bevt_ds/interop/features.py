"""`bevt features WEIGHTS SHARDS OUT`: from a command line to a configuration; the work is in interop/extraction.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from bevt_ds.config.command_line import run, start_inference
from bevt_ds.config.features import FeaturesRunConfig
from bevt_ds.errors import UserError

USAGE = """\
usage: bevt features WEIGHTS SHARDS OUT [key=value ...]

Features of every clip or image of SHARDS, by a frozen encoder: OUT/features-00000.safetensors, ... and what they are
of, OUT/_manifest.json. SHARDS is data.val below; labels may be missing. The same command continues a stopped one.

  bevt features runs/joint 'k400-val-*.tar' features/k400          the mean over all tokens of each clip
  bevt features runs/joint 'in1k-*.tar' features/in1k features.kind=image features.format=parquet
  bevt features swin3d_b.pth val.tar out features.dense=true views.clips=4 data.frames=32 data.stride=2
  torchrun --nproc-per-node 8 -m bevt_ds.interop.features runs/joint 'k400-*.tar' features/k400
      one process a GPU; `deepspeed --module bevt_ds.interop.features ...` works too. The result is the same.
"""
POSITIONS = ("weights", "data.val", "output_dir")


def main(argv: Sequence[str]) -> int:
    """The whole command; returns the exit code."""
    return start_inference(as_overrides(argv), FeaturesRunConfig, USAGE, starting_point, work)


def as_overrides(argv: Sequence[str]) -> list[str]:
    """WEIGHTS, SHARDS and OUT as `key=value`; other words stay.

    Raises:
        UserError: more words without `=` than these.
    """
    words, names = [], iter(POSITIONS)
    for word in argv:
        if word.startswith("-") or "=" in word:
            words.append(word)
        elif name := next(names, None):
            words.append(f"{name}={word}")
        else:
            raise UserError(
                f"{word!r} comes after WEIGHTS, SHARDS and OUT: what follows these is key=value. If the shell expanded"
                " SHARDS, put quotes around it."
            )
    return words


def work(config: FeaturesRunConfig) -> int:
    """Import what needs torch, and extract."""
    from bevt_ds.interop.extraction import extract

    if not config.output_dir:
        raise UserError("OUT is missing: bevt features WEIGHTS SHARDS OUT.")
    if config.features.kind == "image":
        if config.views.clips != 1:
            raise UserError(f"views.clips={config.views.clips}: an image has no clips along time; use 1.")
        config = replace(config, data=replace(config.data, frames=1))
    return extract(config)


def starting_point(weights: str, recipe: str = "") -> FeaturesRunConfig:
    """One view of each sample, sampled as by the run that the weights are from; if there is none, as the original's.

    Raises:
        UserError: a recipe is named, or another version of this project wrote the run.
    """
    from bevt_ds.eval.results import one_view

    return one_view(FeaturesRunConfig, weights, recipe, micro_videos=8)


if __name__ == "__main__":
    run(main)
