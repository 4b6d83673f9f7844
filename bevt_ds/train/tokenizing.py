"""Training of a tokenizer: what it gives to the loop, and its parts in the order in which they depend on each other."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from bevt_ds.batch import Batch
from bevt_ds.config.tokenizing import TokenizerTrainingConfig, VQConfig, levels_of
from bevt_ds.data.loader import Loader
from bevt_ds.eval.held_out import by_frequency, count_ids
from bevt_ds.eval.online_probe import codebook_use
from bevt_ds.eval.reconstruction import MOST, draw_reconstructions, quality, sums_of
from bevt_ds.folders import weights_of
from bevt_ds.model.frozen import FrozenFeatures
from bevt_ds.model.tokenizers.perceptual import perceptual_distance
from bevt_ds.model.tokenizers.vq import VQOutput, VQTokenizer
from bevt_ds.runtime import run_dir
from bevt_ds.runtime.engine import Engine
from bevt_ds.runtime.optim import parameter_groups
from bevt_ds.train.loop import run_training
from bevt_ds.train.task import Setup, StreamsTask, first_held_out, schedule_of, steps_of

FORWARD_AND_BACKWARD = 3  # a step's arithmetic, in forward passes
Setting = Setup[TokenizerTrainingConfig]


def train_tokenizer(
    config: TokenizerTrainingConfig, ds_values: Mapping[str, Any], notes: Sequence[str], given: Collection[str]
) -> int:
    """A whole run; returns the exit code. See `run_training`."""
    return run_training(config, ds_values, notes, open_tokenizing, given)


@dataclass
class Tokenizing(StreamsTask[TokenizerTrainingConfig]):
    """Reconstruction of the tokenizer's views through ids. perceptual: None where the run has no such loss.

    counts: ids of the steps since the last log line.
    """

    perceptual: FrozenFeatures | None
    counts: Tensor = field(init=False)
    shown: ClassVar[Mapping[str, str]] = {"loss": ".4f", "psnr": ".2f", "codebook_use": ".1%"}

    def __post_init__(self) -> None:
        self._step = 0
        self.counts = torch.zeros(self.tokenizer.vocab_size, dtype=torch.int64, device=self.ranks.device)

    @property
    def tokenizer(self) -> VQTokenizer:
        return self.engine.module

    def forward(self, batch: Batch, step: int, micro_step: int) -> tuple[Tensor, Mapping[str, Tensor]]:
        self._step, frames = step, views_of(batch)
        output: VQOutput = self.engine.forward(frames)
        loss, sums = reconstruction_loss(self.config, self.perceptual, frames, output)
        self.counts += count_ids(output.ids, len(self.counts))
        return loss / frames_a_step(self.config), sums

    def metrics(self, totals: Mapping[str, float], step: int) -> dict[str, float]:
        """Means over the frames of the global batch; psnr in dB, explained as a share of the frames' variance."""
        means = {name: totals[name] / totals["frames"] for name in ("loss", "loss_pixels", "loss_commitment")}
        if self.perceptual:
            means["loss_perceptual"] = totals["loss_perceptual"] / totals["frames"]
        return {**means, **quality(totals), "epoch": (step + 1) / self.loader.steps_an_epoch}

    def after_step(self) -> None:
        """Move the codebook, by what the whole global batch has chosen."""
        seed = self.config.train.seed + self._step
        self.tokenizer.quantiser.update(self.ranks.sum, self.ranks.rank, self.ranks.world, seed)

    def measurements(self, step: int) -> dict[str, float]:
        """codebook_use and codebook_perplexity, of the ids of the global batches since the last log line."""
        counts = self.ranks.sum(self.counts).cpu()
        self.counts = torch.zeros_like(self.counts)
        return codebook_use(counts)

    def draw(self, batch: Batch, path: Path) -> None:
        """Write frames and their reconstructions. Collective."""
        frames = views_of(batch).to(self.ranks.device)
        with self.ranks.writing(path), self.engine.evaluating():
            shown = self.engine.forward(frames[:MOST]).frames
            if self.ranks.is_main:
                draw_reconstructions(frames, shown, path)

    def describe(self) -> str:
        seen = self.perceptual.describe() if self.perceptual else "none"
        return f"{super().describe()}\n{self.tokenizer.vocab_size:,} ids; perceptual loss: {seen}"

    def finish(self, batches: Iterator[Batch]) -> str | None:
        """Write samples.png, and what held-out frames look like through ids, which is printed too."""
        held_out = self.held_out()
        self.draw(held_out[0] if held_out else next(batches), self.setup.folder / run_dir.SAMPLES)
        summary = self.evaluate(held_out)
        self.write_summary(summary, as_text(summary))
        return None

    def evaluate(self, batches: Sequence[Batch]) -> dict[str, dict[str, Any]]:
        """By stream, of held-out frames: psnr, explained, use and perplexity of ids. Collective; all ranks see all."""
        found = {}
        with self.engine.evaluating():
            for name in self.trained_streams:
                counts = torch.zeros(self.tokenizer.vocab_size, dtype=torch.int64)
                totals: dict[str, float] = {}
                for batch in batches:
                    frames = getattr(batch, name).view.to(self.ranks.device)
                    output = self.engine.forward(frames)
                    counts += count_ids(output.ids, len(counts)).cpu()
                    sums = sums_of(frames, output.frames).items()
                    totals = {key: totals.get(key, 0.0) + float(value) for key, value in sums}
                if totals.get("frames"):
                    ids = codebook_use(counts) | {"id_counts": by_frequency(counts)}
                    found[name] = {"frames": int(totals["frames"]), **quality(totals), **ids}
        return found


