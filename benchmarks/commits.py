"""What a checkpoint costs: a commit of this project against DeepSpeed's own files, at each ZeRO stage and precision.

    python -m benchmarks.commits --model swin_t

Two gloo ranks. Saved and loaded in turns, so that other load on the machine affects both alike.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bevt_ds.config.deepspeed import read_json
from bevt_ds.config.recipes import demo
from bevt_ds.config.schema import Config
from bevt_ds.model.presets import create_model
from bevt_ds.runtime.checkpoint import Facts
from bevt_ds.runtime.commit import save, sync
from bevt_ds.runtime.distributed import Ranks
from bevt_ds.runtime.engine import TAG, Engine
from bevt_ds.runtime.engine_setup import start_ranks
from bevt_ds.runtime.optim import parameter_groups
from bevt_ds.runtime.pieces import SavedPieces
from tests.training.processes import launch

from . import report
from .common import add_row, append_row, command_line, provenance, read_rows, rows_of

CASES = [
    (stage, precision) for stage in range(4) for precision in ("fp32", "bf16") if (stage, precision) != (0, "bf16")
]
RANKS = 2


def make_engine(model: str, stage: int, precision: str, ranks: Ranks) -> Engine:
    """An engine with moments, as after a step."""
    base = demo()
    train = replace(base.train, precision=precision, global_clips=RANKS, micro_clips=1, global_images=0)
    config = replace(base, train=train)
    values = read_json(f"zero{max(stage, 1)}")
    values["zero_optimization"]["stage"] = stage
    network = create_model(model, vocab_size=base.tokenizer.vocab_size)
    network.init_weights(torch.Generator().manual_seed(0))
    groups = parameter_groups(network, config.optim.weight_decay)
    engine = Engine(network, config, values, ranks, network.arch["embed_dim"], groups, lambda step: 1e-3)
    engine._kinds()
    return engine


def timed(ranks: Ranks, work: Callable[[], Any]) -> float:
    """Seconds until the last rank has done it. Collective."""
    ranks.barrier()
    began = time.perf_counter()
    work()
    ranks.barrier()
    return time.perf_counter() - began


def megabytes(folder: Path) -> float:
    """Of all files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6


def measure(engine: Engine, config: Config, stage: int, folder: Path) -> dict[str, float]:
    """One round of both. Collective."""
    ranks, kept = engine.ranks, {}
    folder.mkdir(exist_ok=True)

    def write_pieces(place: Path) -> None:
        kept["snapshot"].write(place / TAG, ranks.rank)

    def write_weights(place: Path) -> None:
        if ranks.is_main:
            with SavedPieces(place / TAG) as saved:
                engine.module.save_pretrained(place / "weights", saved.weights())

    def theirs() -> None:
        engine.ds.save_checkpoint(str(folder / "theirs"), tag=TAG, save_latest=False)
        for path in sorted((folder / "theirs" / TAG).iterdir())[ranks.rank :: ranks.world]:
            sync(path)

    facts = Facts(1, ranks.world, stage, config, "", {})
    stall = timed(ranks, lambda: kept.update(snapshot=engine.snapshot()))
    rest = timed(ranks, lambda: save(folder / "ours", facts, [write_pieces, write_weights], ranks, keep=1))
    times = {"stall_s": stall, "ours_save_s": stall + rest, "theirs_save_s": timed(ranks, theirs)}
    commit = folder / "ours" / "step-00000001"
    sizes = {"ours_mb": megabytes(commit), "weights_mb": megabytes(commit / "weights")}
    sizes |= {"theirs_mb": megabytes(folder / "theirs")}
    times["ours_load_s"] = timed(ranks, lambda: engine.load(commit))
    times["theirs_load_s"] = timed(ranks, lambda: engine.ds.load_checkpoint(str(folder / "theirs"), tag=TAG))
    ranks.barrier()
    if ranks.is_main:
        shutil.rmtree(folder)
    ranks.barrier()
    return {name: round(value, 4) for name, value in (times | sizes).items()}


def work(job: dict[str, Any]) -> None:
    """On one rank: every case once; rank 0 prints the rows."""
    ranks, folder = start_ranks(), Path(job["folder"])
    for stage, precision in CASES:
        engine = make_engine(job["model"], stage, precision, ranks)
        row = measure(engine, demo(), stage, folder / "files")
        parameters = sum(getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters())
        names = {"op": "commits", "model": job["model"], "parameters": parameters, "round": job["round"]}
        if ranks.is_main:
            row = {**names, "ranks": ranks.world, "stage": stage, "precision": precision, **row}
            append_row(folder / "rows.jsonl", row)
        del engine


def main() -> None:
    """The command."""
    parser = command_line(__doc__, rounds=3)
    parser.add_argument("--model", default="swin_t", help="preset; default: %(default)s")
    parser.add_argument("--work", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        return work(options.work)
    path = rows_of("commits", provenance("cpu")["device"], options.out)
    for number in range(options.rounds):
        with tempfile.TemporaryDirectory() as folder:
            job = json.dumps({"model": options.model, "round": number, "folder": folder})
            output = launch(["-m", "benchmarks.commits", "--work", job], RANKS, seconds=3600)
            if not (rows := list(read_rows(Path(folder, "rows.jsonl")))):
                raise RuntimeError(output[-4000:])
            for row in rows:
                add_row(path, row)
    print(report.write(path))


if __name__ == "__main__":
    main()
