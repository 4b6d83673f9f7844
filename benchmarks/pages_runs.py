"""The pages of runs that are killed, and of what a checkpoint costs."""

from __future__ import annotations

from collections import Counter
from statistics import median

from .report import Columns, Page, Row, Rows, facts, fields, grouped, newest, table

SOAK = """\
Made by `make soak`: small pretraining runs on gloo ranks that are killed (SIGKILL), asked to stop (SIGTERM, SIGINT,
SIGUSR1 or SIGHUP) and frozen (SIGSTOP) at random moments, each time continued with `resume=auto`, until they end.
`2221`: the number of ranks of each attempt. Each run is held against one of two ranks to which nothing happened. On two
ranks throughout, every loss, learning rate, gradient norm and weight must be equal to the last bit; where the number of
ranks changes, losses to {close}. In both, every step of every attempt must have had the same samples with the same
pixels and masks, each once. After the ranks have ended no process of the run may be left; "gone s" is the longest that
this took to be seen. "In save": a commit was being written when the signal came. Rows of one seed are one plan of
strikes, with which `make soak` goes on."""
BOUND = "No fault in {n} strikes: with 95 % confidence fewer than {bound:.1%} lose anything."
FOUND = "{n} of {runs} runs have a fault, in {total} strikes: see their rows, which are not compared further."
COMMITS = """\
Made by `python -m benchmarks.commits`: a {model} model of {parameters:,} parameters on two gloo ranks. Ours is a commit
of this project: every rank's safetensors, the weights on their own, fsync, SHA-256, manifest, rename; training waits
only for the copy ("training waits"). DeepSpeed's is its `save_checkpoint`, to which fsync is added, without weights on
their own, checksums or commit. Medians of {rounds} rounds in turns."""

GUARD = """\
Made by `python -m benchmarks.guard`: steps of the training program (`tiny`, one clip and two images, no tokenizer, one
rank) on a CPU. "no check" clips by the gradient's norm and does not look whether it is finite; "guard" is training as
it is; "deepspeed" has DeepSpeed's own norms and check instead. At stage 3 and in bf16 at stage 1 DeepSpeed itself
leaves a step out, also under "no check". Operators, bytes (read and written by operators) and reads (numbers that the
host asks for, {own} of them by checks of the batch that a GPU does not have) are exact. CPU times are medians of
{rounds} steps in turns; the machine was busy, and differences of a few percent are its noise."""


def soak(rows: Rows) -> Page:
    """Strikes by kind, and a line for each run."""
    strikes: Counter[str] = Counter()
    for row in rows:
        strikes.update(row["strikes"])
    faults, total = sum(bool(row["faults"]) for row in rows), strikes.total()
    found = FOUND.format(n=faults, runs=len(rows), total=total)
    verdict = found if faults else BOUND.format(n=total, bound=3 / max(total, 1))
    kinds = table([{"kind": kind, "n": n} for kind, n in sorted(strikes.items())], fields("strike kind s | number n d"))
    text = SOAK.format(close="a relative 2e-4 (fp32) and 3e-2 (bf16)")
    return Page("Runs that are killed, stopped and frozen", [text, verdict, facts(rows), kinds, table(rows, RUNS)])


RUNS: Columns = {
    **fields("seed seed d | run number d | ZeRO stage d | precision precision s | ranks worlds s"),
    "strikes": lambda row: str(sum(row["strikes"].values())),
    "in save": lambda row: str(sum(n for kind, n in row["strikes"].items() if "in save" in kind)),
    "curve and weights": lambda row: (
        "not compared" if row["faults"] else "equal" if row["exact"] else f"within {row['worst']:.1g}"
    ),
    **fields("slowest end s longest_end_s .1f"),
    "gone s": lambda row: f"{row['leave_s']:.1f}" if "leave_s" in row else "under 10",
    **fields("s wall_s .0f"),
    **fields("commit commit s"),
    "faults": lambda row: "; ".join(row["faults"]) or "none",
}


def commits(rows: Rows) -> Page:
    """Sizes and times of both ways, by stage and precision."""
    rows = newest(rows)
    medians = [_medians(group) for group in grouped(rows, "stage", "precision").values()]
    text = COMMITS.format(**rows[0], rounds=len(grouped(rows, "round")))
    return Page(
        "What a checkpoint costs", [text, facts(rows), table(medians, SIZES, names=2), table(medians, TIMES, names=2)]
    )


def _medians(group: Rows) -> Row:
    numbers = {name: median(row[name] for row in group) for name, value in group[0].items() if isinstance(value, float)}
    return {**group[0], **numbers}


NAMES = fields("ZeRO stage d | precision precision s")
SIZES: Columns = {
    **NAMES,
    **fields("ours MB ours_mb .1f | of it the weights alone weights_mb .1f | DeepSpeed's MB theirs_mb .1f"),
}
TIMES: Columns = {
    **NAMES,
    **fields(
        "ours, training waits s stall_s .2f | ours, whole commit s ours_save_s .2f"
        " | DeepSpeed's save s theirs_save_s .2f"
    ),
    **fields("ours, load s ours_load_s .2f | DeepSpeed's load s theirs_load_s .2f"),
}


def guard(rows: Rows) -> Page:
    """Operators, bytes, reads and CPU time by stage, precision and variant."""
    rows = newest(rows)
    base = {(r["stage"], r["precision"]): r for r in rows if r["variant"] == "no check"}
    own = lambda row, name: row[name] - base[row["stage"], row["precision"]][name]  # noqa: E731
    columns = {
        **fields("ZeRO stage d | precision precision s | variant variant s | operators operators d"),
        "more": lambda row: str(own(row, "operators")),
        "bytes more": lambda row: f"{own(row, 'bytes'):,}",
        **fields("reads reads d | CPU ms cpu_ms .1f | share share .1%"),
    }
    text = GUARD.format(rounds=rows[0]["rounds"], own=8)
    return Page("What the finite checks cost", [text, facts(rows), table(rows, columns, names=3)])
