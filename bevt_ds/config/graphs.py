"""Whether the encoder's passes are replayed as CUDA graphs, and where they cannot be."""

from __future__ import annotations

from typing import Any, Literal

from bevt_ds.config.fields import Field

Graphs = Literal["auto", "on", "off"]
REPLAY = Field(
    "replay the encoder as CUDA graphs, not run on a GPU yet: off | auto (on one GPU, where it can) | on", resume="free"
)


def why_without_graphs(switch: Graphs, model: Any, stage: int, device: str, world: int) -> str | None:
    """Why a run has no graphs; None: it has them.

    model: the configuration's section. device: its type. With "auto" several ranks go without: the gradients of the
    encoder then come all at once, so that sending them no longer overlaps the backward pass.
    """
    reasons = {
        "train.graphs=off": switch == "off",
        f"a {device} has none": device != "cuda",
        "ZeRO stage 3 moves parameters": stage == 3,
        "model.compile=true": model.compile,
        "model.checkpointing=true recomputes in the backward pass": model.checkpointing,
        f"{world} ranks, where only train.graphs=on takes them": switch == "auto" and world > 1,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)
