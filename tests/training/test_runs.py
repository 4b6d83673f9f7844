"""Pretraining runs on committed shards: golden curve, ranks, exact resume, run folder, launchers."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import bevt_ds
from bevt_ds.config.parse import from_dict
from bevt_ds.model.presets import create_model
from bevt_ds.model.weights import load_init
from bevt_ds.shards.pack import pack
from tests.training.golden_curve import FILE, curve_run
from tests.training.preloaded import Forked
from tests.training.processes import (
    ROOT,
    SECONDS,
    SMALL,
    Finished,
    command,
    environment,
    free_port,
    run_ranks,
    start_ranks,
    wait_for,
)
from tests.waiting import until


def test_losses_equal_the_golden_curve(tmp_path, shards):
    """A refactor must not move the losses. Bits differ between CPUs, hence the tolerance."""
    run = curve_run(tmp_path / "run", shards)
    assert run.code == 0, run.output
    expected = json.loads(FILE.read_text())
    assert [line["step"] for line in run.log()] == [line["step"] for line in expected]
    for line, golden in zip(run.log(), expected, strict=True):
        assert {k: line[k] for k in golden} == pytest.approx(golden, rel=1e-4)


def test_pretraining_run_folder_contents(tmp_path, small, shards):
    held_out = {key.replace("data.", "data.eval_"): path for key, path in shards.items()}
    settings = {**small, **held_out, "train.steps": 2, "train.eval_batches": 1}
    run = run_ranks(tmp_path / "run", settings)
    assert run.code == 0, run.output
    assert from_dict(json.loads((run.folder / "config.json").read_text())).train.steps == 2
    assert {"step", "loss", "loss_video", "acc_image", "lr", "grad_norm", "clips_per_s", "data_wait", "mfu"} <= set(
        run.log()[0]
    )
    assert {"time", "epoch", "peak_bytes", "skipped_steps"} <= set(run.log()[0])
    assert run.log()[1]["epoch"] == 2 * run.log()[0]["epoch"] > 0
    (start,) = json.loads((run.folder / "run.json").read_text())["starts"]
    assert start["outcome"] == "finished" and "bevt_ds/pretrain.py" in start["command"]
    console = (run.folder / "console.log").read_text()
    assert "output in" in console and "2/2" in console and "unigram entropy" in console and "\r" not in run.output
    assert list((run.folder / "tensorboard").glob("events*"))
    summary = json.loads((run.folder / "summary.json").read_text())
    assert {"loss", "accuracy", "unigram_entropy", "commonest_rate", "gain"} <= set(summary["video"])
    assert "unigram entropy" in run.output
    assert Image.open(run.folder / "samples.png").width > 500
    model = bevt_ds.BEVT.from_pretrained(run.folder / "weights")
    saved = load_file(run.folder / "weights" / "model.safetensors")
    assert set(saved) == set(model.state_dict())

    again = run_ranks(run.folder, settings)
    assert (again.code, "which a new run would overwrite" in again.output) == (2, True)


@pytest.mark.parametrize("stage", [2, 3])
def test_image_only_run_leaves_clip_parameters_untouched(tmp_path, small, stage):
    """Right value: the initialisation of the seed, in fp32 although the run computes in bf16; also after a resume."""
    settings = {**small, "train.global_clips": 0, "train.precision": "bf16", "model.window": "2,2,2"}
    settings |= {"train.steps": 3, "train.checkpoint_every": 2, "optim.lr": 0.1, "optim.warmup_steps": 0}
    run = run_ranks(tmp_path / "run", settings, stage=stage)
    assert run.code == 0, run.output
    shutil.rmtree(run.folder / "checkpoints" / "step-00000003")
    again = run_ranks(run.folder, {**settings, "resume": "auto"}, stage=stage)
    assert again.code == 0 and "continuing from step 2" in again.output, again.output
    initial = create_model("tiny", vocab_size=64, window=(2, 2, 2))
    initial.init_weights(torch.Generator().manual_seed(0))
    saved = load_file(run.folder / "weights" / "model.safetensors")
    kept = {name for name, value in initial.state_dict().items() if saved[name].equal(value)}
    tables = {name for name in saved if name.endswith("bias_table")}
    assert kept - tables == {name for name in saved if name.startswith(("video_decoder.", "encoder.patch_embed."))}
    joint = create_model("tiny", vocab_size=64, window=(2, 2, 2))
    assert set(load_init(joint, run.folder / "weights").fresh) == {n for n in saved if n.startswith("video_decoder.")}
    assert not list(run.folder.rglob("*.py"))


STOCHASTIC = {"model.drop_path": 0.3, "train.steps": 5, "train.checkpoint_every": 2, "optim.warmup_steps": 6}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, shards) -> Callable[[int], Finished]:
    """whole(stage): five steps in the middle of the warm-up on two ranks, with drop-path, run once at each stage."""

    @cache
    def run(stage: int) -> Finished:
        run = run_ranks(tmp_path_factory.mktemp("whole") / "run", {**SMALL, **shards, **STOCHASTIC}, 2, stage)
        assert run.code == 0, run.output
        return run

    return run


def test_pretraining_losses_do_not_depend_on_ranks(tmp_path, small, whole):
    alone, both = run_ranks(tmp_path / "one", {**small, **STOCHASTIC}), whole(2)
    assert alone.code == 0, alone.output
    for one, two in zip(alone.losses(), both.losses(), strict=True):
        assert two == pytest.approx(one, rel=2e-4)
    ratio = both.log()[-1]["optimizer_bytes"] / alone.log()[-1]["optimizer_bytes"]
    assert 0.49 < ratio < 0.52


@pytest.mark.parametrize("stage", [2, 3])
def test_killed_pretraining_continues_bit_for_bit(tmp_path, small, whole, stage):
    """SIGKILL in the middle of the warm-up, 2 ranks, drop-path 0.3: every later loss is equal to the last bit."""
    settings, folder = {**small, **STOCHASTIC}, tmp_path / "killed"
    ranks = start_ranks({**settings, "output_dir": folder}, world=2, stage=stage)
    wait_for_step(folder / "log.jsonl", 2, ranks)
    until(lambda: any((folder / "checkpoints").glob("step-*")))  # written in the background
    for rank in ranks:
        rank.kill()
        rank.communicate()
    resumed = run_ranks(folder, {**settings, "resume": "auto"}, world=2, stage=stage)
    assert resumed.code == 0, resumed.output
    assert "continuing from step 2" in resumed.output or "continuing from step 4" in resumed.output
    assert resumed.losses() == whole(stage).losses()
    final = [load_file(f / "weights" / "model.safetensors") for f in (whole(stage).folder, folder)]
    assert all(final[0][name].equal(final[1][name]) for name in final[0])


def wait_for_step(log: Path, step: int, ranks: list[Forked]) -> None:
    until(lambda: last_step(log) >= step, ranks)


def last_step(log: Path) -> int:
    """The last step with a whole line in the log, or -1."""
    lines = log.read_text().split("\n")[:-1] if log.exists() else []
    return json.loads(lines[-1])["step"] if lines else -1


@pytest.mark.dist
def test_run_starts_with_the_deepspeed_launcher(tmp_path, small):
    """torchrun: see the next test."""
    settings = {**small, "train.steps": 1, "output_dir": tmp_path / "run"}
    done = subprocess.run(
        [Path(sys.executable).parent / "deepspeed", "--master_port", str(free_port()), *command(2, settings)],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert last_step(tmp_path / "run" / "log.jsonl") == 0


@pytest.mark.dist
def test_two_launches_with_their_own_node_rank_train_together(tmp_path, small, whole):
    """As on two machines, a rank each: the losses are those of two ranks of one machine, to the last bit."""
    words = command(2, {**small, **STOCHASTIC, "output_dir": tmp_path / "run"})
    torchrun = [Path(sys.executable).parent / "torchrun", "--nnodes=2", "--nproc_per_node=1"]
    torchrun += ["--master_addr=127.0.0.1", f"--master_port={free_port()}"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    start = partial(subprocess.Popen, cwd=ROOT, env=environment(), **pipes)
    nodes = [start([*torchrun, f"--node_rank={node}", *words]) for node in range(2)]
    outputs = wait_for(nodes)
    assert [node.returncode for node in nodes] == [0, 0], outputs
    (entry,) = json.loads((tmp_path / "run" / "run.json").read_text())["starts"]
    assert entry["ranks"] == 2
    assert Finished(0, outputs[0], tmp_path / "run").losses() == whole(2).losses()


def test_pretraining_on_real_media(tmp_path, small, media):
    """The main job on real clips (H.264 and MPEG-4, MP4 and AVI) and real JPEGs, without a bad sample."""
    for kind, split in (("video", "clips"), ("image", "images")):
        pack(media, tmp_path / "shards", kind, split=split)
    real = {"data.videos": tmp_path / "shards/clips-*.tar", "data.images": tmp_path / "shards/images-*.tar"}
    run = run_ranks(tmp_path / "run", {**small, **real, "train.steps": 2, "data.stride": 2})
    assert run.code == 0, run.output
    assert len(run.log()) == 2
    assert (run.folder / "samples.png").exists()
    assert not (run.folder / "bad_samples.jsonl").exists()


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"data.videos": "nowhere/clips-{000..001}.tar"}, "nowhere/clips-000.tar"),
        ({"data.eval_images": "nowhere/*.tar"}, "nowhere/*.tar"),
        ({"init_from": "README.md"}, "README.md"),
        ({"model.kernels": "triton"}, "on a CPU"),
        ({"tokenizer.name": "dalle", "tokenizer.weights": "README.md"}, "README.md"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_user_mistake_is_one_line_and_exit_code_2(tmp_path, small, settings, part):
    run = run_ranks(tmp_path / "run", {**small, **settings})
    errors = [line for line in run.output.splitlines() if line.startswith("error: ")]
    assert (run.code, len(errors)) == (2, 1), run.output
    assert part in errors[0]
    assert "Traceback" not in run.output
    assert run.output.splitlines()[-1] == errors[0]
    kept = tmp_path / "run" / "console.log"  # not there if the command line was refused before the folder was made
    assert not kept.exists() or kept.read_text().splitlines()[-1] == errors[0]


def test_checkout_next_to_another_installed_copy_is_an_error(tmp_path):
    """A non-editable install run from inside the checkout would mix two versions of the code."""
    copy = tmp_path / "bevt_ds" / "pretrain.py"
    copy.parent.mkdir()
    shutil.copy(ROOT / "bevt_ds" / "pretrain.py", copy)
    done = subprocess.run([sys.executable, str(copy), "--help"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1
    assert "pip install -e" in done.stderr
    assert "Traceback" not in done.stderr
