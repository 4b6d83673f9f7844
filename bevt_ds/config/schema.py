"""Every number of a run, in frozen typed dataclasses. A recipe returns one `Config`; `key=value` reaches every field.

A field is `Annotated[type, "what it means"]`: the text is what `--help` prints. `Literal` types are the allowed values.
Defaults are those of BEVT's joint stage; PT below is the original's
configs/recognition/swin/swin_base_patch244_window877_bevt_in1k_k400.py at xyzforever/BEVT@8881b21.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated as A
from typing import Literal


@dataclass(frozen=True)
class ModelConfig:
    """The network. Width, depths and heads belong to the preset that `name` names."""

    name: A[Literal["tiny", "swin_t", "swin_s", "swin_b", "swin_l"], "preset of the backbone"] = "swin_b"
    window: A[tuple[int, int, int], "attention window in tokens: time, height, width"] = (8, 7, 7)
    drop_path: A[float, "stochastic depth of the last block, linear from 0 (PT)"] = 0.3
    image_windows: A[
        Literal["official", "swin"],
        "official: images mask un-shifted blocks too, as the released weights do; swin: the textbook",
    ] = "official"
    checkpointing: A[bool, "recompute every block in the backward pass: less memory, more time"] = False
    compile: A[bool, "torch.compile blocks and tokenizer: the first steps take minutes; not with ZeRO-3"] = False
    kernels: A[Literal["auto", "triton", "torch"], "provider of attention, gather and loss"] = "auto"


@dataclass(frozen=True)
class TokenizerConfig:
    """Where the discrete targets come from."""

    name: A[Literal["dalle", "random_projection"], "kind of tokenizer"] = "dalle"
    weights: A[str, "its file (dalle: OpenAI's encoder.pkl, or safetensors)"] = ""
    vocab_size: A[int, "random_projection: size of the codebook"] = 8192
    seed: A[int, "random_projection: seed of projection and codebook"] = 0


@dataclass(frozen=True)
class MaskConfig:
    """Block masks of images, tube masks of clips (mask_generator.py of the original)."""

    ratio: A[float, "cap on the share of the grid that one 2-D mask covers"] = 0.5
    min_block: A[int, "cells of the smallest block, on a 14x14 grid; scaled to other grids"] = 16
    min_aspect: A[float, "narrowest block: height / width from this to its inverse"] = 0.3
    tube: A[tuple[float, float], "shortest and longest tube, as shares of the clip"] = (0.5, 1.0)


@dataclass(frozen=True)
class ReadingConfig:
    """How shards are read and videos decoded, whatever the samples are for."""

    decoder: A[Literal["auto", "cpu", "gpu"], "where clips and images are decoded"] = "auto"
    workers: A[int, "processes a rank that decode video on the CPU"] = 2
    threads: A[int, "threads a rank that make pictures of decoded clips and of images"] = 2
    readers: A[int, "threads a rank that read files"] = 4
    prefetch: A[int, "micro-batches prepared ahead"] = 2
    shuffle_window: A[int, "shards whose samples are shuffled together"] = 8
    decode_seconds: A[float, "a clip that takes longer to decode is bad"] = 20.0
    max_pixels: A[int, "a larger picture is refused before it is decoded"] = 64_000_000
    max_frames: A[int, "a longer video is refused before it is decoded"] = 200_000
    max_file_bytes: A[int, "a larger file is refused unread"] = 1 << 30
    max_clip_bytes: A[int, "a clip whose frames would take more memory is refused before it is decoded"] = 1 << 30
    verify: A[bool, "compare every sample with its checksum; without it random damage goes unseen"] = True
    read_seconds: A[float, "a read of a local shard that takes longer stops the run"] = 300.0
    max_bad_fraction: A[float, "more bad samples than this, and than 10, stop the run"] = 0.001
    cache_dir: A[str, "where remote shards are kept; empty: ~/.cache/bevt_ds/shards"] = ""
    cache_bytes: A[int, "the least recently used remote shards are thrown out beyond this, on each node"] = 100 << 30
    remote_seconds: A[float, "the longest wait for the next bytes of a remote shard"] = 30.0
    allow_pipe: A[bool, "let pipe:COMMAND stand for a shard: it runs a shell"] = False


@dataclass(frozen=True)
class DataConfig(ReadingConfig):
    """The shards, and what is done to a sample. Sizes are pixels of the network's view."""

    videos: A[str, "tar files: path, glob, {000..099} range, or several with commas; empty: none"] = ""
    images: A[str, "the same for images"] = ""
    eval_videos: A[str, "held-out clips for the closing summary; empty: none"] = ""
    eval_images: A[str, "held-out images for the closing summary; empty: none"] = ""
    frames: A[int, "frames a clip"] = 16
    stride: A[int, "source frames from one sampled frame to the next"] = 8
    clips_per_video: A[int, "clips, each with its crop and mask, from one decode of a video; 1: the original"] = 1
    size: A[int, "height and width of the crop, a multiple of 32"] = 224
    short_side: A[tuple[int, int], "scale jitter: the short side is resized to a length in here (PT)"] = (256, 320)
    flip: A[float, "probability of a horizontal flip"] = 0.5
    image_jitter: A[tuple[float, float, float], "brightness, contrast, saturation; of images only (PT)"] = (
        0.4,
        0.4,
        0.4,
    )
    token_size: A[int, "side of the tokenizer's view: half of size"] = 112
    mask: MaskConfig = field(default_factory=MaskConfig)


