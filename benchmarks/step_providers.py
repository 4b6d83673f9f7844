"""Ways to make one training step of the joint model, all on the same batch, with the same optimizer's numbers.

A provider is built once and then stepped: tokenizer, forward, backward, clipping, update. Rivals are written out here;
ours is the training program's own `train_step`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from bevt_ds.batch import DTYPES, Batch
from bevt_ds.config.deepspeed import read_json
from bevt_ds.config.graphs import Graphs
from bevt_ds.config.recipes import joint_swin_b
from bevt_ds.config.schema import Config
from bevt_ds.config.validate import validate
from bevt_ds.model.presets import create_model
from bevt_ds.model.tokenizers import DalleTokenizer, RandomProjectionTokenizer, Tokenizer
from bevt_ds.runtime.background import Commits
from bevt_ds.runtime.distributed import Ranks
from bevt_ds.runtime.graphs import CudaBackend
from bevt_ds.runtime.optim import parameter_groups
from bevt_ds.runtime.tokenizer_graph import ReplayedTokenizer
from bevt_ds.train.loop import train_step
from bevt_ds.train.pretraining import Pretraining, make_engine
from bevt_ds.train.targets import IdTargets
from bevt_ds.train.task import Setup

from .eager_model import EagerBEVT, TorchvisionEncoder
from .eager_tokenizer import every_id
from .step_batch import base_configuration
from .step_goals import WITH_GRAPHS
from .step_levers import LADDER, Levers
from .step_parts import part

Batches = Iterator[Batch]


class Step(Protocol):
    """What the benchmark times."""

    marks: nn.Module | None  # whose modules say which part an op belongs to; None: they are compiled

    def __call__(self, batches: Batches) -> None:
        """One step on the next batch."""
        ...


def configuration(model: str, clips: int, images: int, ids: int | None = None) -> Config:
    """`base_configuration` with the original's windows and drop path; a step is one micro-batch on one rank."""
    config = base_configuration(model, clips, images, ids=ids)
    options = replace(config.model, image_windows="official", drop_path=joint_swin_b().model.drop_path)
    return validate(replace(config, model=options, train=replace(config.train, steps=10**6)))


