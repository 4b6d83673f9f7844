"""Fixtures of the data tests: small drawn media and shards, and configurations that read them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from bevt_ds.config.samples import DataConfig, MaskConfig
from bevt_ds.config.schema import Config, TrainConfig
from bevt_ds.data.plan import PlanEntry
from bevt_ds.data.reading.cache import ShardCache
from bevt_ds.rng import Use, generator
from bevt_ds.shards.pack import pack
from bevt_ds.shards.synthetic.draw_worker import encode_jpeg, encode_mp4
from bevt_ds.shards.synthetic.scene import Extent, render
from tests.loader.media import encode_clip, noise, write_tar
from tests.loader.server import Server
from tests.shared import shared_folder

CLIPS, IMAGES = 10, 24


@pytest.fixture(autouse=True)
def user_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache folder of this package, empty and gone after the test."""
    folder = tmp_path_factory.mktemp("user-cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder / "bevt_ds"


@pytest.fixture(scope="session")
def media_folder() -> Path:
    """Real clips and images."""
    return shared_folder("media")


@pytest.fixture(scope="session")
def scenes() -> list[np.ndarray]:
    """Drawn clips: uint8 (N,H,W,3) each."""
    extent = Extent(height=72, width=96, frames=20)
    return [render(generator(7, Use.SYNTHETIC, 0, i), extent) for i in range(CLIPS)]


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory, scenes: list[np.ndarray]) -> Path:
    """A folder of small shards: three of videos, three of images, and the same as held-out data."""
    source, out = tmp_path_factory.mktemp("media"), tmp_path_factory.mktemp("shards")
    for i, frames in enumerate(scenes):
        (source / f"clip-{i:02d}.mp4").write_bytes(encode_mp4(frames))
    for i in range(IMAGES):
        (source / f"image-{i:02d}.jpg").write_bytes(encode_jpeg(scenes[i % CLIPS][i % 20]))
    pack(source, out, "video", "video", shard_samples=4)
    pack(source, out, "image", "image", shard_samples=9)
    return out


@pytest.fixture(scope="session")
def config(shards: Path) -> Config:
    """A run of both streams, small enough for tests: 64 px, 8 frames, masks of 4x4 cells."""
    data = DataConfig(
        videos=f"{shards}/video-*.tar",
        images=f"{shards}/image-*.tar",
        eval_videos=f"{shards}/video-*.tar",
        eval_images=f"{shards}/image-*.tar",
        frames=8,
        stride=2,
        size=64,
        token_size=32,
        short_side=(64, 80),
        mask=MaskConfig(min_block=24),
        workers=1,
        threads=1,
        shuffle_window=2,
        decode_seconds=20.0,
    )
    train = TrainConfig(steps=4, global_clips=4, global_images=8, micro_clips=2, micro_images=4, seed=3, eval_batches=2)
    return Config(recipe="test", data=data, train=train)


@pytest.fixture(scope="session")
def with_data(config: Config) -> Callable[..., Config]:
    """The test configuration with other values in `data`."""
    return lambda **changes: replace(config, data=replace(config.data, **changes))


@pytest.fixture(scope="session")
def entry() -> Callable[..., PlanEntry]:
    """A plan entry: the upright, centred, unchanged view, unless told otherwise."""
    plain = PlanEntry(0, 0, 0, 0, 0, 0.0, 0.0, 256, (0.5, 0.5), False, (1.0, 1.0, 1.0))
    return lambda **changes: replace(plain, **changes)


@pytest.fixture(scope="session")
def make() -> SimpleNamespace:
    """Builders of tars, noise and clips in any codec."""
    return SimpleNamespace(tar=write_tar, noise=noise, clip=encode_clip)


def alive(pid: int) -> bool:
    """Whether a process exists and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture
def is_alive() -> Iterator[Callable[[int], bool]]:
    yield alive


@pytest.fixture
def server(shards: Path) -> Iterator[Server]:
    """A web server with the small shards."""
    with Server() as server:
        server.files = {path.name: path.read_bytes() for path in shards.glob("*.tar")}
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.released.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def released() -> Iterator[threading.Event]:
    """What a stand-in for dead storage waits for: the end of the test."""
    event = threading.Event()
    yield event
    event.set()


@pytest.fixture
def cache(tmp_path: Path) -> ShardCache:
    """An empty cache that waits for a second."""
    return ShardCache(tmp_path / "cache", 1 << 30, seconds=1.0, first_pause=0.01)
