"""The kernel benchmark: competitors compute the same, and the page states only what was measured."""

import os
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks import kernels as kernels_benchmark
from benchmarks import (
    kernels_blocks,
    kernels_cases,
    kernels_fused,
    kernels_heads,
    kernels_masked,
    kernels_providers,
    kernels_sweep,
    pages,
)
from benchmarks.common import Timing, commit, read_rows, reason
from benchmarks.kernels_goals import GOALS, figures
from bevt_ds import kernels
from bevt_ds.kernels import configs
from bevt_ds.kernels.reference import partition

ROOT = Path(__file__).parents[2]
LIMITS = {"copy_bytes_s": 1e10, "matmul_flop_s": 1e11, "exp_s": None}
CASES = [case for case in kernels_cases.small_cases() if case.stream == "image"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("rival", ["eager", "eager_unbind", "sdpa"])
def test_competitors_compute_the_same_attention(case, rival):
    """From the same qkv and table, to float32 rounding; the original's mask is -100 and not minus infinity."""
    torch.manual_seed(0)
    qkv, table = kernels_providers.arguments(case, "cpu", torch.float32)
    ours = kernels.window_attention(qkv, table, case.windows, provider="torch")
    job = kernels_providers.CPU_PROVIDERS[rival](case, "cpu", torch.float32)
    with torch.no_grad():
        if rival == "sdpa":
            job.leaves[0].copy_(qkv)
        else:
            rolled = kernels_providers.rolled(qkv, case.windows.shift, -1)
            job.leaves[1].copy_(partition(rolled, case.windows.window).flatten(2))
        job.leaves[-1].copy_(table)
    outputs = job.forward()
    torch.testing.assert_close(outputs[0], ours, rtol=1e-4, atol=1e-5)
    assert all(grad.isfinite().all() for grad in job.backward(outputs))


def test_default_benchmark_shapes_are_swin_b():
    """Three shifted stages of four for clips, all four for images; the FLOPs of the published model."""
    cases = kernels_cases.default_cases()
    assert len(cases) == 15
    video = [case for case in cases if case.stream == "video"]
    assert sum(case.blocks for case in video) == 24
    forward = sum(case.blocks * case.flops("forward") for case in video)
    assert forward / 8 == pytest.approx(39.0e9, rel=0.01)
    executed = sum(case.blocks * case.flops("forward", dense=False) for case in video)
    assert executed / forward == pytest.approx(0.845, abs=0.005)


def test_benchmark_parts_cover_all_other_shapes_once():
    """--part 1/3, 2/3, 3/3 together are all further shapes."""
    from benchmarks.kernels import part_of

    cases = kernels_cases.further_cases()
    parts = [case.name for i in (1, 2, 3) for case in part_of(cases, f"{i}/3")]
    assert sorted(parts) == sorted(case.name for case in cases)
    assert len(set(parts)) == len(parts)


def row(provider, direction="both", p50=1.0, **more):
    """A measured row of one Swin-B case."""
    source = {"provenance": {"device": "GPU"}, "ceilings": {}}
    times = {"p50_ms": p50, "p20_ms": p50, "p80_ms": p50, "peak_mb": 1.0}
    case = {"op": "window_attention", "case": "b-stage1 8 video 8x7x7 plain", "blocks": 2, "dense_flops": 1e9}
    return case | {"provider": provider, "direction": direction} | times | source | more


def at_every_depth(rows):
    """The same of each kind of Swin-B's blocks of the rows' stream; rows of other ops as they are."""
    for one in rows:
        if one["op"] == "window_attention":
            cases = [case for case in kernels_cases.default_cases() if f" {case.stream} " in one["case"]]
            yield from (one | {"case": case.name, "blocks": case.blocks} for case in cases)
        else:
            yield one


def test_failed_competitor_voids_the_best():
    """The speedup over the best needs all competitors; the one over eager does not."""
    rows = [row("eager", p50=6.0), row("bevt_ds"), row("compile", p50=3.0), row("sdpa", p50=2.0)]
    goal_eager, goal_best, *_ = (name for name, *_ in GOALS)
    complete = figures([*at_every_depth([*rows, row("flex", p50=4.0)])])
    assert (complete[goal_eager], complete[goal_best]) == (6.0, 2.0)
    failed = row("flex", error="RuntimeError: no")
    failed.pop("p50_ms")
    partial = figures([*at_every_depth(rows), failed])
    assert (partial[goal_eager], partial[goal_best]) == (6.0, None)
    assert "not measured: RuntimeError: no" in pages.kernels([*rows, failed]).markdown()


@pytest.fixture
def same_precision():
    """A benchmark lets a GPU multiply in TF32; other tests must not."""
    before = torch.backends.cuda.matmul.allow_tf32
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def test_benchmark_of_selected_shapes_and_providers(tmp_path, monkeypatch, same_precision):
    """What is left out is measured by another call, which adds to the same file."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(kernels_benchmark, "measure", lambda run, device: Timing(1.0, 1.0, 1.0))
    monkeypatch.setattr(kernels_benchmark, "ceilings", lambda device: LIMITS)
    command = ["kernels", "--out", str(tmp_path), "--only", CASES[0].name, "--providers"]
    for names in (["sdpa"], ["sdpa", "bevt_ds"]):
        monkeypatch.setattr(sys, "argv", [*command, *names])
        kernels_benchmark.main()
    (path,) = tmp_path.glob("*.jsonl")
    rows = [(row["case"], row["provider"], row["direction"]) for row in read_rows(path)]
    directions = kernels_benchmark.DIRECTIONS
    assert rows == [(CASES[0].name, name, direction) for name in ("sdpa", "bevt_ds") for direction in directions]
    monkeypatch.setattr(sys, "argv", [*command[:4], "no such shape"])
    with pytest.raises(SystemExit):
        kernels_benchmark.main()


class Odd(Exception):
    """What no compiler is known to raise."""


def test_failing_competitor_leaves_its_reason():
    """And leaves its reason; a failure of ours ends the benchmark."""

    def make(*_):
        raise Odd

    results = kernels_benchmark.time_job(make, "cpu", torch.float32, False, "case")
    assert {result["error"] for result in results.values()} == {"Odd: no message"}
    with pytest.raises(Odd):
        kernels_benchmark.time_job(make, "cpu", torch.float32, True, "case")


def test_commit_can_be_given_without_git_history(monkeypatch):
    monkeypatch.setenv("BEVT_COMMIT", "of-which-it-is-a-copy")
    assert commit() == "of-which-it-is-a-copy"


def test_report_leaves_out_what_was_not_measured():
    """Without forward rows there is no forward rate."""
    rows = [*at_every_depth([row("eager", p50=6.0), row("bevt_ds")])]
    reached, goal = figures(rows), "clips, forward + backward against eager"
    assert reached["clips, forward"] is None and reached["clips, backward"] is None
    assert reached[goal] == 6.0
    assert figures(rows[1:])[goal] is None, "a kind of block is missing"
    later = [one | {"provenance": {"device": "GPU", "commit": "later"}} for one in rows if one["provider"] == "bevt_ds"]
    assert figures([*rows, *later])[goal] is None, "eager is another commit's"


def test_goals_are_stated_next_to_what_was_measured():
    """A forced backend that is faster than the three that run everything is the best; images count by their roof;
    rows of other ops with the same name stay apart."""
    rows = [row("eager", p50=9.0), *(row(name, p50=4.0) for name in ("compile", "sdpa", "flex", "bevt_ds"))]
    rows += [row("sdpa_cudnn", p50=2.0), row("sdpa_math", error="no"), row("bevt_ds", "forward", p50=2.0)]
    rows[-2].pop("p50_ms")
    image = {"case": "b-stage1 64 image 1x7x7 plain", "roof_ms": 1.0, "roof": "memory"}
    rows += [row("bevt_ds", p50=4.0, **image)]
    step = {"case": "b 8 clips 64 images"}
    rows += [
        row(name, p50=p50, peak_mb=274.0, op="masked_head", **step) for name, p50 in (("eager", 7), ("bevt_ds", 2))
    ]
    rows += [row(name, op="insert_mask_tokens", **step) for name in ("eager", "bevt_ds")]
    rows = [*at_every_depth(rows)]
    reached = figures(rows)
    assert list(reached.values()) == [2.25, 0.5, 0.5, None, 25.0, 3.5, 274.0]
    page = pages.kernels(rows).markdown()
    assert "| images, forward + backward, of the copy roof | 60 % | 75 % | 25.00 |" in page
    assert "masked_head b 8 clips 64 images" in page and "insert_mask_tokens b 8 clips 64 images" in page


def test_page_of_a_cpu_sets_no_goals():
    """And sets no goals next to its numbers."""
    page = pages.kernels([row("bevt_ds") | {"provenance": {"device": "CPU x86_64"}}]).markdown()
    assert "These are CPU numbers" in page
    assert "stretch" not in page


def test_masked_jobs_run():
    """Each job of the masked ops has an output and gradients, and ours agree with the reference."""
    case = kernels_masked.SMALL_STEP
    kernels_masked.check_masked(case, "cpu", torch.float32, "torch")
    for _, _, name, make in kernels_masked.masked_jobs("cpu"):
        if name in kernels_heads.LOSSES:
            continue  # of libraries, in a test of their own
        job = make(case, "cpu", torch.float32)
        assert all(grad.isfinite().all() for grad in job.backward(job.forward()))


def test_fused_jobs_run_and_agree():
    kernels_fused.check_fused("cpu", torch.float32)
    names = {(op, name) for op, _, name, _ in kernels_fused.fused_jobs("cpu")}
    assert names == {(op, name) for op in ("add_norm", "linear_gelu") for name in ("eager", "bevt_ds")}


def test_kernel_soak_finds_a_difference(capsys, monkeypatch):
    cases = [case for case in kernels_cases.small_cases() if case.stream == "image"][:1]
    kernels_benchmark.soak("cpu", 1, cases)
    assert "masked_head" in capsys.readouterr().out
    monkeypatch.setattr(kernels_benchmark.torch, "equal", lambda a, b: False)
    with pytest.raises(AssertionError, match="two launches differ"):
        kernels_benchmark.soak("cpu", 1, cases)


@pytest.fixture
def quick(monkeypatch):
    """No time is measured: every run counts as one millisecond."""
    monkeypatch.setattr(kernels_sweep, "measure", lambda run, device: Timing(1.0, 1.0, 1.0))


class Deadly(int):
    """A number that ends the process which receives it, as a compiler that crashes does."""

    def __reduce__(self):
        return os._exit, (1,)


def test_sweep_times_every_candidate_and_prints_the_table(tmp_path, quick, monkeypatch):
    """One of them kills the process that compiles it: it is a row with the reason, and the others are timed."""
    candidates, deadly = kernels_sweep.candidates, {"num_warps": Deadly(2), "num_stages": 1}
    monkeypatch.setattr(
        kernels_sweep,
        "candidates",
        lambda kernel, device: [*[(False, deadly)] * (kernel == "fwd_small"), *candidates(kernel, device)],
    )
    entry = kernels_sweep.sweep("cpu", tmp_path)
    (path,) = tmp_path.glob("tiles-*.jsonl")
    rows = list(read_rows(path))
    expected = {"fwd": 2, "bwd_kv": 2, "bwd_q": 1, "fwd_small": 3, "bwd_small": 2}
    assert Counter(row["kernel"] for row in rows) == expected
    failed = {(row["kernel"], row["options"]): row["error"] for row in rows if "error" in row}
    assert failed == {("fwd_small", "warps(2, 1)"): "the process that compiled it died"}
    held = eval(f"{{{entry}}}", vars(configs))
    assert held["interpreter"].keys() == {(kernel, "fp32") for kernel in expected}  # of equal times, no tile
    assert {row["kind"] for row in rows if row["kernel"] == "fwd"} == {"fp32", "fp32, bias tile"}
    assert '# no faster than the gather: ("fwd", "fp32, bias tile")' in entry
    assert held["interpreter"]["fwd_small", "fp32"] == configs.warps(4, 1)
    assert not configs.MEASURED["interpreter"]


def test_sweep_never_chooses_what_is_wrong_or_failed_somewhere(monkeypatch):
    case = {"kernel": "fwd", "kind": "fp32", "blocks": 2}
    rows = [
        case | {"case": "a", "options": "wrong somewhere", "p50_ms": 1.0},
        case | {"case": "b", "options": "wrong somewhere", "error": "AssertionError: out is off"},
        *(case | {"case": name, "options": "slow", "p50_ms": 9.0} for name in "ab"),
        *(case | {"case": name, "options": "right", "p50_ms": 2.0} for name in "ab"),
    ]
    assert '("fwd", "fp32"): right,  # 8 ms' in kernels_sweep.table_entry("sm_90", rows)
    small = kernels_cases.tiny_cases()[1]
    standard = kernels_providers.Standard.of(small, "cpu", torch.float32)
    monkeypatch.setattr(kernels_sweep, "run_attention", lambda inputs, case: [x + 1 for x in standard.exact])
    trial = kernels_sweep.Trial("fwd_small", configs.warps(4, 1), "cpu", torch.float32)
    assert "out is off by 1" in kernels_sweep.try_one(trial, standard, standard.inputs)["error"]


def test_tiles_are_those_of_the_architecture():
    """What was measured, and the default where nothing was."""
    from bevt_ds.kernels import launches

    qkv = torch.empty(1, 2, 7, 7, 3, 1, 32, dtype=torch.bfloat16, device="meta")
    found = {}
    for name in ("sm_90", "sm_100"):
        with launches.record(name):
            found[name] = launches.options_of("fwd", qkv)
    key = ("fwd", "16 bit")
    assert found["sm_90"] == configs.MEASURED["sm_90"][key] | {"D": 32, "TILED": False} != found["sm_100"]
    assert found["sm_100"] == configs.DEFAULT[key] | {"D": 32, "TILED": False}


@pytest.mark.parametrize("name", kernels_heads.LOSSES)
def test_libraries_compute_the_same_masked_head(name):
    """What is not installed leaves a reason; the others give our losses and gradients."""
    case, results = kernels_masked.SMALL_STEP, []
    for make in (partial(kernels_masked.rival_head, name=name), partial(kernels_masked.our_head, provider="torch")):
        torch.manual_seed(0)
        try:
            job = make(case, "cpu", torch.float32)
        except (ModuleNotFoundError, AttributeError) as error:  # not installed; torch before 2.13
            assert name in ("liger", "cut_cross_entropy", "torch_linear"), reason(error)
            return
        job.grads = (torch.tensor([1.0, 0.5]),)
        outputs = job.forward()
        results.append((*outputs, *job.backward(outputs)))
    for theirs, ours in zip(*results, strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)


def test_forced_backends_compute_the_same_or_say_why_not():
    case, found = CASES[0], {}
    for name, make in kernels_providers.FORCED.items():
        torch.manual_seed(0)
        try:
            job = make(case, "cpu", torch.float32)
        except RuntimeError as error:
            found[name] = reason(error)
            continue
        found[name] = job.forward()[0]
    torch.manual_seed(0)
    expected = kernels_providers.sdpa(case, "cpu", torch.float32).forward()[0]
    assert torch.is_tensor(found["sdpa_math"]) and "RuntimeError: " in found["sdpa_cudnn"]
    for result in found.values():
        if torch.is_tensor(result):
            torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", kernels_blocks.block_cases("cpu"), ids=lambda case: case.library)
def test_blocks_of_libraries_run_and_are_accelerated(case):
    kernels_blocks.check_block(case, "cpu", torch.float32, "torch")
    jobs = [kernels_blocks.block_job(case, mode, "torch", "cpu", torch.float32) for mode in ("eager", "accelerated")]
    for job in jobs:
        assert all(grad.isfinite().all() for grad in job.backward(job.forward()))


def test_script_for_a_gpu_goes_on_after_a_tool_that_is_missing(tmp_path):
    """And says so by its exit status; a step that there is not is refused."""
    script, path = ROOT / "benchmarks" / "kernels_on_gpu.sh", "/usr/bin:/bin"

    def call(**settings):
        environment = {"PATH": path, "OUT": str(tmp_path), "PYTHON": "echo", **settings}
        return subprocess.run(["bash", script], env=environment, capture_output=True, text=True)

    done = call(STEPS="memcheck soak")
    assert done.returncode == 1
    assert "not run: compute-sanitizer is not installed" in done.stdout
    assert (tmp_path / "soak.log").read_text() == "-m benchmarks.kernels --soak\n"
    assert call(STEPS="soak").returncode == 0
    dry = call(DRY="1")
    assert dry.returncode == 0 and "--tool racecheck" in dry.stdout and "ncu --set full" in dry.stdout
    assert call(STEPS="other").returncode == 2