class NoTokenizer:
    """Ids that cost nothing: what a step takes without its tokenizer."""

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size

    def encode(self, frames: Tensor) -> Tensor:
        """Images (N,3,v,v) -> ids 0, int64 (N,v/8,v/8)."""
        return frames.new_zeros((len(frames), *(side // 8 for side in frames.shape[-2:])), dtype=torch.int64)


def make_tokenizer(kind: str, vocab_size: int, device: torch.device) -> Tokenizer:
    """dalle, random_projection or none. DALL-E's weights are random: a step takes as long whatever they are."""
    if kind == "none":
        return NoTokenizer(vocab_size)
    if kind == "random_projection":
        return RandomProjectionTokenizer(vocab_size).to(device)
    tokenizer = DalleTokenizer(vocab_size=vocab_size)
    draw = torch.Generator().manual_seed(0)
    for weight in tokenizer.parameters():
        if weight.ndim == 4:  # as DALL-E draws them, so that no activation over- or underflows
            nn.init.normal_(weight, std=weight[0].numel() ** -0.5, generator=draw)
    return tokenizer.to(device)


@dataclass(frozen=True)
class Setting:
    """One configuration of the benchmark."""

    config: Config
    tokenizer: str
    ranks: Ranks

    @property
    def device(self) -> torch.device:
        return self.ranks.device

    @property
    def dtype(self) -> torch.dtype:
        """What products are computed in."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    def make_tokenizer(self, compile: bool = False) -> Tokenizer:
        """The tokenizer, on the device."""
        tokenizer = make_tokenizer(self.tokenizer, self.config.tokenizer.vocab_size, self.device)
        if compile and self.tokenizer != "none":
            tokenizer.compile()
        return tokenizer

    def arch(self) -> dict[str, Any]:
        """Constructor arguments of the model."""
        model = self.config.model
        with torch.device("meta"):
            built = create_model(
                model.name, window=model.window, drop_path=model.drop_path, vocab_size=self.config.tokenizer.vocab_size
            )
        return built.arch


class Eager:
    """The original's step: autocast over fp32 weights, all frames tokenized, all positions classified, plain AdamW."""

    def __init__(self, setting: Setting, compiled: bool = False, torchvision: bool = False):
        torch.manual_seed(0)
        arch = setting.arch()
        self.model = EagerBEVT(arch)
        if torchvision:
            self.model.encoder = TorchvisionEncoder(arch)
        ours = create_model(setting.config.model.name, window=arch["window"], vocab_size=arch["vocab_size"])
        if not torchvision:
            self.model.load_weights(ours.state_dict())
        self.model.to(setting.device)
        self.forward = torch.compile(self.model, dynamic=False) if compiled else self.model
        self.marks = None if compiled else self.model
        self.tokenizer, self.setting = setting.make_tokenizer(), setting
        optim = setting.config.optim
        groups = parameter_groups(self.model, optim.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps)

    def __call__(self, batches: Batches) -> None:
        setting = self.setting
        with part("data wait"):
            batch = next(batches)
        with part("tokenizer"):
            batch = batch.to(setting.device, non_blocking=True)
            ids = every_id(self.tokenizer, batch)
        autocast = torch.autocast(setting.device.type, setting.dtype, enabled=setting.dtype != torch.float32)
        with autocast, nullcontext() if self.marks else part("compiled"):
            loss = self.forward(batch, ids)
        loss.backward()
        with part("optimizer"):
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), setting.config.optim.clip_grad)
            self.optimizer.step()
            self.optimizer.zero_grad()


class Ours:
    """`bevt_ds.train.loop.train_step`, under ZeRO-2 if not told otherwise, some levers taken back or switches set."""

    def __init__(
        self,
        setting: Setting,
        levers: Levers,
        stage: int = 2,
        precision: str = "",
        graphs: Graphs = "off",
        **switches: bool,
    ):
        precision = precision or {dtype: name for name, dtype in DTYPES.items()}[setting.dtype]
        model = replace(setting.config.model, kernels="auto" if levers.kernels else "torch", **switches)
        config = replace(
            setting.config, model=model, train=replace(setting.config.train, precision=precision, graphs=graphs)
        )
        values = read_json(f"zero{max(stage, 1)}")
        values["zero_optimization"]["stage"] = stage
        setup = Setup(config, values, Path(), setting.ranks, Commits(setting.ranks))
        tokenizer = setting.make_tokenizer(model.compile)
        if isinstance(tokenizer, DalleTokenizer):
            tokenizer.kernels = model.kernels
        engine = make_engine(config, setup, {"vocab_size": tokenizer.vocab_size}, config.train.steps)
        if engine.module.encoder.replay and isinstance(tokenizer, DalleTokenizer):
            tokenizer = ReplayedTokenizer(tokenizer, graphs, CudaBackend(), setting.ranks.all_hold, print)
        if engine.module.encoder.replay:
            engine.module.encoder.replay = in_part("compiled", engine.module.encoder.replay)
        levers.take_back(engine)
        engine.step = in_part("optimizer", engine.step)
        self.levers, self.marks = levers, engine.module
        targets = IdTargets(levers.tokenizer(tokenizer))
        if isinstance(tokenizer, ReplayedTokenizer):
            targets.after_fill = tokenizer.after_micro_step
        self.task = Pretraining(setup, None, engine, 0, 0.0, targets, probe=None)

    def __call__(self, batches: Batches) -> None:
        train_step(self.task, self.levers.batches(waited(batches)), 0)


def waited(batches: Batches) -> Batches:
    """The same batches; getting one is "data wait"."""
    while True:
        with part("data wait"):
            batch = next(batches)
        yield batch


def in_part(name: str, function: Callable) -> Callable:
    """The function, everything in it belonging to a part."""

    def ranged(*arguments: Any) -> Any:
        with part(name):
            return function(*arguments)

    return ranged


RIVALS: dict[str, Callable[[Setting], Step]] = {
    "eager": Eager,
    "torch.compile": partial(Eager, compiled=True),
    "torchvision": partial(Eager, torchvision=True),
}
PROVIDERS: dict[str, Callable[[Setting], Step]] = {
    **RIVALS,
    **{name: partial(Ours, levers=levers) for name, levers in LADDER.items()},
    WITH_GRAPHS: partial(Ours, levers=Levers(), graphs="on"),
    "ours, model.compile": partial(Ours, levers=Levers(), compile=True),
    "ours, model.checkpointing": partial(Ours, levers=Levers(), checkpointing=True),
}
CPU_PROVIDERS = ("eager", "ours")
