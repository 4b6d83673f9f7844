"""Real runs that are killed, asked to stop and frozen at random, until they end: `make soak`, hours.

    python -m tests.training.soak --kills 200 --signals 40 --freezes 20 --seed 3 --out benchmarks/results/soak.jsonl
    python -m tests.training.soak --seed 3 --strikes 50 --out benchmarks/results/soak.jsonl    # the next 50 of them

Each run is a small pretraining on gloo ranks, at one ZeRO stage and precision, on two ranks throughout or on one or two
in turns. It is held against one that nothing happened to: losses, weights, and each sample's pixels and mask by step.
After every strike no process of the run may be left. Started again with the same seed and file, it goes on after the
runs that the file has.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file

from benchmarks import report
from benchmarks.common import append_row, machine, provenance
from benchmarks.pages_runs import soak as describe
from bevt_ds.exit_codes import RANK_LOST, STOPPED
from tests.training.preloaded import Forked
from tests.training.processes import ROOT, SMALL, command, copied_shards, start_python

CASES = [
    (stage, precision) for stage in range(4) for precision in ("fp32", "bf16") if (stage, precision) != (0, "bf16")
]
STEPS, COMMIT_EVERY = 48, 2  # updates, and between commits
BATCH = {"train.global_clips": 2, "train.micro_clips": 1, "train.global_images": 4, "train.micro_images": 2}
DEADLINE, LONG_DEADLINE = 20, 300  # seconds of train.rank_deadline: where it must run out, and where it must not
MOST = 10  # strikes a run
PATIENCE = 1800  # seconds for anything, on a machine that may be busy
LEAVE = 60  # seconds for processes of a run to be gone after its ranks; how long it took is in the row
CLOSE = {"fp32": 2e-4, "bf16": 3e-2}  # relative, losses on other numbers of ranks, which add up in another order
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


@dataclass
class Tally:
    """What has happened to one run."""

    strikes: Counter[str] = field(default_factory=Counter)
    worlds: list[int] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    longest_s: float = 0.0  # from a strike to the end of every rank
    leave_s: float = 0.0  # from there until no process of the run was left, the longest


class Run:
    """A run of so many attempts, in a folder."""

    def __init__(self, folder: Path, stage: int, precision: str, data: dict[str, object]) -> None:
        self.folder, self.stage, self.attempts = folder, stage, 0
        own = {"train.steps": STEPS, "train.checkpoint_every": COMMIT_EVERY, "train.keep_checkpoints": 2}
        own |= {"train.precision": precision, "model.drop_path": 0.3, "output_dir": folder / "run"}
        own |= {"data.workers": 1, "data.threads": 1}
        self.settings = {**SMALL, **BATCH, **data, **own}
        self.marker = f"{os.getpid()}-{folder.name}"

    def start(self, world: int, deadline: int = LONG_DEADLINE) -> list[Forked]:
        """The next attempt; deadline: train.rank_deadline."""
        ledger = self.folder / f"ledger-{self.attempts}"
        ledger.mkdir(parents=True)
        settings = self.settings | {"train.rank_deadline": deadline} | ({"resume": "auto"} if self.attempts else {})
        self.attempts += 1
        words = ["tests/training/soak_rank.py", *command(self.stage or 2, settings)[1:]]
        if self.stage == 0:
            path = self.folder / "zero0.json"
            values = json.loads((ROOT / "ds_configs" / "zero2.json").read_text())
            path.write_text(json.dumps(values | {"zero_optimization": {"stage": 0}}))
            words[words.index("ds_configs/zero2.json")] = str(path)
        return start_python(words, world, LEDGER=str(ledger), SOAK=self.marker)

    def steps_done(self) -> int:
        """Whole lines of the log."""
        log = self.folder / "run" / "log.jsonl"
        return log.read_bytes().count(b"\n") if log.exists() else 0

    def in_commit(self) -> bool:
        """Whether a commit is being written."""
        return any((self.folder / "run" / "checkpoints").glob(".tmp-step-*"))

    def left(self, ranks: Sequence[Forked]) -> list[int]:
        """Processes of the run that still run."""
        marked = {process for process in processes() if f"SOAK={self.marker}".encode() in environ(process)}
        return sorted(marked | {rank.pid for rank in ranks if rank.poll() is None})

    def curve(self) -> list[tuple]:
        lines = map(json.loads, (self.folder / "run" / "log.jsonl").read_text().splitlines())
        return [tuple(line[k] for k in ("step", "loss_video", "loss_image", "lr", "grad_norm")) for line in lines]

    def weights(self) -> dict[str, torch.Tensor]:
        return load_file(self.folder / "run" / "weights" / "model.safetensors")

    def ledger(self) -> list[dict[int, list[tuple[str, int]]]]:
        """By attempt and step, each sample and its checksum. A kill may have cut a line."""
        attempts = []
        for number in range(self.attempts):
            steps: dict[int, list[tuple[str, int]]] = {}
            for path in (self.folder / f"ledger-{number}").glob("*.jsonl"):
                for line in path.read_text().split("\n")[:-1]:
                    step, *found = json.loads(line)
                    steps.setdefault(step, []).extend(map(tuple, found))
            attempts.append({step: sorted(found) for step, found in steps.items()})
        return attempts


def processes() -> Iterator[int]:
    return (int(path.name) for path in Path("/proc").iterdir() if path.name.isdecimal())


def environ(process: int) -> bytes:
    try:
        return Path(f"/proc/{process}/environ").read_bytes()
    except OSError:
        return b""


def until(holds: Callable[[], object], seconds: float = PATIENCE) -> bool:
    """Wait; whether it came to hold."""
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.002)
    return True


def moment(run: Run, ranks: Sequence[Forked], kind: str, rng: random.Random) -> bool:
    """Wait until it is time to strike; False: the run has ended before."""
    ended, wanted = lambda: any(rank.poll() is not None for rank in ranks), run.steps_done() + rng.randint(0, 4)
    if kind == "kill in start":  # before or after the ranks have met
        time.sleep(rng.uniform(0, 8))
    else:
        until(lambda: ended() or run.steps_done() > wanted)
        if kind == "kill in save":
            until(lambda: ended() or run.in_commit())
        time.sleep(rng.uniform(0, 0.06 if kind == "kill in save" else 0.5))
    return not ended()


def strike(run: Run, ranks: Sequence[Forked], kind: str, rng: random.Random, tally: Tally) -> None:
    """Do it, wait for the end of all, and note what is not as it should be."""
    some = list(ranks) if rng.random() < 0.5 else [rng.choice(ranks)]
    if kind.startswith("kill"):
        number, expected = signal.SIGKILL, {-signal.SIGKILL, RANK_LOST}
    elif kind == "freeze":
        some, number, expected = [rng.choice(ranks)], signal.SIGSTOP, {-signal.SIGKILL, RANK_LOST}
    else:
        number, expected = rng.choice(SIGNALS), {STOPPED}
    began = time.monotonic()
    for rank in some:
        rank.send_signal(number)
    others = [rank for rank in ranks if rank not in some] if kind == "freeze" else ranks
    if not until(lambda: all(rank.poll() is not None for rank in others)):
        tally.faults.append(f"{kind}: ranks did not end")
    for rank in ranks if kind == "freeze" else ():
        rank.kill()  # as a launcher does
    for rank in ranks:
        rank.kill()
        rank.communicate()
    tally.longest_s = max(tally.longest_s, time.monotonic() - began)
    name = "kill" if kind == "kill in save" and not run.in_commit() else kind
    tally.strikes[name if len(some) == len(ranks) or kind == "freeze" else f"{name} of one"] += 1
    codes = {rank.returncode for rank in ranks}
    if not codes <= expected:
        tally.faults.append(f"{kind}: exit codes {sorted(codes)}: {last_line(ranks[0])}")
    require_gone(run, ranks, kind, tally)


def last_line(rank: Forked) -> str:
    """Of what a rank has written; an error's line, or its traceback's last."""
    return rank.output.read_text().strip().rpartition("\n")[2]


def require_gone(run: Run, ranks: Sequence[Forked], what: str, tally: Tally) -> None:
    """Wait until no process of the run is left, and note any that is."""
    began = time.monotonic()
    if not until(lambda: not run.left(ranks), LEAVE):
        tally.faults.append(f"{what}: processes left: {run.left(ranks)}")
    tally.leave_s = max(tally.leave_s, time.monotonic() - began)


def finish(run: Run, world: int, tally: Tally) -> None:
    """An attempt without a strike."""
    end(run, run.start(world), tally)


def end(run: Run, ranks: Sequence[Forked], tally: Tally) -> None:
    """Wait for the end of an attempt, and note what is not as it should be."""
    if not until(lambda: all(rank.poll() is not None for rank in ranks)):
        tally.faults.append("the run did not end")
    if any(rank.returncode for rank in ranks):
        tally.faults.append(f"exit code {ranks[0].returncode}: {last_line(ranks[0])}")
    require_gone(run, ranks, "at the end", tally)
    for rank in ranks:
        rank.kill()


def compare(run: Run, whole: Run, is_exact: bool, close: float) -> tuple[list[str], float]:
    """How a run differs from one that nothing happened to, and the largest relative difference of two losses."""
    faults, ours, theirs = [], run.curve(), whole.curve()
    pairs = [(a, b) for one, two in zip(ours, theirs, strict=False) for a, b in zip(one[1:3], two[1:3], strict=True)]
    worst = max(abs(a / b - 1) for a, b in pairs)
    if len(ours) != len(theirs) or (ours != theirs if is_exact else worst > close):
        faults.append(f"another curve: {len(ours)} steps, {worst:.2g}")
    weights, expected = run.weights(), whole.weights()
    if is_exact and not all(torch.equal(weights[name], expected[name]) for name in expected):
        faults.append("other weights")
    (right,), attempts = whole.ledger(), run.ledger()
    last = {step: found for steps in attempts for step, found in steps.items()}
    if last != right:
        faults.append(f"another ledger: {[s for s in right if last.get(s) != right[s]]}")
    if torn := [s for steps in attempts for s, found in steps.items() if not Counter(found) <= Counter(right[s])]:
        faults.append(f"samples of another step, or twice: steps {torn}")
    return faults, worst


def soak(root: Path, kinds: list[str], seed: int, number: int = 0) -> Iterator[dict[str, object]]:
    """A row for each run from that number on, until no strikes are left in `kinds`, which are taken from its end."""
    data, wholes = copied_shards(root), {}
    while kinds:
        began, case = time.monotonic(), CASES[number % len(CASES)]
        if case not in wholes:
            wholes[case] = Run(root / "whole-{}-{}".format(*case), *case, data)
            finish(wholes[case], 2, first := Tally())
            if first.faults:
                raise RuntimeError("; ".join(first.faults))
        run, is_exact = Run(root / f"{number}", *case, data), number % 2 == 0
        tally = struck(run, kinds, is_exact, random.Random(seed + number))
        if not tally.faults:
            differs, worst = compare(run, wholes[case], is_exact, CLOSE[case[1]])
            tally.faults += differs
        yield {
            "number": number,
            "seed": seed,
            "stage": case[0],
            "precision": case[1],
            "worlds": "".join(map(str, tally.worlds)),
            "strikes": dict(sorted(tally.strikes.items())),
            "steps": STEPS,
            "exact": is_exact,
            "worst": 1.0 if tally.faults else worst,
            "longest_end_s": round(tally.longest_s, 1),
            "leave_s": round(tally.leave_s, 1),
            "wall_s": round(time.monotonic() - began, 1),
            "faults": tally.faults,
        }
        if not tally.faults:
            shutil.rmtree(run.folder)
        number += 1


def struck(run: Run, kinds: list[str], is_exact: bool, rng: random.Random) -> Tally:
    """Attempts of a run with a strike each, and a last one without."""
    tally = Tally()
    while kinds and tally.strikes.total() < MOST and not tally.faults:
        kind = kinds.pop()
        tally.worlds.append(2 if is_exact or kind == "freeze" else rng.choice((1, 2)))
        ranks = run.start(tally.worlds[-1], DEADLINE if kind in ("freeze", "kill in start") else LONG_DEADLINE)
        if not moment(run, ranks, kind, rng):
            kinds.append(kind)
            break
        strike(run, ranks, kind, rng, tally)
    else:
        tally.worlds.append(2 if is_exact else rng.choice((1, 2)))
        ranks = run.start(tally.worlds[-1])
    end(run, ranks, tally)
    return tally


def mixed(kills: int, signals: int, freezes: int, seed: int) -> list[str]:
    """All strikes in random order: of the kills, half are aimed at saves and a tenth at the start."""
    kinds = ["kill in save"] * (kills // 2) + ["kill in start"] * (kills // 10)
    kinds += ["kill"] * (kills - len(kinds)) + ["signal"] * signals + ["freeze"] * freezes
    random.Random(seed).shuffle(kinds)
    return kinds


def share(kinds: list[str], most: int | None, seed: int, out: Path | None) -> tuple[list[str], int]:
    """The strikes of the plan that are now to be made, `most` or all that are left, and the number of the next run."""
    rows = map(json.loads, out.read_text().splitlines()) if out and out.exists() else ()
    done = [row for row in rows if row["seed"] == seed]
    left = kinds[: len(kinds) - sum(sum(row["strikes"].values()) for row in done)]
    return left[-most:] if most else left, len(done)


def main() -> int:
    """Returns 1 if any fault was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--signals", type=int, default=40)
    parser.add_argument("--freezes", type=int, default=20)
    parser.add_argument("--strikes", type=int, help="make so many of these now; default: all that are left")
    parser.add_argument("--seed", type=int, default=3, help="of the plan of all strikes")
    parser.add_argument("--out", type=Path, help="append a JSON row for each run to this file")
    parser.add_argument(
        "--folder", type=Path, help="of the runs; those with a fault are kept. Default: a temporary one"
    )
    arguments = parser.parse_args()
    faults, root = 0, arguments.folder or Path(tempfile.mkdtemp())
    root.mkdir(parents=True, exist_ok=True)
    kinds = mixed(arguments.kills, arguments.signals, arguments.freezes, arguments.seed)
    kinds, number = share(kinds, arguments.strikes, arguments.seed, arguments.out)
    for row in soak(root, kinds, arguments.seed, number):
        print(json.dumps(row), flush=True)
        faults += len(row["faults"])
        if arguments.out:
            append_row(arguments.out, row | provenance("cpu") | machine())
            report.write(arguments.out, describe)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
