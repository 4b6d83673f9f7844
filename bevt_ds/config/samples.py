"""Sections of a configuration that say which samples there are and how they are read: shards, sampling, views.

As in schema.py; PT below is its pretraining configuration of the original.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Annotated as A
from typing import Literal

from bevt_ds.config.fields import Field as F


@dataclass(frozen=True)
class MaskConfig:
    """Block masks of images, tube masks of clips (mask_generator.py of the original)."""

    ratio: A[float, F("cap on the share of the grid that one 2-D mask covers", below=1)] = 0.5
    min_block: A[int, F("cells of the smallest block, on a 14x14 grid; scaled to other grids", least=1)] = 16
    min_aspect: A[float, F("narrowest block: height / width from this to its inverse", above=0, most=1)] = 0.3
    tube: A[tuple[float, float], F("shortest and longest tube, as shares of the clip", above=0, most=1)] = (0.5, 1.0)


@dataclass(frozen=True)
class ReadingConfig:
    """How shards are read and videos decoded, whatever the samples are for."""

    decoder: A[
        Literal["auto", "cpu", "gpu", "nvdec", "split"],
        F(
            "where clips and images are decoded; gpu: by DALI; nvdec: clips by NVDEC sessions that are kept; split: by"
            " these and the CPU's workers",
            resume="free",
        ),
    ] = "auto"
    workers: A[int, F("processes a rank that decode video on the CPU", least=1, resume="free")] = 2
    threads: A[int, F("threads a rank that prepare decoded clips and decode images", least=1, resume="free")] = 2
    readers: A[int, F("threads a rank that read files", least=1, resume="free")] = 4
    prefetch: A[int, F("micro-batches prepared ahead", least=1, resume="free")] = 2
    shuffle_window: A[int, F("shards whose samples are shuffled together", least=1)] = 8
    decode_seconds: A[float, F("a clip that takes longer to decode is bad", above=0, resume="free")] = 20.0
    max_pixels: A[int, F("a larger image is refused before it is decoded")] = 64_000_000
    max_frames: A[int, F("a longer video is refused before it is decoded")] = 200_000
    max_file_bytes: A[int, F("a larger file is refused unread")] = 1 << 30
    max_clip_bytes: A[int, F("a clip whose frames would take more memory is refused before it is decoded")] = 1 << 30
    verify: A[
        bool, F("compare every sample with its checksum; without it random damage goes unseen", resume="free")
    ] = True
    read_seconds: A[float, F("a read of a local shard that takes longer stops the run", above=0, resume="free")] = 300.0
    max_bad_fraction: A[float, F("more bad samples than this, and than 10, stop the run", most=1, resume="free")] = (
        0.001
    )
    cache_dir: A[str, F("where remote shards are kept; empty: ~/.cache/bevt_ds/shards", resume="free")] = ""
    cache_bytes: A[
        int, F("the least recently used remote shards are removed beyond this, on each node", resume="free")
    ] = 100 << 30
    remote_seconds: A[float, F("the longest wait for the next bytes of a remote shard", above=0, resume="free")] = 30.0
    allow_pipe: A[bool, F("let pipe:COMMAND stand for a shard: it runs a shell", resume="free")] = False


@dataclass(frozen=True)
class SamplingConfig(ReadingConfig):
    """What every clip for a network has. Sizes are pixels of the network's view."""

    frames: A[int, F("frames a clip", least=1)] = 16
    stride: A[int, F("source frames from one sampled frame to the next", least=1)] = 8
    size: A[int, F("height and width of the crop", least=1, multiple=32)] = 224
    flip: A[float, F("probability of a horizontal flip; 0 where direction is the label, as in SSv2", most=1)] = 0.5


