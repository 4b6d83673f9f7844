"""Every number of a fine-tuning run, as config.py has them for pretraining.

Defaults are those of BEVT's fine-tuning on Kinetics-400: the original's
configs/recognition/swin/swin_base_patch244_window877_bevt_finetune_k400.py at xyzforever/BEVT@8881b21.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated as A
from typing import Literal

from bevt_ds.config import ReadingConfig


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
    kernels: A[Literal["auto", "triton", "torch"], "provider of windowed attention"] = "auto"


@dataclass(frozen=True)
class LabelledDataConfig(ReadingConfig):
    """Labelled shards (`<key>.cls`, or "label" in `<key>.json`), and what is done to a training clip."""

    train: A[str, "training shards: path, glob, {000..099} range, or several with commas"] = ""
    val: A[str, "validation shards, the same way; evaluated every train.val_every epochs and by evaluate.py"] = ""
    classes: A[
        str, "file of class names, a line each in label order; empty: from the manifest, else the labels seen"
    ] = ""
    expected_val: A[int, "videos that the full validation set has, for the coverage; 0: what the manifest counts"] = 0
    frames: A[int, "frames a clip"] = 32
    stride: A[int, "source frames from one to the next; unused by segments"] = 2
    sampling: A[
        Literal["dense", "segments"],
        "dense: frames `stride` apart; segments: one frame of each `frames`-th of the video",
    ] = "dense"
    size: A[int, "height and width of the crop, a multiple of 32"] = 224
    short_side: A[int, "the short side is resized to this before the random resized crop"] = 256
    crop_area: A[tuple[float, float], "share of the picture that a random resized crop covers"] = (0.08, 1.0)
    crop_aspect: A[tuple[float, float], "its width / height"] = (0.75, 4 / 3)
    flip: A[float, "probability of a horizontal flip; 0 where direction is the label, as in SSv2"] = 0.5
    randaugment: A[tuple[int, int], "RandAugment: operations a clip, and magnitude of 10; 0,0: none"] = (0, 0)
    erasing: A[float, "probability of random erasing, the same box in all frames"] = 0.0


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


@dataclass(frozen=True)
class ViewsConfig:
    """The views of a video that a test averages over."""

    clips: A[int, "clips along time"] = 4
    crops: A[int, "crops along the long side: 1 (centre) or 3 (first end, last end, middle)"] = 3
    short_side: A[int, "the short side is resized to this"] = 224
    micro_videos: A[int, "videos a rank takes in one forward pass"] = 1


@dataclass(frozen=True)
class FinetuneConfig:
    """A fine-tuning run. `recipe` names the function of downstream/recipes.py that made it."""

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
