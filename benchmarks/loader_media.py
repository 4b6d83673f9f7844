"""The videos that the loader's benchmark reads: drawn, 10 s long, encoded as the web has them; and their shards."""

from __future__ import annotations

import io
import shutil
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from bevt_ds.data.pack import pack
from bevt_ds.data.scene import Extent, render
from bevt_ds.data.transcode import Profile
from bevt_ds.rng import Use, generator

FPS, FRAMES = 30, 300
SIZES = {"340x256": (256, 340), "1280x720": (720, 1280)}  # height, width
STRIDES = {"16x8": (16, 8), "32x2": (32, 2)}  # frames, stride


def prepare(folder: Path, size: str, clips: int, real: Path | None) -> Path:
    """Media, and shards of them: `raw`, `packed`, and `fps-16x8` and `fps-32x2` that turn the stride into 1.

    real: a folder of real videos that are packed along.
    """
    place = folder / f"{size}-{clips}"
    if place.exists():
        return place
    unfinished = folder / f".{place.name}"
    shutil.rmtree(unfinished, ignore_errors=True)
    media = unfinished / "media"
    media.mkdir(parents=True)
    for i in range(clips):
        (media / f"{i:04d}.mp4").write_bytes(draw_clip(i, *SIZES[size]))
    for path in sorted(real.glob("*.mp4")) if real else []:
        shutil.copyfile(path, media / f"real-{path.name}")
    pack(media, unfinished, "video", "raw", shard_samples=64)
    pack(media, unfinished, "video", "packed", shard_samples=64, profile=Profile())
    for name, (_, stride) in STRIDES.items():
        pack(media, unfinished, "video", f"fps-{name}", shard_samples=64, profile=Profile(fps=FPS / stride))
    unfinished.rename(place)
    return place


def draw_clip(number: int, height: int, width: int) -> bytes:
    """A camera that pans over a drawn scene, with a sensor's noise: H.264 with x264's defaults, as the web has it."""
    rng = generator(0, Use.SYNTHETIC, 2, number)
    scene = render(rng, Extent(height=height + 128, width=width + 128, frames=1))[0]
    noise = rng.normal(0, 2.0, (height + 16, width + 16, 3))
    angle = rng.uniform(0, 2 * np.pi)
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(FPS))
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        stream.options = {"preset": "medium", "crf": "23"}
        for i in range(FRAMES):
            y, x = (int(64 + 63 * f(angle + i / 40)) for f in (np.sin, np.cos))
            dy, dx = rng.integers(0, 16, 2)
            picture = scene[y : y + height, x : x + width] + noise[dy : dy + height, dx : dx + width]
            frame = av.VideoFrame.from_ndarray(np.clip(picture, 0, 255).astype(np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return buffer.getvalue()
