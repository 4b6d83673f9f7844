"""The shards that the study reads: unlabelled clips and images, and labelled splits, all of the drawn action set."""

from __future__ import annotations

import os
import shutil
from concurrent.futures import Executor, ProcessPoolExecutor
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path
from zlib import crc32

import numpy as np
from tqdm import tqdm

from benchmarks.study_motion import COURSES, render_action
from bevt_ds.rng import Use, generator
from bevt_ds.shards.pack import pack
from bevt_ds.shards.synthetic.draw_worker import encode_jpeg, encode_mp4
from bevt_ds.shards.synthetic.scene import Extent

SIZE, FRAMES = 64, 8
CLIP = Extent(SIZE, SIZE, FRAMES)
IMAGE = Extent(SIZE, SIZE, 1)


def prepare(folder: Path, counts: dict[str, int], seed: int = 0) -> None:
    """Shards `{split}-000000.tar` of `counts[split]` clips (or images) in `folder`; splits that are there are kept.

    Classes take turns, so that each has the same number of clips; the unlabelled ones have no label in the shards.
    """
    missing = {name: count for name, count in counts.items() if not (folder / f"{name}-manifest.json").exists()}
    if not missing:
        return
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), get_context("spawn")) as pool:
        for split, count in missing.items():
            _prepare_split(pool, folder, split, count, seed)


def label_of(number: int) -> str:
    """The class of a clip by its number within its split."""
    return tuple(COURSES)[number % len(COURSES)]


def draw_file(folder: Path, split: str, number: int, seed: int) -> None:
    """One H.264 clip; of the split "pictures" (its name is part of the seed) a clip's first frame, as JPEG."""
    stream = crc32(split.encode())  # no two splits share a clip
    rng = generator(seed, Use.SYNTHETIC, stream, number)
    if split == "pictures":
        data, extension = encode_jpeg(render_action(rng, label_of(number), IMAGE)[0]), "jpg"
    else:
        data, extension = encode_mp4(render_action(rng, label_of(number), CLIP)), "mp4"
    (folder / f"{number:06d}.{extension}").write_bytes(data)


def _prepare_split(pool: Executor, folder: Path, split: str, count: int, seed: int) -> None:
    media = folder / f".{split}"
    shutil.rmtree(media, ignore_errors=True)
    media.mkdir(parents=True)
    drawn = pool.map(draw_file, repeat(media), repeat(split), range(count), repeat(seed), chunksize=32)
    for _ in tqdm(drawn, total=count, desc=f"draw {split}"):
        pass
    kind = "image" if split == "pictures" else "video"
    if split in ("unlabelled", "pictures"):
        pack(media, folder, kind, split)
    else:
        listed = media / "labels.txt"
        listed.write_text("".join(f"{i:06d}.mp4 {label_of(i)}\n" for i in range(count)))
        pack(listed, folder, kind, split, root=media)
    shutil.rmtree(media)


def draw_classes(path: Path) -> None:
    """A clip of each class from the same draw, a row each: only the motion differs."""
    from matplotlib import pyplot

    figure, rows = pyplot.subplots(len(COURSES), figsize=(6.4, 5.6), layout="constrained")
    for axes, name in zip(rows, COURSES, strict=True):
        clip = render_action(generator(7, Use.SYNTHETIC), name, CLIP)
        spaced = np.pad(clip, ((0, 0), (0, 0), (2, 2), (0, 0)), constant_values=255)
        axes.imshow(np.concatenate(list(spaced), axis=1))
        axes.set_frame_on(False)
        axes.set_ylabel(name.replace("_then_", "\nthen "), rotation=0, ha="right", va="center", fontsize=8)
        axes.set_xticks([])
        axes.set_yticks([])
    figure.savefig(path, dpi=80, bbox_inches="tight")
    pyplot.close(figure)
