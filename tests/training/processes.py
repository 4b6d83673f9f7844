"""Small real runs: their settings, and ranks started as plain processes."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tests.training.preloaded import Forked
from tests.waiting import SECONDS

ROOT = Path(__file__).parents[2]

SMALL = {  # the demo recipe, smaller: 64 px, 4 frames, 2 clips and 4 images a forward pass
    "data.size": 64,
    "data.token_size": 32,
    "data.short_side": "64,80",
    "data.frames": 4,
    "data.eval_videos": "",
    "data.eval_images": "",
    "model.window": "2,2,2",
    "optim.lr": 2e-3,
    "optim.warmup_steps": 4,
    "data.mask.ratio": 0.4,
    "tokenizer.vocab_size": 64,
    "model.image_windows": "official",
    "train.steps": 6,
    "train.global_clips": 4,
    "train.micro_clips": 2,
    "train.global_images": 8,
    "train.micro_images": 4,
    "train.log_every": 1,
    "train.checkpoint_every": 1000,
    "train.min_gain": 0,
}


@dataclass(frozen=True)
class Finished:
    """What a run left behind."""

    code: int
    output: str
    folder: Path

    def log(self) -> list[dict]:
        return [json.loads(line) for line in (self.folder / "log.jsonl").read_text().splitlines()]

    def losses(self) -> list[tuple]:
        """Everything of a log line that must not depend on when or how often the run was stopped."""
        return [tuple(line[k] for k in ("step", "loss_video", "loss_image", "lr", "grad_norm")) for line in self.log()]


def environment(**extra: str) -> dict[str, str]:
    """A clean environment for a child: this interpreter's programs first, one thread a rank."""
    dropped = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "TRITON_INTERPRET")
    env = {name: value for name, value in os.environ.items() if name not in dropped}
    path = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    return {**env, "PATH": path, "OMP_NUM_THREADS": "1", **extra}


def command(stage: int, settings: dict[str, object]) -> list[str]:
    """The entry and its arguments."""
    words = [f"{key}={value}" for key, value in settings.items()]
    return ["bevt_ds/pretrain.py", "--deepspeed_config", f"ds_configs/zero{stage}.json", *words]


def copied_shards(folder: Path) -> dict[str, object]:
    """The committed shards, as settings; copied, so that the index written next to them is not committed."""
    for tar in (ROOT / "tests" / "data" / "shards").glob("*.tar"):
        shutil.copy(tar, folder)
    return {"data.videos": folder / "clips-000000.tar", "data.images": folder / "images-000000.tar"}


def start_ranks(settings: dict[str, object], world: int, stage: int = 2) -> list[Forked]:
    """Start the ranks of one run without a launcher."""
    return start_python(command(stage, settings), world)


def start_python(arguments: list[str], world: int, **extra: str) -> list[Forked]:
    """Start `python ARGUMENTS` on so many ranks, forked from a process that has its imports; extra: environment."""
    place = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())} | extra
    return [Forked(arguments, environment(**place, RANK=str(rank), LOCAL_RANK=str(rank))) for rank in range(world)]


def free_port() -> int:
    """A port that no one uses; below those that the system gives out unasked."""
    while True:
        with suppress(OSError), socket.create_server(("", 10_000 + secrets.randbelow(20_000))) as probe:
            return probe.getsockname()[1]


def run_ranks(folder: Path, settings: dict[str, object], world: int = 1, stage: int = 2) -> Finished:
    """Run to the end; the output is rank 0's."""
    ranks = start_ranks({**settings, "output_dir": folder}, world, stage)
    outputs = wait_for(ranks)
    return Finished(max(rank.returncode for rank in ranks), outputs[0], folder)


def launch(arguments: list[str], world: int, seconds: float = SECONDS) -> str:
    """Run `python ARGUMENTS` on so many ranks to the end; the output of all of them."""
    return "\n".join(wait_for(start_python(arguments, world), seconds))


def launch_rows(module: str, folder: Path, world: int, *words: str, seconds: float = SECONDS) -> list[dict]:
    """What `python -m tests.training.MODULE FOLDER WORDS` on so many ranks writes to FOLDER/rows.jsonl."""
    path = folder / "rows.jsonl"
    path.unlink(missing_ok=True)
    output = launch(["-m", f"tests.training.{module}", str(folder), *words], world, seconds)
    assert path.exists(), output
    return [json.loads(line) for line in path.read_text().splitlines()]


def wait_for(ranks: list[Forked], seconds: float = SECONDS) -> list[str]:
    """The output of each rank, once all have ended."""
    try:
        return [rank.communicate(timeout=seconds)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
