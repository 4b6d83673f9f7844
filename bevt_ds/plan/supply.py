"""What the input must deliver, and what it can: decoding on cores or NVDECs, and bytes from storage.

Rates are those measured on the machine of docs/performance.md with an H200 and 16 cores, 340x256 videos and JPEG
images; they scale with cores and engines.
"""

from __future__ import annotations

from dataclasses import dataclass

from bevt_ds.config.schema import Config, TrainingConfig
from bevt_ds.runtime.gpus import Gpu

CORES = 16
CLIP_CORE_SECONDS = {True: CORES / 174, False: CORES / 140}  # by whether the videos are packed with fps=, at stride 1
IMAGE_CORE_SECONDS = CORES / 2002
ENGINES = 7
CLIPS_PER_S = {True: 15.6, False: 8.6}  # of a GPU that decodes
IMAGES_PER_S = 1495.0  # by nvJPEG
CLIP_BYTES, IMAGE_BYTES = 600_000.0, 110_000.0  # Kinetics-400 at a short side of 256, and ImageNet-1K as published


@dataclass(frozen=True)
class Machines:
    """What is around the GPUs. `storage`: bytes/s of what all nodes read from together; `cores`: for each GPU."""

    gpus: int
    per_node: int = 8
    cores: int = CORES
    storage: float = 10e9
    clip_bytes: float = CLIP_BYTES
    image_bytes: float = IMAGE_BYTES

    @property
    def nodes(self) -> int:
        return -(-self.gpus // self.per_node)


@dataclass(frozen=True)
class Supply:
    """Needs and capacities a second, at the speed of a step that never waits. Seconds of a step that waits only."""

    clips: float  # of all GPUs, as all below
    images: float
    frames: float  # to be decoded
    read: float  # bytes
    decode_seconds: float  # what decoding a step's samples takes
    storage_seconds: float
    decoder: str

    def per(self, parts: int) -> dict[str, float]:
        """The needs of one of so many equal parts: GPUs, or nodes."""
        names = ("clips", "images", "frames", "read")
        return {name: getattr(self, name) / parts for name in names}


def supply(config: TrainingConfig, gpu: Gpu, machines: Machines, step: float) -> Supply:
    """What a run needs whose step takes `step` seconds. A video that gives several clips is read and decoded once."""
    data, clips = config.data, config.train.global_clips
    images = config.train.global_images if isinstance(config, Config) else 0
    videos = clips / (data.clips_per_video if isinstance(config, Config) else 1)
    size = videos * machines.clip_bytes + images * machines.image_bytes
    packed = data.stride == 1
    if data.decoder == "gpu":
        engines = machines.gpus * gpu.decoders / ENGINES
        decode = max(videos / (CLIPS_PER_S[packed] * engines), images / (IMAGES_PER_S * machines.gpus))
        name = f"{gpu.decoders} NVDEC engines a GPU"
    else:
        cores = machines.gpus * machines.cores
        decode = (videos * CLIP_CORE_SECONDS[packed] + images * IMAGE_CORE_SECONDS) / cores
        name = f"{machines.cores} cores a GPU"
    needs = (x / step for x in (clips, images, videos * data.frames * data.stride, size))
    return Supply(*needs, decode, size / machines.storage, name)
