"""Times the kernels against other ways to do the same, after checking that they are right.

    python -m benchmarks.kernels               # Swin-B, 8 clips and 64 images; most of it is compiling
    python -m benchmarks.kernels --only "8 video" --providers eager sdpa bevt_ds    # the quick ones of its clips
    python -m benchmarks.kernels --part 1/6    # the first sixth of all other shapes; may be interrupted and resumed
    python -m benchmarks.kernels --sweep       # each kernel over its candidates for the table of tiles
    python -m benchmarks.kernels --soak        # every configuration 1,000 times, results bitwise equal

Rows go to benchmarks/results/kernels-<device>.jsonl as they are measured, and what is already there for the same
commit is not measured again; a markdown page and a plot are drawn from them. Without a GPU the same command times small
shapes over what runs on a CPU, and says so. The last thing printed is the table of goals with what was measured.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Container, Iterable, Iterator
from pathlib import Path

import torch

from . import (
    kernels_blocks,
    kernels_fused,
    kernels_goals,
    kernels_heads,
    kernels_masked,
    kernels_providers,
    kernels_sweep,
    pages,
    report,
)
from .common import RESULTS, append_row, ceilings, measure, peak_megabytes, provenance, read_rows, reason, rows_of
from .kernels_cases import Case, default_cases, further_cases, small_cases, soak_cases
from .kernels_providers import Job

DIRECTIONS = ("forward", "backward", "both")
NAMES = (
    *kernels_providers.GPU_PROVIDERS,
    "eager_gather_first",
    *kernels_heads.LOSSES,
)  # from there on: of the masked head


def time_direction(job: Job, direction: str, device: str) -> dict:
    """Times and memory of one direction."""
    if direction == "backward":
        outputs = job.forward()
        run: Callable = lambda: job.backward(outputs)  # noqa: E731
    else:
        run = getattr(job, direction)
    timing = measure(run, device)
    return timing.in_ms() | {"peak_mb": peak_megabytes(run, device)}


def time_job(make: Callable[..., Job], device: str, dtype: torch.dtype, ours: bool, *case: object) -> dict[str, dict]:
    """Results by direction. A competitor that fails gives its reason; a failure of ours is an error."""
    results = {}
    try:
        job = make(*case, device, dtype)
        for direction in DIRECTIONS:
            results[direction] = time_direction(job, direction, device)
    except Exception as error:  # compilers raise whatever they like
        if ours:
            raise
        for direction in DIRECTIONS:
            results.setdefault(direction, {"error": reason(error)})
    return results


def attention_row(case: Case, direction: str, limits: dict, dtype: torch.dtype) -> dict:
    """What a row says about its case."""
    roof_ms, binding = case.roof_ms(direction, limits, dtype.itemsize)
    return {
        "dense_flops": case.flops(direction),
        "executed_flops": case.flops(direction, dense=False),
        "roof_ms": roof_ms,
        "roof": binding,
        "blocks": case.blocks,
    }


class Run:
    """One device, one file of rows."""

    def __init__(self, device: str, path: Path, names: Container[str]) -> None:
        """names: the providers that are wanted."""
        self.device, self.path, self.names = device, path, names
        self.dtype = torch.bfloat16 if device == "cuda" else torch.float32
        self.ours = "triton" if device == "cuda" else "torch"
        self.source, self.limits = provenance(device), ceilings(device)
        self.done = {
            (row["op"], row["case"], row["provider"])
            for row in read_rows(path)
            if row["provenance"]["commit"] == self.source["commit"]
        }

    def write(self, op: str, case: str, provider: str, direction: str, result: dict, extra: dict) -> None:
        """One row, on screen and on disk."""
        row = {"op": op, "case": case, "provider": provider, "direction": direction, "dtype": str(self.dtype)}
        row |= result | extra | {"ceilings": self.limits, "provenance": self.source}
        append_row(self.path, row)
        print(f"{op} {case} {direction} {provider}: {result.get('p50_ms', result.get('error'))}", flush=True)

    def attention(self, case: Case) -> None:
        """Correctness, then every provider."""
        providers = kernels_providers.GPU_PROVIDERS if self.device == "cuda" else kernels_providers.CPU_PROVIDERS
        wanted = [name for name in providers if name in self.names]
        todo = {name for name in wanted if ("window_attention", case.name, name) not in self.done}
        if not todo:
            return
        kernels_providers.check_correct(case, self.device, self.dtype, self.ours)
        for name in providers:
            if name in todo:
                results = time_job(providers[name], self.device, self.dtype, name == "bevt_ds", case)
                for direction, result in results.items():
                    extra = attention_row(case, direction, self.limits, self.dtype)
                    self.write("window_attention", case.name, name, direction, result, extra)

    def others(self, jobs: Iterable[tuple], check: Callable[..., None]) -> None:
        """Jobs of other ops, as (op, case, provider, maker); `check` raises where ours is wrong."""
        for op, case, name, make in jobs:
            if name in self.names and (op, case.name, name) not in self.done:
                check(case, self.device, self.dtype, self.ours)
                results = time_job(make, self.device, self.dtype, name == "bevt_ds", case)
                for direction, result in results.items():
                    self.write(op, case.name, name, direction, result, {})

    def fused(self) -> None:
        """Residual sums with norms, linear layers with GELU."""
        kernels_fused.check_fused(self.device, self.dtype)
        for op, case, name, make in kernels_fused.fused_jobs(self.device):
            if name in self.names and (op, case.name, name) not in self.done:
                results = time_job(make, self.device, self.dtype, name == "bevt_ds", case)
                for direction, result in results.items():
                    self.write(op, case.name, name, direction, result, {})


def soak_jobs(device: str, cases: list[Case]) -> Iterator[tuple[str, Job]]:
    """Every kernel that the models launch: each window in each type, and the masked ops in each type."""
    dtypes = (torch.bfloat16, torch.float16, torch.float32) if device == "cuda" else (torch.float32,)
    provider = "triton" if device == "cuda" else "torch"
    for dtype in dtypes:
        for case in cases:
            yield f"{case.name} {dtype}", kernels_providers.ours(case, device, dtype, provider)
        for op, case, name, make in (*kernels_masked.masked_jobs(device), *kernels_fused.fused_jobs(device)):
            if name == "bevt_ds":
                yield f"{op} {case.name} {dtype}", make(case, device, dtype)


def soak(device: str, launches: int, cases: list[Case]) -> None:
    """Every job that many times forward and backward; a difference in one bit raises."""
    for name, job in soak_jobs(device, cases):
        first = job.backward(outputs := job.forward())
        for _ in range(launches):
            again = job.forward()
            pairs = zip((*outputs, *first), (*again, *job.backward(again)), strict=True)
            if not all(torch.equal(a, b) for a, b in pairs):
                raise AssertionError(f"{name}: two launches differ")
        print(f"{name}: {launches} launches, all equal", flush=True)


def part_of(cases: list[Case], part: str) -> list[Case]:
    """The i-th of n parts, '1/6' being the first."""
    i, n = (int(number) for number in part.split("/"))
    return cases[i - 1 :: n]


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--part", help="i/n of the shapes beyond the default ones")
    parser.add_argument("--only", default="", help="only the shapes whose name contains this; not the masked ops")
    parser.add_argument("--providers", nargs="+", choices=NAMES, default=NAMES, help="default: all")
    parser.add_argument(
        "--soak", nargs="?", type=int, const=1000, help="repeat, 1000 times or so many, instead of timing"
    )
    parser.add_argument("--sweep", action="store_true", help="time tiles instead, and print the table's entry")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = True
    if device == "cpu":
        if arguments.part:
            parser.error("--part is for a GPU: the other shapes would take a CPU hours")
        print("No GPU: small shapes on the CPU. These numbers say nothing about the Triton kernels.")
    if arguments.soak:
        on_gpu = device == "cuda"
        return soak(device, arguments.soak if on_gpu else 3, soak_cases() if on_gpu else small_cases())
    if arguments.sweep:
        return print(kernels_sweep.sweep(device, arguments.out))
    cases = small_cases() if device == "cpu" else default_cases()
    cases = part_of(further_cases(), arguments.part) if arguments.part else cases
    if not (chosen := [case for case in cases if arguments.only in case.name]):
        parser.error(f"--only {arguments.only!r} is in no name: {', '.join(case.name for case in cases)}")
    run = Run(device, rows_of("kernels", provenance(device)["device"], arguments.out), arguments.providers)
    for case in chosen:
        run.attention(case)
    if not arguments.part and not arguments.only:
        run.others(kernels_masked.masked_jobs(device), kernels_masked.check_masked)
        run.others(kernels_blocks.block_jobs(device), kernels_blocks.check_block)
        run.fused()
    report.write(run.path)
    print(pages.goal_table(kernels_goals.figures(list(read_rows(run.path)))))
    print(f"rows, page and plot: {run.path}")


if __name__ == "__main__":
    main()
