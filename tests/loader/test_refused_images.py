"""Images that a decoder of batches refuses are decoded by the CPU: no batch is lost, and nothing is built again."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bevt_ds.batch import Batch
from bevt_ds.config.schema import Config
from bevt_ds.data.graph_stream import MOST_REFUSALS
from bevt_ds.data.limits import BadSample
from bevt_ds.data.loader import Loader
from bevt_ds.data.pixels.pipeline import PixelPipeline
from tests.loader import media
from tests.loader.media import deep_jpeg, noise, write_tar


def encoded(mode: str, kind: str, **options: object) -> bytes:
    image, buffer = Image.fromarray(noise(80, 100, softness=8.0)), io.BytesIO()
    if mode == "I;16":
        image = Image.fromarray(np.arange(8000, dtype=np.uint16).reshape(80, 100))
    image.convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def cut() -> bytes:
    """Half of its data is not there, its end marker is."""
    data = encoded("RGB", "JPEG")
    return data[: len(data) // 2] + data[-2:]


ODD = {
    "cmyk.jpg": encoded("CMYK", "JPEG"),
    "grey.jpg": encoded("L", "JPEG"),
    "progressive.jpg": encoded("RGB", "JPEG", progressive=True),
    "turned.jpg": media.encoded(noise(80, 100, softness=8.0), "JPEG", 6),
    "cut.jpg": cut(),
    "sixteen.png": encoded("I;16", "PNG"),
    "palette.png": encoded("P", "PNG"),
    "alpha.png": encoded("RGBA", "PNG"),
}


@pytest.fixture
def images(config: Config, tmp_path: Path) -> Callable[..., Config]:
    """A run of images alone: four to a batch, of these files."""

    def make(files: dict[str, bytes]) -> Config:
        tar = write_tar(tmp_path / "s.tar", files)
        data = replace(config.data, videos="", images=str(tar), eval_videos="", eval_images="", max_bad_fraction=0.9)
        return replace(config, data=data, train=replace(config.train, global_clips=0, micro_clips=0))

    return make


def read(config: Config, count: int) -> tuple[list[Batch], int]:
    with Loader(config) as loader:
        return list(islice(loader, count)), loader.bad_samples


@pytest.fixture
def refuse(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[list[int], list[str]]]:
    """From now on a decoder of encoded images refuses the batches that are told by their number."""
    run, build = PixelPipeline.run, PixelPipeline._build

    def begin(refuses: Callable[[int], bool]) -> tuple[list[int], list[str]]:
        asked, built = [], []

        def refusing(self: PixelPipeline, payloads: list, *more: object):
            if self.dali_decoder:
                asked.append(len(payloads))
                if refuses(len(asked)):
                    raise BadSample("nvJPEG says no")
            return run(self, payloads, *more)

        monkeypatch.setattr(PixelPipeline, "run", refusing)
        monkeypatch.setattr(PixelPipeline, "_build", lambda self: built.append(self.dali_decoder) or build(self))
        return asked, built

    return begin


def require_equal(batches: list[Batch], expected: list[Batch]) -> None:
    for a, b in zip(batches, expected, strict=True):
        assert a.image.keys == b.image.keys
        assert torch.equal(a.image.pixels, b.image.pixels) and torch.equal(a.image.view, b.image.view)


def test_images_that_a_decoder_refuses_now_and_then_are_the_cpus(images: Callable, refuse: Callable, caplog) -> None:
    """Colours, depths, turns and a cut: none is lost, and all have the pixels that they have in an accepted batch."""
    config = images(ODD)
    expected, bad = read(config, 12)
    assert bad == 0
    _, built = refuse(lambda number: number % 3 == 0)
    batches, bad = read(config, 12)
    require_equal(batches, expected)
    assert bad == 0 and built == ["cpu", ""], "a graph, and one for what is decoded already"
    said = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert set(said) == {"DALI's decoder of images refuses a batch that the CPU decodes: nvJPEG says no"}


def test_decoder_that_refuses_all_images_gets_no_more(images: Callable, refuse: Callable, caplog) -> None:
    config = images(ODD)
    expected, _ = read(config, MOST_REFUSALS + 6)
    asked, _ = refuse(lambda number: True)
    batches, bad = read(config, MOST_REFUSALS + 6)
    require_equal(batches, expected)
    assert bad == 0 and len(asked) == MOST_REFUSALS
    assert "DALI's decoder of images decodes no more: nvJPEG says no" in caplog.text


def test_image_that_the_cpu_refuses_too_is_bad_and_its_batch_is_whole(images: Callable, refuse: Callable) -> None:
    """JPEG of 12 bits among others: a substitute takes its place, the same whoever refuses first."""
    config = images({**ODD, "deep.jpg": deep_jpeg()})
    expected, bad = read(config, 9)
    assert bad >= 1 and not any(key.endswith("deep") for batch in expected for key in batch.image.keys)
    refuse(lambda number: number % 2 == 0)
    batches, same = read(config, 9)
    require_equal(batches, expected)
    assert same == bad
