"""Draw media where there are none: MP4 clips and JPEG images of scenes, and the demo's shards made of them."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

from bevt_ds.data import child
from bevt_ds.data.pack import pack
from bevt_ds.data.scene import Extent, render
from bevt_ds.errors import UserError
from bevt_ds.rng import Use, generator

FPS = 25
DEMO_SPLITS = {"train": (320, 1024), "eval": (48, 96)}  # clips, images


def draw(folder: Path, clips: int, images: int, seed: int = 0, jobs: int | None = None) -> None:
    """Draw `clips` MP4 files and `images` JPEG files into a new folder, with one process a core.

    The same seed draws the same scenes. UserError: the folder exists and is not empty.
    """
    _require_absent(folder)
    jobs = jobs or len(os.sched_getaffinity(0))
    with _appearing(folder) as unfinished:
        commands = [
            child.command("bevt_ds.data.draw", str(unfinished), *map(str, (clips, images, seed, part, jobs)))
            for part in range(jobs)
        ]
        parts = [subprocess.Popen(command, env=child.environment()) for command in commands]
        try:
            codes = [part.wait() for part in parts]
        finally:
            for part in parts:
                part.kill()
        if any(codes):
            raise RuntimeError(f"drawing failed, exit codes {codes}")


def ensure_demo_shards(folder: Path) -> None:
    """Draw and pack the demo's training and held-out shards into `folder`, unless it is there.

    The folder appears whole or not at all. UserError: it exists and holds something else.
    """
    splits = [f"{split}-{kind}" for split in DEMO_SPLITS for kind in ("video", "image")]
    if all((folder / f"{split}-000000.tar").exists() for split in splits):
        return
    _require_absent(folder)
    with _appearing(folder) as unfinished:
        for seed, (split, (clips, images)) in enumerate(DEMO_SPLITS.items()):
            media = unfinished / split
            draw(media, clips, images, seed)
            for kind in ("video", "image"):
                pack(media, unfinished, kind, split=f"{split}-{kind}")
            shutil.rmtree(media)


def encode_mp4(frames: np.ndarray, fps: int = FPS) -> bytes:
    """H.264 in MP4, the same bytes each time: uint8 (N,H,W,3) with even H and W."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        stream.options = {"preset": "veryfast", "crf": "18", "g": "16", "bf": "0"}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def encode_jpeg(picture: np.ndarray) -> bytes:
    """Baseline JPEG of good quality: uint8 (H,W,3)."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=92)
    return buffer.getvalue()


def draw_part(folder: Path, clips: int, images: int, seed: int, part: int, parts: int) -> None:
    """Every `parts`-th file, from `part` on."""
    for i in range(part, clips, parts):
        frames = render(generator(seed, Use.SYNTHETIC, 0, i), Extent())
        (folder / f"clip-{i:06d}.mp4").write_bytes(encode_mp4(frames))
    for i in range(part, images, parts):
        frames = render(generator(seed, Use.SYNTHETIC, 1, i), Extent(frames=1))
        (folder / f"image-{i:06d}.jpg").write_bytes(encode_jpeg(frames[0]))


def _require_absent(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not an empty folder: remove it or choose another")


@contextmanager
def _appearing(folder: Path) -> Iterator[Path]:
    """A hidden folder beside `folder` that takes its name once the block has ended well."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        yield unfinished
        unfinished.chmod(0o755)
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


if __name__ == "__main__":
    draw_part(Path(sys.argv[1]), *map(int, sys.argv[2:]))
