"""The losses of a small deterministic CPU run. `python -m tests.training.golden_curve` writes the committed file again.

To be done only where the losses are meant to change; the commit says why.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from tests.training.processes import ROOT, SMALL, Finished, copied_shards, run_ranks

FILE = ROOT / "tests" / "data" / "golden_curve.json"
KEPT = ("step", "loss_video", "loss_image", "lr", "grad_norm")


def curve_run(folder: Path, shards: dict[str, object]) -> Finished:
    """The run: 12 steps with accumulation and drop-path, fp32, one rank, one thread."""
    return run_ranks(folder, {**SMALL, **shards, "train.steps": 12, "model.drop_path": 0.3})


def main() -> None:
    """Run and write."""
    with tempfile.TemporaryDirectory() as folder:
        run = curve_run(Path(folder, "run"), copied_shards(Path(folder)))
        if run.code:
            raise SystemExit(run.output)
        lines = [json.dumps({k: line[k] for k in KEPT}) for line in run.log()]
    FILE.write_text("[\n" + ",\n".join(lines) + "\n]\n")


if __name__ == "__main__":
    main()
