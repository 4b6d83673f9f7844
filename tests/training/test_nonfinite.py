"""A step whose loss or gradient is not finite: skipped alike everywhere, named, counted, and too many stop the run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bevt_ds.config.deepspeed import read_json
from bevt_ds.errors import UserError
from bevt_ds.exit_codes import FINISHED, NON_FINITE
from bevt_ds.train.nonfinite import describe
from tests.training.processes import launch, launch_rows

SLOW_SECONDS = 900  # 28 engines, on a machine that may be busy

# Who reads a number from the device in a step, by stage and precision. On a GPU `after_step` copies its flag without
# waiting; the others wait, once or twice a step.
FLAG, NORM = ["after_step"], ["is_invalid_grad_norm"]
READS = {(0, "fp32"): FLAG, (1, "fp32"): FLAG, (1, "bf16"): ["clip_tensors_by_global_norm", *NORM], (2, "fp32"): FLAG}
READS |= {(2, "bf16"): FLAG, (3, "fp32"): NORM, (3, "bf16"): NORM}

PARAMETERS = [f"{layer}.{part}" for layer in ("first", "last", "norm") for part in ("bias", "weight")]


@pytest.mark.parametrize("world", [1, 2])
def test_non_finite_step_is_left_out_to_the_last_bit(tmp_path, world):
    """Stages 0 to 3, fp32 and bf16, of a NaN in pixels, an infinite loss, an infinite gradient of one micro-step."""
    rows = launch_rows("nonfinite_matrix", tmp_path, world, seconds=SLOW_SECONDS)
    assert len({(row["stage"], row["precision"], row["site"]) for row in rows}) == len(rows) == 21, rows
    for row in rows:
        assert row["skipped"] == [False, True, False] and row["counted"] == 1, row
        assert row["equal"] and row["tensors"] > 9 and row["finite"], row
        assert not row["grad_norm"] and row["later"] and row["norms"] == PARAMETERS, row
        assert row["reads"] == READS[row["stage"], row["precision"]], row
        assert row["may save spoilt"] == [False, False, False], row


@pytest.mark.parametrize(
    "section", [{"bf16": {"check_grad_overflow": False}}, {"zero_optimization": {"compute_grad_norm": False}}]
)
def test_deepspeed_json_that_disables_the_overflow_check_is_refused(tmp_path, section):
    path = tmp_path / "unguarded.json"
    path.write_text(json.dumps(section))
    with pytest.raises(UserError, match=f"remove {next(iter(section))}"):
        read_json(str(path))


def test_non_finite_message_names_what_is_known():
    report = {
        "step": 7,
        "losses": [[1.0, 2.0], [3.0, "nan"]],
        "keys": [[["a/1"], ["a/2"]], [["a/3"], ["a/4", "a/5"]]],
        "norms": {"w": "nan"},
    }
    assert describe(report) == "step 7 is skipped: its loss is nan on rank 1 in micro-step 1; samples: a/4, a/5."
    report["losses"][1][1] = 4.0
    line = "step 7 is skipped: the loss is finite, its gradient is not, in w; samples: a/1, a/2, a/3, a/4 and 1 more."
    assert describe(report) == line
    report["limit"] = 15.5
    spike = "step 7 is skipped: its loss is a spike, 16 on rank 1 in micro-step 1, over 15.5; samples: a/4, a/5."
    assert describe(report) == spike
    report |= {"norms": {"w": 1e30}, "keys": [[[]]], "limit": "inf"}
    assert describe(report) == "step 7 is skipped: its gradient's norm overflows; samples: unknown."


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Path, dict]:
    """Runs of one process, by name: exit code, error and output."""
    folder = tmp_path_factory.mktemp("runs")
    output = launch(["-m", "tests.training.nonfinite_runs", str(folder)], 1, SLOW_SECONDS)
    assert (folder / "ends.json").exists(), output
    return folder, json.loads((folder / "ends.json").read_text()) | {"output": output}


def log(folder: Path) -> dict[int, dict]:
    lines = [json.loads(line, parse_constant=pytest.fail) for line in (folder / "log.jsonl").read_text().splitlines()]
    return {line["step"]: line for line in lines}


def commits(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").glob("step-*"))


def test_run_continues_after_a_non_finite_step(runs):
    """Its curve is that of a run whose bad steps were taken out; a checkpoint that is due waits for a good step."""
    folder, ends = runs
    assert ends["some"] == [FINISHED, ""], ends["output"]
    some, removed = log(folder / "some"), log(folder / "removed")
    assert [step for step, line in some.items() if line["loss"] is None] == [5, 6, 7, 15]
    assert all(some[step]["grad_norm"] is None for step in (5, 6, 7, 15))
    assert [some[step]["skipped_steps"] for step in (4, 5, 7, 14, 47)] == [0, 1, 3, 3, 4]
    good = [step for step, line in some.items() if line["loss"] is not None]
    assert [some[step]["loss"] for step in good] == [removed[i]["loss"] for i in range(len(good))]
    assert commits(folder / "some") == ["step-00000017", "step-00000032", "step-00000048"]


def test_skipped_step_is_named_with_its_samples(runs):
    folder, ends = runs
    line = "step 15 is skipped: its loss is nan on rank 0 in micro-step 0; samples: points/15."
    assert line in ends["output"]
    found = sorted((folder / "some" / "nonfinite").glob("step-*"))
    assert [path.name[-2:] for path in found] == ["05", "06", "07", "15"]
    report = json.loads((found[-1] / "report.json").read_text())
    assert (report["step"], report["losses"], report["keys"]) == (15, [["nan"]], [[["points/15"]]])
    assert report["norms"] == {"line.weight": "nan"}


def test_bundle_holds_the_weights_of_its_step_where_the_host_is_told_late(runs):
    """As on a GPU, which is asked once the next gradient is on its way, but before the next update."""
    folder, ends = runs
    assert ends["late"] == [FINISHED, ""] and ends["waits"] == 48, ends["output"]
    found = sorted((folder / "late" / "nonfinite").glob("step-*"))
    assert [path.name[-2:] for path in found] == ["05", "06", "07", "15"]
    weights = []
    for path in found:
        at_once = folder / "some" / "nonfinite" / path.name
        shown, expected = (torch.load(bundle / "model" / "line.pt")["line.weight"] for bundle in (path, at_once))
        assert torch.equal(shown, expected), path
        assert (path / "report.json").read_bytes() == (at_once / "report.json").read_bytes()
        weights.append(shown)
    assert torch.equal(weights[0], weights[2]) and not torch.equal(weights[2], weights[3])


@pytest.mark.parametrize(
    ("name", "last", "reason"),
    [
        ("all", 25, "6 steps in a row and 6 in all were skipped: over train.max_skipped=5,50"),
        ("many", 26, "1 steps in a row and 4 in all were skipped: over train.max_skipped=5,3"),
    ],
)
def test_too_many_non_finite_steps_stop_the_run(runs, name, last, reason):
    folder, ends = runs
    code, error = ends[name]
    assert code == NON_FINITE, ends["output"]
    assert f"step {last} is skipped" in error and f"points/{last}" in error and reason in error
    assert "step-00000016. Continue from the last checkpoint: the same command with resume=auto" in error
    assert commits(folder / name) == ["step-00000016"]
    assert not (folder / name / "weights").exists()


def test_spike_is_skipped_and_named_and_a_resumed_run_judges_the_same(runs):
    """Also where it goes on from the checkpoint of step 32; a run without the rule trains on the spike."""
    folder, ends = runs
    spike, kept, resumed = (log(folder / name) for name in ("spike", "spike kept", "spike resumed"))
    assert ends["spike"][0] == ends["spike resumed"][0] == FINISHED, ends["output"]
    assert [step for step, line in spike.items() if line["skipped_steps"]] == list(range(40, 48))
    assert all(line["skipped_steps"] == 0 for line in kept.values())
    assert spike[40]["loss"] == kept[40]["loss"] > 1e3 and spike[40]["grad_norm"] is None
    assert spike[41]["loss"] != kept[41]["loss"]
    assert [line["loss"] for line in spike.values()] == [line["loss"] for line in resumed.values()]
    assert ends["output"].count("step 40 is skipped: its loss is a spike, ") == 2
    report = json.loads((folder / "spike" / "nonfinite" / "step-00000040" / "report.json").read_text())
    assert report["losses"][0][0] == spike[40]["loss"] > report["limit"] > spike[39]["loss"]
    assert report["keys"] == [[["points/40"]]] and "is a spike" in report["why_no_batch"]


def test_count_of_non_finite_steps_survives_a_resume(runs):
    """Steps that were skipped before the checkpoint count in all."""
    _, ends = runs
    assert ends["resumed"][0] == NON_FINITE and "2 in all" in ends["resumed"][1], ends["output"]
