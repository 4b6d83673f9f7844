"""The videos that the loader's benchmark reads: drawn, 10 s long, encoded as the web has them; and their shards."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from fractions import Fraction
from itertools import islice
from multiprocessing import get_context
from pathlib import Path

import av
import numpy as np
import webdataset

from bevt_ds.data.decoding.transcode import Profile, nearest
from bevt_ds.data.decoding.video import opened
from bevt_ds.data.limits import Limits
from bevt_ds.rng import Use, generator
from bevt_ds.shards.pack import pack
from bevt_ds.shards.synthetic.scene import Extent, render

FPS, FRAMES = 30, 300
SIZES = {"340x256": (256, 340), "1280x720": (720, 1280)}  # height, width
STRIDES = {"16x8": (16, 8), "32x2": (32, 2)}  # frames, stride
X264 = {"preset": "medium", "crf": "23"}  # the library's defaults
COMPARED = 8  # videos of a set whose PSNR is taken


def prepare(folder: Path, size: str, clips: int, real: Path | None) -> Path:
    """Media, and shards of them: `raw`, `packed`, and `fps-16x8` and `fps-32x2` that turn the stride into 1.

    real: a folder of real videos that are packed along.
    """
    place = folder / f"{size}-{clips}{'-real' if real else ''}"
    if place.exists():
        return place
    unfinished = folder / f".{place.name}"
    shutil.rmtree(unfinished, ignore_errors=True)
    media = unfinished / "media"
    media.mkdir(parents=True)
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), get_context("spawn")) as processes:
        for i, data in enumerate(processes.map(draw_clip, range(clips), [size] * clips)):
            (media / f"{i:04d}.mp4").write_bytes(data)
    for path in sorted(real.glob("*.mp4")) if real else []:
        shutil.copyfile(path, media / f"real-{path.name}")
    pack(media, unfinished, "video", "raw", shard_samples=64)
    for name, profile in profiles().items():
        pack(media, unfinished, "video", name, shard_samples=64, profile=profile)
    unfinished.rename(place)
    return place


def profiles() -> dict[str, Profile]:
    """Shard sets that are transcoded."""
    sparse = {f"fps-{name}": Profile(fps=FPS / stride) for name, (_, stride) in STRIDES.items()}
    return {"packed": Profile(), **sparse}


def draw_clip(number: int, size: str, encoder: str = "libx264", options: Mapping[str, str] = X264) -> bytes:
    """A camera that pans over a drawn scene, with a sensor's noise; by default H.264 as the web has it."""
    height, width = SIZES[size]
    rng = generator(0, Use.SYNTHETIC, 2, number)
    scene = render(rng, Extent(height=height + 128, width=width + 128, frames=1))[0].astype(np.int16)
    noise = rng.normal(0, 2.0, (height + 16, width + 16, 3)).round().astype(np.int16)
    angle = rng.uniform(0, 2 * np.pi)
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream(encoder, rate=Fraction(FPS))
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        stream.codec_context.thread_count = 1
        stream.options = dict(options)
        for i in range(FRAMES):
            y, x = (int(64 + 63 * f(angle + i / 40)) for f in (np.sin, np.cos))
            dy, dx = rng.integers(0, 16, 2)
            image = scene[y : y + height, x : x + width] + noise[dy : dy + height, dx : dx + width]
            frame = av.VideoFrame.from_ndarray(np.clip(image, 0, 255).astype(np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def quality(place: Path) -> dict[str, dict[str, float]]:
    """Of each shard set: megabytes, and PSNR (dB, of 8-bit RGB) against the source scaled to the same size.

    Of the raw one: how many videos, and how many of them are real.
    """
    videos, real = (len(list((place / "media").glob(f"{prefix}*.mp4"))) for prefix in ("", "real-"))
    facts = {"raw": {"megabytes": _megabytes(place, "raw"), "videos": videos, "real_videos": real}}
    for name in profiles():
        raw, packed = _samples(place, "raw"), _samples(place, name)
        pairs = islice(zip(raw, packed, strict=True), COMPARED)
        decibels = [psnr(source["mp4"], copy["mp4"], json.loads(copy["json"])) for source, copy in pairs]
        facts[name] = {"megabytes": _megabytes(place, name), "psnr_db": round(float(np.mean(decibels)), 2)}
    return facts


def _megabytes(place: Path, name: str) -> float:
    return round(sum(path.stat().st_size for path in place.glob(f"{name}-*.tar")) / 1e6, 1)


def _samples(place: Path, name: str) -> Iterator[dict]:
    """The samples of a set, in order of their keys."""
    urls = [str(path) for path in sorted(place.glob(f"{name}-*.tar"))]
    return iter(webdataset.WebDataset(urls, shardshuffle=False))


def psnr(source: bytes, copy: bytes, facts: dict) -> float:
    """In dB, over some 20 frames of the copy; facts: what `transcode` says of it."""
    size = facts["width"], facts["height"]
    with opened(source, Limits()) as video:
        numbers = nearest(video.times(), np.arange(facts["frames"]) / facts["fps"])
    places = np.arange(0, facts["frames"], max(facts["frames"] // 20, 1))
    errors = []
    for a, b in zip(_rgb(source, numbers[places], size), _rgb(copy, places, size), strict=True):
        errors.append(np.square(a.astype(float) - b).mean())
    return float(10 * np.log10(255**2 / np.mean(errors)))


def _rgb(data: bytes, numbers: np.ndarray, size: tuple[int, int]) -> list[np.ndarray]:
    """Frames, scaled as the packer scales them: uint8 (H,W,3) each."""
    with opened(data, Limits()) as video:
        frames = [frame.reformat(*size, format="yuv420p", interpolation="AREA") for _, frame in video.pick(numbers)]
        return [frame.to_ndarray(format="rgb24") for frame in frames]
