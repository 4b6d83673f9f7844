"""A fine-tuning step, the original's and ours: clips of random pixels with labels, on the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from bevt_ds.batch import DTYPES, LabelledBatch
from bevt_ds.config.deepspeed import read_json
from bevt_ds.config.recipes import finetune_demo, finetune_k400
from bevt_ds.config.schema import FinetuneConfig
from bevt_ds.config.validate import validate
from bevt_ds.model.arch import SwinArch
from bevt_ds.model.presets import create_classifier
from bevt_ds.rng import sample_key
from bevt_ds.runtime.background import Commits
from bevt_ds.runtime.distributed import Ranks
from bevt_ds.runtime.flops import encoder_macs, training_flops
from bevt_ds.runtime.optim import layer_decay_groups
from bevt_ds.train.finetuning import Finetuning, make_engine
from bevt_ds.train.loop import train_step
from bevt_ds.train.task import Setup

from .eager_model import Encoder
from .step_parts import part
from .step_providers import WITH_GRAPHS, Step, in_part, waited

Batches = Iterator[LabelledBatch]
CLASSES = {"tiny": 5}  # by model; else Kinetics-400's


def finetuning_configuration(model: str, clips: int) -> FinetuneConfig:
    """The demo's run for `tiny`, else finetune_k400's with another backbone; a step is one micro-batch on one rank."""
    recipe = finetune_demo() if model == "tiny" else finetune_k400()
    train = replace(recipe.train, global_clips=clips, micro_clips=clips, steps=10**6)
    return validate(replace(recipe, model=replace(recipe.model, name=model), train=train))


def labelled_batch(config: FinetuneConfig, classes: int, seed: int = 0) -> LabelledBatch:
    """A micro-batch of noise that is a whole step."""
    data, clips, draw = config.data, config.train.micro_clips, torch.Generator().manual_seed(seed)
    pixels = torch.randn(clips, 3, data.frames, data.size, data.size, generator=draw)
    labels = torch.randint(classes, (clips,), generator=draw)
    keys = torch.tensor([sample_key(seed, 0, 0, slot) for slot in range(clips)])
    return LabelledBatch(pixels, labels, keys, ("noise",) * clips, clips)


class EagerClassifier(nn.Module):
    """The original's encoder, pooled features, dropout and a linear head. `arch` is what a VideoClassifier keeps."""

    def __init__(self, arch: dict[str, Any]):
        super().__init__()
        self.encoder = Encoder(arch)
        self.dropout = nn.Dropout(arch["dropout"])
        self.head = nn.Linear(self.encoder.norm.normalized_shape[0], arch["num_classes"])

    def load_weights(self, state: dict[str, Tensor]) -> None:
        """Copy a VideoClassifier's state dict."""
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                parameter.copy_(state[name].view_as(parameter))

    def forward(self, clips: Tensor) -> Tensor:
        """(B,3,T,H,W) -> logits (B,K)."""
        _, last = self.encoder(self.encoder.patch_embed(clips), False)
        features = self.encoder.norm(rearrange(last, "b c t h w -> b t h w c"))
        return self.head(self.dropout(features.mean((1, 2, 3))))


@dataclass(frozen=True)
class FinetuneSetting:
    """One configuration of the benchmark."""

    config: FinetuneConfig
    ranks: Ranks
    tokenizer: str = "none"

    @property
    def classes(self) -> int:
        """Of the head."""
        return CLASSES.get(self.config.model.name, 400)

    @property
    def dtype(self) -> torch.dtype:
        """What products are computed in."""
        return torch.bfloat16 if self.ranks.device.type == "cuda" else torch.float32

    def step_flops(self) -> int:
        """Training FLOPs of one step, the head's left out."""
        data, model = self.config.data, self.config.model
        with torch.device("meta"):
            arch = create_classifier(model.name, self.classes, window=model.window).arch
        macs = encoder_macs(SwinArch.of(arch), (data.frames, data.size, data.size)).total()
        return training_flops(self.config.train.micro_clips * macs)


class EagerFinetuning:
    """The original's step: autocast over fp32 weights, plain AdamW with a group for each layer."""

    def __init__(self, setting: FinetuneSetting, compiled: bool = False):
        torch.manual_seed(0)
        config, model = setting.config, setting.config.model
        options = {"window": model.window, "drop_path": model.drop_path, "dropout": model.dropout}
        ours = create_classifier(model.name, setting.classes, **options)
        self.model, self.setting = EagerClassifier(ours.arch), setting
        self.model.load_weights(ours.state_dict())
        self.model.to(setting.ranks.device)
        groups = layer_decay_groups(self.model, ours.arch["depths"], config.optim)
        groups = [group | {"lr": config.optim.lr * group["lr_scale"]} for group in groups]
        self.optimizer = torch.optim.AdamW(groups, betas=config.optim.betas, eps=config.optim.eps)
        self.forward = torch.compile(self.model, dynamic=False) if compiled else self.model
        self.marks = None if compiled else self.model

    def __call__(self, batches: Batches) -> None:
        config, device = self.setting.config, self.setting.ranks.device
        with part("data wait"):
            batch = next(batches).to(device, non_blocking=True)
        with torch.autocast(device.type, self.setting.dtype, enabled=self.setting.dtype != torch.float32):
            logits = self.forward(batch.pixels)
        with part("head and loss"):
            loss = F.cross_entropy(logits.float(), batch.labels, label_smoothing=config.train.label_smoothing)
        loss.backward()
        with part("optimizer"):
            if config.optim.clip_grad:
                torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.optim.clip_grad)
            self.optimizer.step()
            self.optimizer.zero_grad()


class OurFinetuning:
    """`bevt_ds.train.loop.train_step` of the program `finetune.py`, under ZeRO-2."""

    def __init__(self, setting: FinetuneSetting, graphs: str = "off", precision: str = ""):
        config = setting.config
        precision = precision or {dtype: name for name, dtype in DTYPES.items()}[setting.dtype]
        config = replace(config, train=replace(config.train, precision=precision, graphs=graphs))
        setup = Setup(config, read_json("zero2"), Path(), setting.ranks, Commits(setting.ranks))
        names = tuple(map(str, range(setting.classes)))
        loader = SimpleNamespace(classes=SimpleNamespace(names=names), steps_an_epoch=1000)
        engine = make_engine(config, setup, loader, config.train.steps)
        engine.step, self.marks = in_part("optimizer", engine.step), engine.module
        self.task = Finetuning(setup, None, engine, 0, 0.0, average=None, mixing=None)

    def __call__(self, batches: Batches) -> None:
        train_step(self.task, waited(batches), 0)


FINETUNING: dict[str, Callable[[FinetuneSetting], Step]] = {
    "eager": EagerFinetuning,
    "torch.compile": partial(EagerFinetuning, compiled=True),
    "ours": OurFinetuning,
    WITH_GRAPHS: partial(OurFinetuning, graphs="on"),
}
