"""Fixtures of the downstream tests: small labelled shards, and configurations that read them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from bevt_ds.config.samples import LabelledDataConfig
from bevt_ds.rng import Use, generator
from bevt_ds.shards.pack import pack
from bevt_ds.shards.synthetic.draw_worker import encode_mp4
from bevt_ds.shards.synthetic.scene import Extent, render

CLASS_NAMES = ("run", "sit", "walk")
VIDEOS = 11


@pytest.fixture(scope="session")
def labelled_videos() -> dict[str, bytes]:
    """File name -> a drawn clip of 20 frames, 72x96."""
    extent = Extent(height=72, width=96, frames=20)
    clips = (render(generator(7, Use.SYNTHETIC, 0, i), extent) for i in range(VIDEOS))
    return {f"clip-{i:02d}.mp4": encode_mp4(clip) for i, clip in enumerate(clips)}


@pytest.fixture(scope="session")
def pack_labelled(labelled_videos: dict[str, bytes]) -> Callable[..., str]:
    """pack_labelled(folder, split, labels): shards of 4 with a label a video, in order; returns their pattern."""

    def build(folder: Path, split: str, labels: list[str]) -> str:
        source = folder / f"{split}-media"
        source.mkdir(parents=True)
        files = dict(zip(labelled_videos, labels, strict=False))
        for name in files:
            (source / name).write_bytes(labelled_videos[name])
        (source / "list.txt").write_text("".join(f"{name} {label}\n" for name, label in files.items()))
        pack(source / "list.txt", folder, "video", split, shard_samples=4)
        return f"{folder}/{split}-*.tar"

    return build


@pytest.fixture(scope="session")
def labelled_shards(tmp_path_factory: pytest.TempPathFactory, pack_labelled: Callable[..., str]) -> Path:
    """A folder of shards: 11 videos of three classes as train-*.tar, seven of them as val-*.tar."""
    folder = tmp_path_factory.mktemp("labelled")
    labels = [CLASS_NAMES[(2 + i) % 3] for i in range(VIDEOS)]
    pack_labelled(folder, "train", labels)
    pack_labelled(folder, "val", labels[:7])
    return folder


@pytest.fixture(scope="session")
def labelled(labelled_shards: Path) -> LabelledDataConfig:
    """Clips of 8 frames, 64 px, with all that can be done to them."""
    return LabelledDataConfig(
        train=f"{labelled_shards}/train-*.tar",
        val=f"{labelled_shards}/val-*.tar",
        frames=8,
        stride=2,
        size=64,
        short_side=72,
        randaugment=(2, 7),
        erasing=0.5,
        workers=1,
        threads=1,
        shuffle_window=2,
    )


@pytest.fixture(scope="session")
def finetune_settings(labelled_shards: Path) -> dict[str, object]:
    """Of a small run on the small shards, with everything random switched on but the mixing of clips."""
    return {
        "data.train": f"{labelled_shards}/train-*.tar",
        "data.val": f"{labelled_shards}/val-*.tar",
        "data.size": 32,
        "data.short_side": 40,
        "data.frames": 4,
        "data.flip": 0.5,
        "data.randaugment": "2,7",
        "data.erasing": 0.5,
        "model.window": "2,2,2",
        "model.drop_path": 0.3,
        "model.dropout": 0.5,
        "train.log_every": 1,
    }
