"""Times every attention kernel over its candidates for the table of tiles: `python -m benchmarks.kernels --sweep`.

First all candidates are compiled and run once, in processes; then, one at a time on an idle machine, each is checked
against the reference and timed. What is wrong, does not fit the GPU or ends its process is a row with its reason. At
the end stands the text of the architecture's entry in `bevt_ds/kernels/configs.py`: of each kernel the candidate with
the least time, summed over shapes by depth.
"""

from __future__ import annotations

import multiprocessing
import os
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from queue import SimpleQueue

import torch

from bevt_ds.kernels import attention, attention_backward, configs, launches
from bevt_ds.kernels.configs import Options, scores, tiles, warps
from bevt_ds.kernels.launches import Launch

from .common import RESULTS, append_row, measure, provenance, reason, rows_of
from .kernels_cases import HEAD_DIM, Case, default_cases, tiny_cases
from .kernels_providers import Results, Standard

LARGE, SMALL = ("fwd", "bwd_kv", "bwd_q"), ("fwd_small", "bwd_small")
SCORES = ("fwd", "bwd_kv")  # make scores, so have a bias: gathered, or from a tile


@dataclass(frozen=True, eq=False)
class Trial:
    """A kernel with a candidate for its options; tiled: it reads its biases from a tile."""

    kernel: str
    candidate: Options
    device: str
    dtype: torch.dtype
    tiled: bool = False

    @property
    def kind(self) -> str:
        """Of the entry in the table of options."""
        return configs.kind(self.dtype, HEAD_DIM) + configs.TILED * self.tiled

    def runs(self, case: Case) -> bool:
        """Whether the kernel is one of those of the case."""
        return self.kernel in (SMALL if case.windows.tokens <= configs.SMALL_WINDOW else LARGE)

    def launches(self, inputs: Results, case: Case) -> tuple[list[Launch], Results]:
        """Runs forward and backward with the candidate: the launches, and output, dqkv and dtable."""
        name, kind = launches.architecture(torch.device(self.device)), configs.kind(self.dtype, HEAD_DIM)
        entries = {kind: None if self.tiled else self.candidate}
        if self.kernel in SCORES:
            entries[kind + configs.TILED] = self.candidate if self.tiled else None
        with ExitStack() as stack:
            for entry, options in entries.items():
                stack.enter_context(configs.replaced(name, (self.kernel, entry), options))
            recorded = stack.enter_context(launches.record(name, runs=True))
            return recorded, run_attention(inputs, case)

    def time(self, recorded: list[Launch]) -> dict[str, float]:
        """Milliseconds of this kernel's launches alone, and of those that make its tile of biases."""
        mine = [launch for launch in recorded if self.owns(launch)]
        return measure(lambda: [launch.again() for launch in mine], self.device).in_ms()

    def owns(self, launch: Launch) -> bool:
        """Whether a launch is of this kernel or of its tile, whose rows are keys in the backward pass."""
        name = launch.kernel.fn.__name__
        makes_tile = name == "bias_tile_kernel" and launch.options["FLIPPED"] == (self.kernel == "bwd_kv")
        return name == f"window_attention_{self.kernel}_kernel" or (self.tiled and makes_tile)


def run_attention(inputs: Results, case: Case) -> Results:
    """Output and gradients, by the launchers."""
    (qkv, table, dout), scale = inputs, HEAD_DIM**-0.5
    out, lse, *tables = attention.launch_forward(qkv, table, case.windows, scale)
    dqkv, pairs = attention_backward.launch_backward(dout, qkv, *tables, out, lse, case.windows, scale, table.dtype)
    return out, dqkv, attention_backward.launch_fold(pairs, table, case.windows)


def random_inputs(case: Case, device: str, dtype: torch.dtype) -> Results:
    """qkv, table and gradient of the output of a whole batch; one sample is checked, a batch is timed."""
    shape = (case.batch, *case.windows.grid)
    qkv = torch.randn(*shape, 3, case.heads, HEAD_DIM, device=device).to(dtype)
    table = (0.02 * torch.randn(case.windows.table_rows, case.heads, device=device)).to(dtype)
    return qkv, table, torch.randn(*shape, case.heads * HEAD_DIM, device=device).to(dtype)


def candidates(kernel: str, device: str) -> Iterator[tuple[bool, Options]]:
    """What is tried, and whether with a tile of biases; in the interpreter, whose times say nothing, little."""
    if kernel in SMALL:
        counts, stages = ((4,), (1, 2)) if device == "cpu" else ((2, 4, 8), (1, 2, 3))
        yield from ((False, warps(*pair)) for pair in product(counts, stages))
    elif device == "cpu":
        if kernel == "bwd_q":
            yield False, tiles(64, 32, 16, 4, 1)
        else:
            yield from ((tiled, scores(64, 32, 16, 4, 1, last=16)) for tiled in (False, True))
    elif kernel == "bwd_q":
        for m, n, stages in product((64, 128), (32, 64), (1, 2, 3)):
            yield False, tiles(m, n, 16, 4, stages)
    else:
        yield from score_candidates((1, 2, 3) if kernel == "fwd" else (1, 2))


def score_candidates(stages: tuple[int, ...]) -> Iterator[tuple[bool, Options]]:
    """Of the kernels that make scores. Registers are what lets three programs of 4 warps, or two of 8, share a
    multiprocessor."""
    for (m, n), count in product(((64, 32), (64, 64), (128, 32), (128, 64)), stages):
        yield False, scores(m, n, 16, 4, count, last=16)
        for registers in (None, 168):
            yield True, scores(m, n, 16, 4, count, last=16, registers=registers)
    for n, tiled, count in product((32, 64), (False, True), stages):
        yield tiled, scores(128, n, 16, 8, count, last=16, registers=128)


