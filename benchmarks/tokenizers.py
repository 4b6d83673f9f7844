"""Quantisers of the trained tokenizer against each other, on the demo: use, perplexity, reconstruction, and what for.

`python -m benchmarks.tokenizers --folder runs/tokenizers`: for each quantiser `recipe=vq_demo`, the joint demo with its
ids, and a linear probe of that on the study's drawn actions, whose classes differ in their motion alone. Runs that are
there are kept. The demo's own tokenizer and a network that was not trained stand next to them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import RESULTS, add_row, command_line
from benchmarks.study_data import prepare
from benchmarks.study_runs import call
from bevt_ds.model.presets import create_model

QUANTISERS = ("ema", "fsq")
ARMS = (*QUANTISERS, "random_projection", "untrained")
LABELLED = {"train": 192, "val": 192}  # clips
PROBE = "probe.kind=linear precision=fp32 data.frames=8 data.stride=1 data.size=128 data.short_side=128"
VIEWS = "views.clips=1 views.crops=1 views.short_side=128 views.micro_videos=16"


def row_of(folder: Path, arm: str) -> dict[str, Any]:
    """Make what is missing of one arm and measure it."""
    row: dict[str, Any] = {"arm": arm}
    if arm in QUANTISERS:
        row |= reconstruction(folder / arm, arm)
    weights = untrained(folder / arm) if arm == "untrained" else pretrained(folder, arm)
    if (summary := weights / "summary.json").exists():
        found = json.loads(summary.read_text())
        row |= {f"gain_{stream}": found[stream]["gain"] for stream in ("video", "image")}
    return row | {"probe_top1": probed(folder, weights)}


def reconstruction(run: Path, quantiser: str) -> dict[str, float]:
    """Train a tokenizer by the demo's recipe; figures of held-out images."""
    if not (run / "summary.json").exists():
        words = ("recipe=vq_demo", f"model.quantiser={quantiser}", f"output_dir={run}")
        call("train_tokenizer", words, run.with_suffix(".log"))
    found = json.loads((run / "summary.json").read_text())["image"]
    return {name: found[name] for name in ("psnr", "explained", "codebook_use", "codebook_perplexity")}


def pretrained(folder: Path, arm: str) -> Path:
    """The joint demo with an arm's ids."""
    run = folder / f"joint-{arm}"
    own = (f"tokenizer.weights={folder / arm}", "tokenizer.name=vq") if arm in QUANTISERS else ()
    if not (run / "summary.json").exists():
        call("pretrain", ("recipe=demo", *own, f"output_dir={run}"), run.with_suffix(".log"))
    return run


def untrained(folder: Path) -> Path:
    """The demo's network as it begins."""
    if not folder.exists():
        model = create_model("tiny", vocab_size=64, window=(4, 4, 4))
        model.init_weights(torch.Generator().manual_seed(0))
        model.save_pretrained(folder)
    return folder


def probed(folder: Path, weights: Path) -> float:
    """Accuracy of a linear probe on the drawn actions."""
    shards, out = folder / "labelled", weights / "probe"
    prepare(shards, LABELLED)
    if not (out / "scores.json").exists():
        names = (f"data.{split}={shards / split}-0*.tar" for split in LABELLED)
        words = (f"weights={weights}", f"output_dir={out}", *names, *PROBE.split(), *VIEWS.split())
        call("probe", words, out.with_suffix(".log"))
    return float(json.loads((out / "scores.json").read_text())["top1"])


def main() -> None:
    parser = command_line(__doc__, out=RESULTS / "tokenizers.jsonl")
    parser.add_argument("--folder", type=Path, default=Path("runs/tokenizers"))
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    arguments = parser.parse_args()
    for arm in arguments.arms:
        add_row(arguments.out, row_of(arguments.folder.resolve(), arm))


if __name__ == "__main__":
    main()