@dataclass(frozen=True)
class LabelledDataConfig(ReadingConfig):
    """Labelled shards (`<key>.cls`, or "label" in `<key>.json`), and what is done to a training clip.

    Defaults are those of fine-tuning on Kinetics-400; see bevt_ds/config/schema_downstream.py.
    """

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
    randaugment: A[tuple[int, int], "RandAugment: operations a clip, and magnitude of 30; 0,0: none"] = (0, 0)
    erasing: A[float, "probability of random erasing, the same box in all frames"] = 0.0


@dataclass(frozen=True)
class ViewsConfig:
    """The views of a video that a test averages over."""

    clips: A[int, "clips along time"] = 4
    crops: A[int, "crops along the long side: 1 (centre) or 3 (first end, last end, middle)"] = 3
    short_side: A[int, "the short side is resized to this"] = 224
    micro_videos: A[int, "videos a rank takes in one forward pass"] = 1


@dataclass(frozen=True)
class OptimConfig:
    """AdamW, cosine with warm-up, clipping (PT, and mmcv's defaults that PT relies on)."""

    lr: A[float, "peak learning rate; it is not scaled by the batch"] = 5e-4
    betas: A[tuple[float, float], "AdamW's decay of the two moments"] = (0.9, 0.999)
    eps: A[float, "AdamW's epsilon"] = 1e-8
    weight_decay: A[float, "AdamW's decoupled decay; norms and bias tables have none"] = 0.05
    warmup_steps: A[int, "steps of linear warm-up (PT: 10 epochs)"] = 9370
    warmup_ratio: A[float, "share of the cosine's value at step 0"] = 0.1
    clip_grad: A[float, "bound on the gradient's global L2 norm; 0: no clipping"] = 3.0


@dataclass(frozen=True)
class TrainConfig:
    """Length, batch, precision, and what is written when. A step is one update over the global batch."""

    steps: A[int, "optimizer steps (PT: 150 epochs of 240k clips)"] = 140_550
    global_clips: A[int, "clips a step, over all ranks; 0: no video stream"] = 256
    global_images: A[int, "images a step, over all ranks; 0: no image stream"] = 2048
    micro_clips: A[int, "clips a rank takes in one forward pass"] = 4
    micro_images: A[int, "images a rank takes in one forward pass"] = 32
    precision: A[Literal["bf16", "fp16", "fp32"], "compute type; master weights are fp32"] = "bf16"
    seed: A[int, "seed of everything random"] = 0
    log_every: A[int, "steps from one line of log.jsonl to the next"] = 10
    checkpoint_every: A[int, "steps from one checkpoint to the next; one is written at the end too"] = 1000
    keep_checkpoints: A[int, "older checkpoints are removed beyond this number"] = 2
    eval_batches: A[int, "held-out micro-batches of the closing summary"] = 4
    min_gain: A[float, "exit 1 unless both losses end this many nats below the unigram entropy; 0: no check"] = 0.0

    @property
    def streams(self) -> dict[str, tuple[int, int]]:
        """Samples a step over all ranks, and those of a rank's forward pass, by what the samples are."""
        return {
            "clips": (self.global_clips, self.micro_clips),
            "images": (self.global_images, self.micro_images),
        }


@dataclass(frozen=True)
class OnlineProbeConfig:
    """How good the features are while they are pretrained; the training itself stays the same to the last bit."""

    every: A[int, "steps from one probe to the next, and one after the last; 0: none"] = 0
    train: A[str, "labelled shards of a few hundred videos, sampled as data.videos; see docs/evaluation.md"] = ""
    val: A[str, "labelled shards that probe_top1 is measured on"] = ""


@dataclass(frozen=True)
class Config:
    """A run. `recipe` names the function of recipes.py that made it."""

    recipe: A[str, "the starting point; see the list above"]
    model: ModelConfig = field(default_factory=ModelConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    probe: OnlineProbeConfig = field(default_factory=OnlineProbeConfig)
    output_dir: A[str, "what the run writes; empty: runs/RECIPE, runs/RECIPE-2, ..."] = ""
    init_from: A[str, "weights to start from: a run's folder, saved weights, or an official file"] = ""
    resume: A[str, "never | auto (the newest checkpoint of output_dir, if any) | a checkpoint's folder"] = "never"
    dry_run: A[bool, "print the resolved config, parameters and steps, and stop"] = False
