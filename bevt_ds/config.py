"""Every number of a run, in frozen typed dataclasses. A recipe returns one `Config`; `key=value` reaches every field.

Rule: a default that is not BEVT's own says so in its comment. Facts of BEVT are cited by the file that holds them in
xyzforever/BEVT@8881b21 (PT = configs/recognition/swin/swin_base_patch244_window877_bevt_in1k_k400.py).
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class ModelConfig:
    """The network. Sizes that belong to a preset (width, depths, heads) come from `name`."""

    name: str = "swin_b"  # tiny | swin_t | swin_s | swin_b | swin_l
    window: tuple[int, int, int] = (8, 7, 7)  # tokens: time, height, width
    drop_path: float = 0.3  # PT; linear from 0 over all blocks
    image_windows: str = "official"  # official | swin: whether images mask un-shifted blocks too (the released weights do)
    checkpointing: bool = False  # recompute each block in the backward pass
    kernels: str = "auto"  # auto | triton | torch


@dataclass(frozen=True)
class TokenizerConfig:
    """Where the discrete targets come from."""

    name: str = "dalle"  # dalle | random_projection
    weights: str = ""  # file; the random projection has none
    vocab_size: int = 8192  # random_projection only: size of its codebook
    seed: int = 0  # random_projection only


@dataclass(frozen=True)
class MaskConfig:
    """Block masking of images and tube masking of clips (mask_generator.py of the original)."""

    ratio: float = 0.5  # cap: share of the grid that a 2-D mask may cover
    min_block: int = 16  # cells of the smallest block on a 14x14 grid
    min_aspect: float = 0.3
    tube: tuple[float, float] = (0.5, 1.0)  # shortest and longest tube, as a share of the clip's temporal cells


@dataclass(frozen=True)
class DataConfig:
    """Shards and what is done to a sample. Pixel sizes are of the network's view."""

    videos: str = ""  # tar files: a path, a glob, a {000..099} range, or several separated by commas
    images: str = ""
    eval_videos: str = ""  # held-out shards for the closing summary; empty: no evaluation
    eval_images: str = ""
    frames: int = 16
    stride: int = 8
    size: int = 224
    short_side: tuple[int, int] = (256, 320)  # PT: scale jitter, uniform integer
    flip: float = 0.5
    image_jitter: tuple[float, float, float] = (0.4, 0.4, 0.4)  # brightness, contrast, saturation; images only
    token_size: int = 112  # the tokenizer's view: half of `size`
    mask: MaskConfig = field(default_factory=MaskConfig)
    decoder: str = "auto"  # auto | cpu | gpu
    workers: int = 2  # CPU decode processes a rank
    threads: int = 2  # DALI threads a rank
    prefetch: int = 2  # micro-batches prepared ahead
    shuffle_window: int = 8  # shards whose samples are shuffled together
    decode_seconds: float = 20.0  # a sample that takes longer is bad
    max_pixels: int = 64_000_000  # a larger picture is refused before it is decoded
    max_bad_fraction: float = 0.001  # more bad samples than this (and than 10) stop the run


@dataclass(frozen=True)
class OptimConfig:
    """AdamW, cosine with warm-up, clipping (PT and mmcv's defaults that it relies on)."""

    lr: float = 5e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.05
    warmup_steps: int = 9370  # 10 epochs
    warmup_ratio: float = 0.1  # the first step's share of the cosine value
    clip_grad: float = 3.0


@dataclass(frozen=True)
class TrainConfig:
    """Length, batch and precision. A step is one optimizer update over the global batch."""

    steps: int = 140_550  # 150 epochs of 240k clips
    global_clips: int = 256
    global_images: int = 2048
    micro_clips: int = 4  # a rank's clips in one forward pass
    micro_images: int = 32
    precision: str = "bf16"  # bf16 | fp16 | fp32
    seed: int = 0
    log_every: int = 10
    checkpoint_every: int = 1000
    keep_checkpoints: int = 2
    eval_batches: int = 4
    samples_every: int = 0  # 0: samples.png at the end only


@dataclass(frozen=True)
class Config:
    """A run. `recipe` names the function in recipes.py that made it."""

    recipe: str
    model: ModelConfig = field(default_factory=ModelConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    output_dir: str = ""
    init_from: str = ""  # a folder or file of weights
    resume: str = "never"  # never | auto | a checkpoint folder
    dry_run: bool = False
