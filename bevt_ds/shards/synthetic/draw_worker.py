"""A process that draws its share of the media: `python -m bevt_ds.shards.synthetic.draw_worker`, started by draw()."""

from __future__ import annotations

import io
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

from bevt_ds.rng import Use, generator
from bevt_ds.shards.synthetic.scene import Extent, render

FPS = Fraction(25)


def draw_part(folder: Path, clips: int, images: int, seed: int, part: int, parts: int) -> None:
    """Every `parts`-th file, from `part` on."""
    for i in range(part, clips, parts):
        frames = render(generator(seed, Use.SYNTHETIC, 0, i), Extent())
        (folder / f"clip-{i:06d}.mp4").write_bytes(encode_mp4(frames))
    for i in range(part, images, parts):
        frames = render(generator(seed, Use.SYNTHETIC, 1, i), Extent(frames=1))
        (folder / f"image-{i:06d}.jpg").write_bytes(encode_jpeg(frames[0]))


def encode_mp4(frames: np.ndarray) -> bytes:
    """H.264 in MP4 at FPS, the same bytes each time: uint8 (N,H,W,3) with even H and W."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=FPS)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        stream.options = {"preset": "veryfast", "crf": "18", "g": "16", "bf": "0"}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def encode_jpeg(image: np.ndarray) -> bytes:
    """Baseline JPEG of good quality: uint8 (H,W,3)."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=92)
    return buffer.getvalue()


if __name__ == "__main__":
    draw_part(Path(sys.argv[1]), *map(int, sys.argv[2:]))