@dataclass(frozen=True)
class DataConfig(SamplingConfig):
    """The shards of pretraining, and what is done to a sample."""

    videos: A[str, F("tar files: path, glob, {000..099} range, or several with commas; empty: none", resume="free")] = (
        ""
    )
    images: A[str, F("the same for images", resume="free")] = ""
    eval_videos: A[str, F("held-out clips for the closing summary; empty: those of holdout", resume="free")] = ""
    eval_images: A[str, F("held-out images for the closing summary; empty: those of holdout", resume="free")] = ""
    holdout: A[
        float,
        F("share of the samples of videos and images that is never trained on, by key; see eval_videos", most=0.5),
    ] = 0.0
    frames: A[int, F("frames a clip; a token spans 2 of them", least=1, multiple=2)] = 16
    clips_per_video: A[
        int, F("clips, each with its crop and mask, from one decode of a video; 1: the original", least=1)
    ] = 1
    crops: A[
        int,
        F(
            "fixed crops of each sample, one an epoch in turn: start, scale, place, flip and jitter follow from the"
            " sample's key, whatever the seed; 0: new ones every time, as the original"
        ),
    ] = 0
    short_side: A[tuple[int, int], F("scale jitter: the short side is resized to a length in here", least=1)] = (
        256,  # PT
        320,
    )
    image_jitter: A[tuple[float, float, float], F("brightness, contrast, saturation; of images only")] = (
        0.4,  # PT
        0.4,
        0.4,
    )
    loader_process: A[
        Literal["auto", "on", "off"],
        F(
            "read and decode in a process of its own, whose Python does not hold up the thread that trains; auto: on a"
            " GPU, unless NVDEC decodes clips",
            resume="free",
        ),
    ] = "auto"
    token_size: A[int, F("side of the tokenizer's view: half of size", least=1)] = 112
    mask: MaskConfig = field(default_factory=MaskConfig)


@dataclass(frozen=True)
class LabelledDataConfig(SamplingConfig):
    """Labelled shards (`<key>.cls`, or "label" in `<key>.json`), and what is done to a training clip."""

    train: A[str, F("training shards: path, glob, {000..099} range, or several with commas", resume="free")] = ""
    val: A[
        str,
        F("validation shards, the same way; evaluated every train.val_every epochs and by evaluate.py", resume="free"),
    ] = ""
    classes: A[
        str,
        F(
            "file of class names, a line each in label order; empty: from the manifest, else the labels seen",
            resume="free",
        ),
    ] = ""
    expected_val: A[
        int,
        F("videos that the full validation set has, for the coverage; 0: what the manifest counts", resume="free"),
    ] = 0
    frames: A[int, F("frames a clip", least=1)] = 32
    stride: A[int, F("source frames from one sampled frame to the next; unused by segments", least=1)] = 2
    sampling: A[
        Literal["dense", "segments"],
        "dense: frames `stride` apart; segments: one frame of each `frames`-th of the video",
    ] = "dense"
    short_side: A[int, F("the short side is resized to this before the random resized crop", least=1)] = 256
    crop_area: A[tuple[float, float], F("share of the frame that a random resized crop covers", above=0, most=1)] = (
        0.08,
        1.0,
    )
    crop_aspect: A[tuple[float, float], F("its width / height", above=0)] = (0.75, 4 / 3)
    randaugment: A[tuple[int, int], F("RandAugment: operations a clip, and magnitude; 0,0: none", most=30)] = (0, 0)
    erasing: A[float, F("probability of random erasing, the same box in all frames", most=1)] = 0.0


def labelled_as(data: DataConfig) -> LabelledDataConfig:
    """Of labelled shards yet to be named: read and sampled as a pretraining run reads and samples its clips."""
    reading = {f.name: getattr(data, f.name) for f in fields(ReadingConfig)} | {"decoder": "auto"}
    clips = {"frames": data.frames, "stride": data.stride, "size": data.size, "short_side": data.short_side[0]}
    return LabelledDataConfig(**reading, **clips)


@dataclass(frozen=True)
class ViewsConfig:
    """The views of a video that a test averages over."""

    clips: A[int, F("clips along time", least=1, resume="free")] = 4
    crops: A[
        Literal[1, 3],
        F("crops along the long side: 1 (centre) or 3 (first end, last end, middle)", resume="free"),
    ] = 3
    short_side: A[int, F("the short side is resized to this", least=1, resume="free")] = 224
    micro_videos: A[int, F("videos a rank takes in one forward pass", least=1, resume="free")] = 1