@contextmanager
def open_tokenizing(setup: Setting) -> Iterator[Tokenizing]:
    """Loss, loader and engine of a run. Shards that cannot be evaluated are found before the first step."""
    config, shown = setup.config, first_held_out(setup)
    perceptual = make_perceptual(config)
    with Loader(config, **setup.loading) as loader:
        steps = steps_of(config, loader)
        build = partial(make_engine, setup=setup, steps=steps)
        engine, _ = setup.begin_engine(build, loader.fingerprint)
        if perceptual:
            perceptual.to(setup.ranks.device, engine.dtype)
        yield Tokenizing(setup, loader, engine, steps, step_flops(config), perceptual, shown_batch=shown)


def make_perceptual(config: TokenizerTrainingConfig) -> FrozenFeatures | None:
    """The frozen network of the loss, if the run has one."""
    of = config.perceptual
    return FrozenFeatures(of.network, of.weights, of.levels, config.train.seed) if of.weight else None


def make_tokenizer(model: VQConfig) -> VQTokenizer:
    """The tokenizer that a configuration describes, its weights not yet drawn by the run's seed."""
    levels = levels_of(model.levels) if model.quantiser == "fsq" else ()
    codes = {name: getattr(model, name) for name in ("code_dim", "codes", "decay", "patience")}
    return VQTokenizer(width=model.width, blocks=model.blocks, levels=levels, **codes)


def load_start(config: TokenizerTrainingConfig, folder: Path, model: VQTokenizer | None = None) -> None:
    """Put weights to start from into the run's tokenizer. UserError: they do not fit."""
    (model or make_tokenizer(config.model)).take(VQTokenizer.from_folder(folder).state_dict(), folder)


def make_engine(config: TokenizerTrainingConfig, setup: Setting, steps: int) -> Engine:
    """The tokenizer under DeepSpeed, as a new run begins."""
    model = make_tokenizer(config.model)
    model.init_weights(torch.Generator().manual_seed(config.train.seed))
    if config.init_from and setup.start is None:
        load_start(config, weights_of(config.init_from, "init_from"), model)
    groups = parameter_groups(model, config.optim.weight_decay)
    width, schedule = 4 * config.model.width, schedule_of(config, steps)
    return Engine(model, config, setup.ds_values, setup.ranks, width, groups, schedule)


def reconstruction_loss(
    config: TokenizerTrainingConfig, perceptual: FrozenFeatures | None, frames: Tensor, output: VQOutput
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss summed over frames (N,3,v,v), and the sums of a log line.

    Of a frame: the mean absolute difference of its pixels, the perceptual distance, and the mean distance of its
    vectors from their codes, each with its weight.
    """
    shown, cells = output.frames.float(), output.ids[0].numel()
    pixels = (shown - frames).abs().mean((1, 2, 3)).sum()
    parts = {"loss_pixels": pixels, "loss_commitment": output.distance / cells}
    loss = pixels + config.model.commitment * parts["loss_commitment"]
    if perceptual:
        parts["loss_perceptual"] = perceptual_distance(perceptual, frames, shown)
        loss = loss + config.perceptual.weight * parts["loss_perceptual"]
    sums = {name: value.detach() for name, value in {"loss": loss, **parts}.items()}
    return loss, sums | sums_of(frames, output.frames)


def views_of(batch: Batch) -> Tensor:
    """The tokenizer's views of a micro-batch (N,3,v,v), those of clips first."""
    return torch.cat([stream.view for stream in (batch.video, batch.image) if stream is not None])


def frames_a_step(config: TokenizerTrainingConfig) -> int:
    """Frames of a step, as if each frame of a clip had a hidden cell and so a view: the loss's denominator."""
    return config.train.global_images + config.train.global_clips * config.data.frames


def step_flops(config: TokenizerTrainingConfig) -> float:
    """Training FLOPs of one step of the tokenizer itself; the perceptual network's are left out."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        make_tokenizer(config.model).eval()(torch.zeros(1, 3, config.data.token_size, config.data.token_size))
    return float(FORWARD_AND_BACKWARD * counter.get_total_flops() * frames_a_step(config))


def as_text(summary: Mapping[str, Mapping[str, Any]]) -> str:
    """The summary as people read it."""
    lines = ["held-out     frames      psnr   explained   ids in use   perplexity"]
    for name, s in summary.items():
        lines.append(
            f"{name:<10}{s['frames']:9,}{s['psnr']:10.2f}{s['explained']:12.1%}{s['codebook_use']:13.1%}"
            f"{s['codebook_perplexity']:13.1f}"
        )
    return "\n".join(lines)
