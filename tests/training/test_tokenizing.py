"""Training a tokenizer: a small run, exact resume, ranks, and what the run is good for: the ids of a pretraining."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from bevt_ds import UserError, load_tokenizer, train_tokenizer
from bevt_ds.config.recipes import get_recipe, recipe_for
from bevt_ds.config.schema import Config
from bevt_ds.config.tokenizing import TokenizerTrainingConfig
from bevt_ds.config.validate import missing_inputs, validate
from bevt_ds.data.reading.index import load_shard
from bevt_ds.eval.reconstruction import quality, sums_of
from bevt_ds.model.tokenizers.vq import VQOutput
from bevt_ds.shards.synthetic.draw import ensure_demo_shards
from bevt_ds.train.tokenizing import frames_a_step, make_tokenizer, reconstruction_loss, step_flops
from tests.training.processes import SMALL, Finished, launch, run_ranks, start_python, wait_for

EVERY_SHARD = ("videos", "images", "eval_videos", "eval_images")
HOUR = 3600.0
TINY = {
    "data.size": 64,
    "data.token_size": 32,
    "data.short_side": "64,80",
    "data.eval_images": "",
    "data.holdout": 0.3,
    "model.width": 8,
    "model.codes": 16,
    "model.patience": 1,
    "perceptual.levels": 1,
    "train.global_images": 4,
    "train.micro_images": 2,
    "train.log_every": 1,
    "train.eval_batches": 1,
}


def train(folder: Path, settings: dict[str, object], world: int = 1) -> Finished:
    words = [f"{key}={value}" for key, value in {**TINY, **settings, "output_dir": folder}.items()]
    ranks = start_python(["bevt_ds/train_tokenizer.py", "recipe=vq_demo", *words], world)
    output = wait_for(ranks)[0]
    return Finished(max(rank.returncode for rank in ranks), output, folder)


@pytest.fixture(scope="module")
def run(tmp_path_factory, shards) -> Finished:
    """Four steps of two micro-steps, a checkpoint after two of them."""
    settings = {"data.images": shards["data.images"], "train.steps": 4, "train.checkpoint_every": 2}
    run = train(tmp_path_factory.mktemp("vq") / "run", settings)
    assert run.code == 0, run.output
    return run


def test_tokenizer_run_says_what_it_has_learned(run):
    line = run.log()[-1]
    assert line["loss_commitment"] < run.log()[0]["loss_commitment"]  # four steps see other images each: no other falls
    assert {"loss", "loss_pixels", "loss_perceptual", "loss_commitment", "psnr", "explained", "epoch"} <= set(line)
    assert 0 < line["codebook_use"] <= 1 and 1 <= line["codebook_perplexity"] <= 16
    assert line["loss"] == pytest.approx(
        line["loss_pixels"] + 0.25 * line["loss_commitment"] + 0.5 * line["loss_perceptual"]
    )
    assert "resnet10t, random weights: none were named" in run.output
    summary = json.loads((run.folder / "summary.json").read_text())["image"]
    assert summary["frames"] == 2 and sum(summary["id_counts"]) == 2 * 16 and "psnr" in summary
    assert "ids in use" in run.output
    for name in ("samples.png", "panels/step-00000002.png"):
        assert Image.open(run.folder / name).width > 100


def test_stopped_tokenizer_run_continues_bit_for_bit(run, tmp_path, shards):
    """Codes, their averages and idle times are part of the checkpoint: the same losses and weights come out."""
    folder = shutil.copytree(run.folder, tmp_path / "run")
    for path in (folder / "checkpoints" / "step-00000004", folder / "weights"):
        shutil.rmtree(path)
    settings = {"data.images": shards["data.images"], "train.steps": 4, "train.checkpoint_every": 2}
    again = train(folder, {**settings, "resume": "auto"})
    assert again.code == 0 and "continuing from step 2" in again.output, again.output
    names = ("step", "loss", "codebook_use", "grad_norm")
    assert [[row[n] for n in names] for row in again.log()] == [[row[n] for n in names] for row in run.log()]
    first, second = (load_file(f / "weights" / "model.safetensors") for f in (run.folder, folder))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert {"quantiser.codebook", "quantiser.sums", "quantiser.idle"} < first.keys()


def test_tokenizer_of_two_ranks_learns_what_that_of_one_does(run, tmp_path, shards):
    """The codebook follows the global batch, and dead codes take vectors of either rank."""
    settings = {"data.images": shards["data.images"], "train.steps": 1, "train.checkpoint_every": 2}
    two = train(tmp_path / "run", settings, world=2)
    assert two.code == 0, two.output
    for name in ("loss", "codebook_perplexity", "grad_norm"):
        assert two.log()[0][name] == pytest.approx(run.log()[0][name], rel=1e-4), name


def test_trained_tokenizer_gives_pretraining_its_ids(run, tmp_path, small):
    """tokenizer.weights=RUN: the head has its vocabulary, and what is predicted is shown decoded."""
    settings = {**small, "train.steps": 2, "tokenizer.name": "vq", "tokenizer.weights": run.folder}
    settings |= {"tokenizer.vocab_size": SMALL["tokenizer.vocab_size"]}
    pretrained = run_ranks(tmp_path / "run", settings)
    assert pretrained.code == 0, pretrained.output
    arch = json.loads((pretrained.folder / "weights" / "config.json").read_text())["arch"]
    assert arch["vocab_size"] == load_tokenizer("vq", str(run.folder)).vocab_size == 16
    (start,) = json.loads((pretrained.folder / "run.json").read_text())["starts"]
    assert start["tokenizer"]["file"].endswith("model.safetensors")
    rows = Image.open(pretrained.folder / "samples.png").height / 180
    assert rows > 4


# Without a run


def test_recipes_of_tokenizers():
    """vq_in1k has BEVT's ids and grid; on own images the demo's held-out shards leave."""
    config = validate(get_recipe("vq_in1k", TokenizerTrainingConfig))
    assert make_tokenizer(config.model).vocab_size == 8192 and config.data.token_size // 8 == 14
    demo = get_recipe("vq_demo", TokenizerTrainingConfig)
    assert demo.data.images == get_recipe("demo", Config).data.images
    own = recipe_for("vq_demo", TokenizerTrainingConfig, {"data.images": "mine.tar"})
    assert own.data.eval_images == ""
    with pytest.raises(UserError, match=r"model.levels=8,x: must be whole numbers"):
        validate(replace(demo, model=replace(demo.model, levels="8,x")))
    lacking = replace(demo, perceptual=replace(demo.perceptual, weights="none.pth"))
    assert list(missing_inputs(lacking)) == ["perceptual.weights=none.pth: no such file."]
    assert step_flops(demo) > 0


def test_dry_run_of_vq_in1k(shards, tmp_path, capsys):
    """8192 ids and 50 epochs of the images that the shards hold; what is missing is named."""
    samples = len(load_shard(str(shards["data.images"])).only("image"))  # indexes it, so that it can be counted
    settings = {
        "recipe": "vq_in1k",
        "data.images": shards["data.images"],
        "perceptual.network": "resnet10t",
        "output_dir": tmp_path / "run",
        "dry_run": "true",
    }
    words = [f"{key}={value}" for key, value in settings.items()]
    assert train_tokenizer.main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    config = get_recipe("vq_in1k", TokenizerTrainingConfig)
    parameters = sum(p.numel() for p in make_tokenizer(config.model).parameters())
    assert f"parameters     {parameters:,}" in lines
    assert f"steps          {-(-50 * samples // 256)}, each of 256 images" in lines
    assert any(line.startswith("arithmetic") and "no perceptual network" in line for line in lines)
    assert train_tokenizer.main([*words, "perceptual.weights=none.pth"]) == 2
    assert "perceptual.weights=none.pth: no such file." in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.timeout(2 * HOUR)
def test_demo_tokenizer_learns_and_so_does_the_joint_demo_with_it(tmp_path):
    """`recipe=vq_demo` as it is, and `recipe=demo` with its ids, which fails below a gain of 0.2 nats."""
    shards = tmp_path / "shards"
    data = {f"data.{key}": getattr(get_recipe("demo").data, key) for key in EVERY_SHARD}
    ensure_demo_shards(shards)
    own = {key: str(shards / Path(value).name) for key, value in data.items()}
    images = {key: own[key] for key in ("data.images", "data.eval_images")}
    words = [f"{key}={value}" for key, value in {**images, "output_dir": tmp_path / "vq"}.items()]
    output = launch(["bevt_ds/train_tokenizer.py", "recipe=vq_demo", *words], 1, HOUR)
    found = json.loads((tmp_path / "vq" / "summary.json").read_text())["image"]
    assert found["psnr"] > 16 and found["explained"] > 0.55 and found["codebook_use"] > 0.9, output
    words = [f"{key}={value}" for key, value in {**own, "output_dir": tmp_path / "joint"}.items()]
    words += ["tokenizer.name=vq", f"tokenizer.weights={tmp_path / 'vq'}"]
    output = launch(["bevt_ds/pretrain.py", "recipe=demo", *words], 1, HOUR)
    summary = json.loads((tmp_path / "joint" / "summary.json").read_text())
    assert all(summary[stream]["gain"] > 0.4 for stream in ("video", "image")), output


@pytest.mark.parametrize("quantiser", ["ema", "fsq"])
def test_quantiser_is_a_field(quantiser):
    demo = get_recipe("vq_demo", TokenizerTrainingConfig)
    tokenizer = make_tokenizer(replace(demo.model, quantiser=quantiser))
    assert type(tokenizer.quantiser).__name__ == {"ema": "EMACodebook", "fsq": "FSQ"}[quantiser]
    assert tokenizer.vocab_size == 64


def test_reconstruction_loss_by_hand():
    """Pixels and commitment alone, of two frames with four ids each."""
    demo = get_recipe("vq_demo", TokenizerTrainingConfig)
    frames, shown = torch.zeros(2, 3, 16, 16), torch.full((2, 3, 16, 16), 0.5)
    output = VQOutput(shown, torch.zeros(2, 2, 2, dtype=torch.int64), torch.tensor(8.0))
    loss, sums = reconstruction_loss(demo, None, frames, output)
    assert loss.item() == pytest.approx(2 * 0.5 + 0.25 * 8 / 4)
    assert sums["frames"] == 2 and sums["loss_pixels"] == 1.0


def test_figures_of_a_reconstruction():
    """The mean colour explains nothing, the frame itself everything; psnr is of the mean squared error."""
    frames = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    flat = frames.mean((2, 3), keepdim=True).expand_as(frames)
    as_floats = lambda sums: {name: float(value) for name, value in sums.items()}  # noqa: E731
    assert quality(as_floats(sums_of(frames, flat)))["explained"] == pytest.approx(0, abs=1e-6)
    assert quality(as_floats(sums_of(frames, frames)))["explained"] == 1
    assert quality(as_floats(sums_of(torch.zeros(1, 3, 8, 8), torch.full((1, 3, 8, 8), 0.1))))["psnr"] == pytest.approx(
        20
    )


def test_loss_counts_frames_of_the_whole_step():
    config = get_recipe("vq_in1k", TokenizerTrainingConfig)
    both = replace(config, train=replace(config.train, global_clips=2))
    assert (frames_a_step(config), frames_a_step(both)) == (256, 256 + 2 * 16)
