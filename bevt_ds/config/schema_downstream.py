"""Every number of a fine-tuning run, as config.py has them for pretraining.

Defaults are those of BEVT's fine-tuning on Kinetics-400: the original's
configs/recognition/swin/swin_base_patch244_window877_bevt_finetune_k400.py at xyzforever/BEVT@8881b21.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Annotated as A
from typing import Literal

from bevt_ds.config.schema import DataConfig, LabelledDataConfig, ReadingConfig, ViewsConfig


@dataclass(frozen=True)
class ClassifierConfig:
    """Video Swin, global average pool, dropout, linear head."""

    name: A[Literal["tiny", "swin_t", "swin_s", "swin_b", "swin_l"], "preset of the backbone"] = "swin_b"
    window: A[tuple[int, int, int], "attention window in tokens: time, height, width; tables are resized to it"] = (
        8,
        7,
        7,
    )
    drop_path: A[float, "stochastic depth of the last block, linear from 0"] = 0.3
    dropout: A[float, "of the pooled features, in front of the head"] = 0.5
    checkpointing: A[bool, "recompute every block in the backward pass: less memory, more time"] = False
    compile: A[bool, "torch.compile every block: the first steps take minutes; not with ZeRO-3"] = False
    kernels: A[Literal["auto", "triton", "torch"], "provider of windowed attention"] = "auto"


@dataclass(frozen=True)
class FinetuneOptimConfig:
    """AdamW with layer-wise rates, cosine by epoch with warm-up, clipping, EMA."""

    lr: A[float, "learning rate of the head; it is not scaled by the batch"] = 3e-4
    betas: A[tuple[float, float], "AdamW's decay of the two moments"] = (0.9, 0.999)
    eps: A[float, "AdamW's epsilon"] = 1e-8
    weight_decay: A[float, "AdamW's decoupled decay"] = 1e-3
    layer_decay: A[float, "the rate shrinks by this a layer, from the head to the stem; 1: no decay"] = 0.9
    backbone_scale: A[float, "factor on the backbone's rate, for recipes without layer decay"] = 1.0
    groups: A[
        Literal["official", "intended"],
        "official: bias tables at the head's rate and norms decayed, which is what the original's optimizer does;"
        " intended: what its configuration says",
    ] = "official"
    warmup_epochs: A[float, "epochs of linear warm-up"] = 2.5
    warmup_ratio: A[float, "share of the cosine's value at step 0"] = 0.1
    clip_grad: A[float, "bound on the gradient's global L2 norm; 0: no clipping"] = 40.0
    ema: A[float, "weight of the new parameters in their moving average, each step; 0: none. ZeRO stages 0 to 2"] = 0.0


@dataclass(frozen=True)
class FinetuneTrainConfig:
    """Length, batch, precision, regularisation, and what is written when. A step is one update of the weights."""

    epochs: A[int, "passes over the training videos; steps = epochs * (videos // global_clips)"] = 60
    steps: A[int, "steps instead of epochs; 0: from epochs"] = 0
    global_clips: A[int, "clips a step, over all ranks"] = 64
    micro_clips: A[int, "clips a rank takes in one forward pass"] = 2
    precision: A[Literal["bf16", "fp16", "fp32"], "compute type; master weights are fp32"] = "bf16"
    label_smoothing: A[float, "of the cross-entropy"] = 0.0
    mixup: A[float, "mixup's alpha (timm); 0: none"] = 0.0
    cutmix: A[float, "cutmix's alpha (timm); 0: none. With both, each batch takes one of the two"] = 0.0
    seed: A[int, "seed of everything random"] = 0
    log_every: A[int, "steps from one line of log.jsonl to the next"] = 10
    val_every: A[int, "epochs from one validation to the next; one follows the last step too"] = 5
    checkpoint_every: A[int, "steps from one checkpoint to the next; one is written at the end too"] = 1000
    keep_checkpoints: A[int, "older checkpoints are removed beyond this number"] = 2

    @property
    def streams(self) -> dict[str, tuple[int, int]]:
        """Samples a step over all ranks, and those of a rank's forward pass, as pretraining's TrainConfig has them."""
        return {"clips": (self.global_clips, self.micro_clips)}


@dataclass(frozen=True)
class FinetuneConfig:
    """A fine-tuning run. `recipe` names the function of config/recipes_downstream.py that made it."""

    recipe: A[str, "the starting point; see the list above"]
    model: ClassifierConfig = field(default_factory=ClassifierConfig)
    data: LabelledDataConfig = field(default_factory=LabelledDataConfig)
    optim: FinetuneOptimConfig = field(default_factory=FinetuneOptimConfig)
    train: FinetuneTrainConfig = field(default_factory=FinetuneTrainConfig)
    views: ViewsConfig = field(default_factory=ViewsConfig)
    output_dir: A[str, "what the run writes; empty: runs/RECIPE, runs/RECIPE-2, ..."] = ""
    init_from: A[
        str, "weights to start from: a run's folder, saved weights, or an official file; empty: from scratch"
    ] = ""
    resume: A[str, "never | auto (the newest checkpoint of output_dir, if any) | a checkpoint's folder"] = "never"
    dry_run: A[bool, "print the resolved config, parameters and steps, and stop"] = False


def labelled_as(data: DataConfig, train: str = "", val: str = "") -> LabelledDataConfig:
    """Labelled shards, read and sampled as a pretraining run reads and samples its clips."""
    reading = {f.name: getattr(data, f.name) for f in fields(ReadingConfig)} | {"decoder": "auto"}
    clips = {"frames": data.frames, "stride": data.stride, "size": data.size, "short_side": data.short_side[0]}
    return LabelledDataConfig(train=train, val=val, **reading, **clips)


@dataclass(frozen=True)
class EvaluateConfig:
    """A test of a fine-tuned classifier. What is not given is the fine-tuning run's, or else the recipe's."""

    recipe: A[str, "where data and views come from if the weights lie in no run's folder; see the list above"] = ""
    weights: A[str, "the classifier: a fine-tuning run's folder, saved weights, or an official file"] = ""
    data: LabelledDataConfig = field(default_factory=LabelledDataConfig)
    views: ViewsConfig = field(default_factory=ViewsConfig)
    precision: A[Literal["bf16", "fp16", "fp32"], "compute type; probabilities are averaged in fp32"] = "bf16"
    kernels: A[Literal["auto", "triton", "torch"], "provider of windowed attention"] = "auto"
    output_dir: A[str, "what is written; empty: eval-1, eval-2, ... in the run's folder, or else in runs/"] = ""


@dataclass(frozen=True)
class ProbeConfig:
    """The small classifier on frozen features. Its training is V-JEPA's (facebookresearch/jepa, configs/evals)."""

    kind: A[
        Literal["attentive", "linear", "knn"],
        "attentive: a query attends to all tokens; linear: on their mean; knn: votes of the nearest training videos",
    ] = "attentive"
    epochs: A[int, "passes over the training features; not for knn"] = 20
    least_steps: A[int, "steps that are made at least, in more epochs if the set is small; not for knn"] = 500
    batch: A[int, "videos a step, over all ranks; not for knn"] = 64
    lr: A[float, "AdamW's learning rate, cosine to 0; not for knn"] = 1e-3
    weight_decay: A[float, "AdamW's decoupled decay; not for knn"] = 0.01
    seed: A[int, "seed of the probe's initialisation and of the order of its batches"] = 0
    k: A[int, "knn: neighbours that vote"] = 20
    temperature: A[float, "knn: a vote weighs exp(cosine / temperature)"] = 0.07
    cache_bytes: A[int, "memory that a rank may use for training features"] = 32 << 30


@dataclass(frozen=True)
class ProbeRunConfig:
    """A probe of frozen features. How clips are sampled is the probed run's choice, unless given."""

    weights: A[str, "the encoder: a run's folder, saved weights, or an official file"] = ""
    data: LabelledDataConfig = field(default_factory=LabelledDataConfig)
    views: ViewsConfig = field(default_factory=ViewsConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    precision: A[Literal["bf16", "fp16", "fp32"], "compute type of the encoder; the probe's is fp32"] = "bf16"
    kernels: A[Literal["auto", "triton", "torch"], "provider of windowed attention"] = "auto"
    output_dir: A[str, "what is written; empty: probe-1, probe-2, ... in the run's folder, or else in runs/"] = ""
