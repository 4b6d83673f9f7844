"""What recomputing costs and saves: whole blocks, attention alone, every second block; on a CPU, as paired ratios.

    python -m benchmarks.checkpointing                    # Swin-T at 96 px and 4 frames: a clip and two images
    python -m benchmarks.checkpointing --rounds 15

Each way is a model of its own with the same weights. In each round all take one forward and backward pass, in turns;
a ratio is CPU seconds over those of the same round without recomputing, so that other load on the machine affects both
alike. FLOPs are the plan's; saved bytes are what autograd keeps at the end of the forward pass.
"""

from __future__ import annotations

from dataclasses import replace
from statistics import median

import torch

from bevt_ds.config.recipes import joint_swin_b
from bevt_ds.config.schema import BackboneConfig, Config
from bevt_ds.model.presets import create_model
from bevt_ds.plan.activations import counting_saved
from bevt_ds.plan.compute import flops

from . import report
from .common import add_row, command_line, cpu_seconds, in_turns, rows_of
from .step_batch import resident_batch

MODEL, FRAMES, SIZE, CLIPS, IMAGES, IDS = "swin_t", 4, 96, 1, 2, 512
WINDOW = (2, 4, 4)  # tokens
WAYS = {
    "none": {},
    "every block": {"checkpointing": True},
    "every second block": {"checkpointing": True, "recompute_every": 2},
    "attention": {"checkpointing": True, "recompute": "attention"},
    "attention of every second block": {"checkpointing": True, "recompute": "attention", "recompute_every": 2},
}


class Way:
    """A model that recomputes in one way."""

    def __init__(self, name: str, model: str) -> None:
        self.name, self.settings = name, WAYS[name]
        torch.manual_seed(0)
        self.model = create_model(model, vocab_size=IDS, window=WINDOW, kernels="torch", **self.settings).train()
        batch = resident_batch(CLIPS, IMAGES, FRAMES, SIZE)
        streams = {kind: getattr(batch, kind) for kind in ("video", "image")}
        self.batch = replace(
            batch, **{kind: replace(s, targets=torch.arange(len(s.rows)) % IDS) for kind, s in streams.items()}
        )

    def step(self) -> float:
        """CPU seconds of a forward and backward pass."""
        return cpu_seconds(lambda: self.model(self.batch).loss.backward())

    def saved(self) -> int:
        """Bytes that wait for the backward pass."""
        with counting_saved(self.model) as saved:
            loss = self.model(self.batch).loss
        loss.backward()
        return sum(saved.values())

    def flops(self, model: str) -> float:
        """Of the encoder, decoders and head, by the plan."""
        base = joint_swin_b()
        data = replace(base.data, frames=FRAMES, size=SIZE, token_size=SIZE // 2)
        backbone = BackboneConfig(name=model, window=WINDOW, drop_path=0.0, **self.settings)
        parts = flops(Config(recipe=base.recipe, model=backbone, data=data), CLIPS, IMAGES)
        return sum(parts.values()) - parts["tokenizer"]


def measure(model: str, rounds: int) -> list[dict[str, object]]:
    """A row for each way."""
    ways = [Way(name, model) for name in WAYS]
    times = in_turns({way.name: way.step for way in ways}, rounds, warm=1)
    rows = []
    for way in ways:
        ratios = [after / before for after, before in zip(times[way.name], times["none"], strict=True)]
        rows.append({
            "op": "checkpointing",
            "model": model,
            "batch": f"{CLIPS} clip of {FRAMES} frames, {IMAGES} images, {SIZE} px",
            "recompute": way.name,
            "rounds": rounds,
            "cpu_s": round(median(times[way.name]), 4),
            "cpu_ratio": round(median(ratios), 4),
            "cpu_ratio_low": round(min(ratios), 4),
            "cpu_ratio_high": round(max(ratios), 4),
            "flops_ratio": round(way.flops(model) / ways[0].flops(model), 4),
            "saved_mb": round(way.saved() / 1e6, 2),
        })  # fmt: skip
    return rows


def main() -> None:
    """The command."""
    parser = command_line(__doc__, rounds=9)
    parser.add_argument("--model", default=MODEL, help="preset; default: %(default)s")
    options = parser.parse_args()
    path = rows_of("checkpointing", "cpu", options.out)
    for row in measure(options.model, options.rounds):
        add_row(path, row)
    print(report.write(path))


if __name__ == "__main__":
    main()
