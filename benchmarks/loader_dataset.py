"""What others do: a torch DataLoader whose workers decode with PyAV (or torchcodec) and prepare clips with torchvision.

It reads the same shards by the same offsets and makes what the project's loader makes: 224 pixels normalised, and the
tokenizer's 112.
"""

from __future__ import annotations

import io
from functools import partial

import av
import numpy as np
import torch
import torchvision.transforms.v2.functional as F
from torch.utils.data import DataLoader, Dataset

from bevt_ds.config.schema import Config
from bevt_ds.data.reading.index import load_shard, usable
from bevt_ds.data.reading.members import read_member
from bevt_ds.data.reading.shards import expand

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Clips(Dataset):
    """Random clips of random samples; `decoder` is "pyav" or "torchcodec", on `device` for the latter."""

    def __init__(self, config: Config, decoder: str, device: str) -> None:
        shards = usable(map(load_shard, expand(config.data.videos)), "video")
        self.members = [member for shard in shards for member in shard.members()]
        decoders = {"pyav": decode_pyav, "torchcodec": partial(decode_torchcodec, device=device)}
        self.config, self.decode = config.data, decoders[decoder]

    def __len__(self) -> int:
        return 1 << 30

    def __getitem__(self, number: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        rng = np.random.default_rng(number)
        data = read_member(self.members[int(rng.integers(len(self.members)))])
        frames, decoded = self.decode(data, self.config.frames, self.config.stride, rng)
        return *prepare(frames, self.config, rng), decoded


def decode_pyav(data: bytes, count: int, stride: int, rng: np.random.Generator) -> tuple[torch.Tensor, int]:
    """Seek to the keyframe before the clip, decode to its end: uint8 (T,3,H,W), and how many frames that took."""
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        total = stream.frames
        start = int(rng.integers(max(total - count * stride, 0) + 1))
        wanted = set(((start + stride * np.arange(count)) % total).tolist())
        step = 1 / (stream.average_rate * stream.time_base)
        container.seek(int(min(wanted) * step), stream=stream)
        images, decoded = [], 0
        for frame in container.decode(stream):
            decoded += 1
            number = round(frame.pts / step)
            if number in wanted:
                images.append(frame.to_ndarray(format="rgb24"))
            if number >= max(wanted):
                break
    images += [images[-1]] * (count - len(images))
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), decoded


def decode_torchcodec(
    data: bytes, count: int, stride: int, rng: np.random.Generator, device: str
) -> tuple[torch.Tensor, int]:
    """The same with torchcodec, which counts no frames. Of its two ways to seek the one without a scan of the file."""
    from torchcodec.decoders import VideoDecoder

    decoder = VideoDecoder(data, num_ffmpeg_threads=1, seek_mode="approximate", device=device)
    total = decoder.metadata.num_frames
    start = int(rng.integers(max(total - count * stride, 0) + 1))
    return decoder.get_frames_at(((start + stride * np.arange(count)) % total).tolist()).data, 0


def prepare(frames: torch.Tensor, config, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale jitter, crop, flip; normalised (3,T,S,S), and (T,3,S/2,S/2) in [0,1]."""
    side = int(rng.integers(config.short_side[0], config.short_side[1] + 1))
    frames = F.resize(frames, [side], interpolation=F.InterpolationMode.BICUBIC, antialias=True)
    top, left = (int(rng.integers(n - config.size + 1)) for n in frames.shape[-2:])
    crop = frames[..., top : top + config.size, left : left + config.size]
    crop = F.horizontal_flip(crop) if rng.random() < 0.5 else crop
    half = [config.token_size] * 2
    view = F.to_dtype(F.resize(crop, half, interpolation=F.InterpolationMode.BICUBIC), torch.float32, scale=True)
    pixels = F.normalize(F.to_dtype(crop, torch.float32, scale=True), MEAN, STD)
    return pixels.permute(1, 0, 2, 3).contiguous(), view


def data_loader(config: Config, decoder: str, device: str) -> DataLoader:
    """With `data.workers` processes; a GPU's decoder is used from this process, as torchcodec advises."""
    clips, batch_size = Clips(config, decoder, device), config.train.micro_clips
    if device == "cuda":
        return DataLoader(clips, batch_size)
    return DataLoader(
        clips,
        batch_size,
        num_workers=config.data.workers,
        prefetch_factor=config.data.prefetch,
        persistent_workers=True,
    )