def sweep_cases(device: str) -> list[Case]:
    """Large and small maps, with and without a shift; one large and one small window in the interpreter."""
    if device == "cpu":
        return tiny_cases()
    return [case for case in default_cases() if case.stage in (1, 3) and (case.stream == "video" or case.shifted)]


def compile_one(trial: Trial, case: Case) -> str | None:
    """Fills Triton's cache, in a process of its own; why the trial fails, or None."""
    try:
        trial.launches(random_inputs(case, trial.device, trial.dtype), case)
    except Exception as error:  # compilers raise whatever they like
        return reason(error)
    return None


def new_process() -> ProcessPoolExecutor:
    """One that compiles one trial at a time, so that a process that dies says which trial it died of."""
    return ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))


def compile_all(trials: list[Trial], cases: list[Case]) -> dict[Trial, str]:
    """Every trial, on a case with a shift and on one without, on all cores: the reasons of those that fail.

    The process of a trial that failed is replaced: it may be dead, and an illegal access leaves no use of CUDA in it.
    """
    jobs = {(trial, any(case.windows.shift)): case for trial in trials for case in cases if trial.runs(case)}
    count, processes = max(1, (os.cpu_count() or 1) - 2), SimpleQueue()
    for _ in range(count):
        processes.put(new_process())

    def run(trial: Trial, case: Case) -> str | None:
        process = processes.get()
        try:
            failure = process.submit(compile_one, trial, case).result()
        except BrokenProcessPool:
            failure = "the process that compiled it died"
        if failure:
            process.shutdown()
        processes.put(new_process() if failure else process)
        return failure

    with ThreadPoolExecutor(count) as threads:
        failures = list(threads.map(run, (trial for trial, _ in jobs), jobs.values()))
    for _ in range(count):
        processes.get().shutdown()
    return {trial: failure for (trial, _), failure in zip(jobs, failures, strict=True) if failure}


def try_one(trial: Trial, standard: Standard, inputs: Results) -> dict:
    """Times, or the reason for having none."""
    try:
        recorded, results = trial.launches(standard.inputs, standard.case)
        standard.check(results)
        if inputs is not standard.inputs:
            recorded, _ = trial.launches(inputs, standard.case)
        return trial.time(recorded)
    except Exception as error:  # compilers raise whatever they like; what is wrong must not be chosen
        return {"error": reason(error)}


def table_entry(architecture: str, rows: list[dict]) -> str:
    """The best candidate of each kernel, as configs.py holds it; one counts where it has a time in every case. With a
    tile of biases: where it is faster than the best without, as its entry is what turns the tile on."""
    lines, without = [f'    "{architecture}": {{'], {}
    for kernel, kind in sorted({(row["kernel"], row["kind"]) for row in rows}):
        every = [row for row in rows if (row["kernel"], row["kind"]) == (kernel, kind)]
        mine, cases = [row for row in every if "p50_ms" in row], {row["case"] for row in every}
        totals, seen = defaultdict(float), defaultdict(set)
        for row in mine:
            totals[row["options"]] += row["blocks"] * row["p50_ms"]
            seen[row["options"]].add(row["case"])
        whole = {options: total for options, total in totals.items() if seen[options] == cases}
        if not whole:
            continue
        best = min(whole, key=whole.get)
        line = f'("{kernel}", "{kind}"): {best},  # {whole[best]:.4g} ms by depth'
        no_gain = kind.endswith(configs.TILED) and whole[best] >= without.get(kernel, float("inf"))
        lines.append(f"        {'# no faster than the gather: ' if no_gain else ''}{line}")
        without.setdefault(kernel, whole[best])
    return "\n".join([*lines, "    },"])


def as_text(options: Options) -> str:
    """As configs.py writes them."""
    options = dict(options)
    more = {name: options.pop(key) for name, key in (("last", "LAST"), ("registers", "maxnreg")) if key in options}
    name = "scores" if "last" in more else "tiles" if "BLOCK_M" in options else "warps"
    return f"{name}({', '.join([*map(str, options.values()), *(f'{key}={value}' for key, value in more.items())])})"


def sweep(device: str, out: Path = RESULTS) -> str:
    """Compiles, checks, times; returns the table's entry and leaves the rows in `out`."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    source, cases = provenance(device), sweep_cases(device)
    path, rows = rows_of("tiles", source["device"], out), []
    trials = [
        Trial(kernel, options, device, dtype, tiled)
        for kernel in LARGE + SMALL
        for tiled, options in candidates(kernel, device)
    ]
    failed = compile_all(trials, cases)
    for case in cases:
        standard = Standard.of(case, device, dtype)
        inputs = random_inputs(case, device, dtype) if device == "cuda" else standard.inputs
        for trial in (trial for trial in trials if trial.runs(case)):
            row = {"op": "tiles", "case": case.name, "blocks": case.blocks, "kernel": trial.kernel}
            row |= {"kind": trial.kind, "options": as_text(trial.candidate)}
            row |= {"error": failed[trial]} if trial in failed else try_one(trial, standard, inputs)
            row["provenance"] = source
            rows.append(row)
            append_row(path, row)
            print(f"{case.name} {trial.kernel} {row['options']}: {row.get('p50_ms', row.get('error'))}", flush=True)
    return table_entry(launches.architecture(torch.device(device)), rows)
