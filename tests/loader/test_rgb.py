"""Frames that a GPU decodes become the pixels that a worker makes of them, bit for bit."""

from __future__ import annotations

import av
import numpy as np
import pytest
import torch

from bevt_ds.data.decoding import rgb
from bevt_ds.data.decoding.geometry import Box
from bevt_ds.data.decoding.rgb import rgb_of_nv12
from bevt_ds.data.decoding.video import RgbWriter, opened
from bevt_ds.data.limits import Limits
from tests.loader.fake_gpu import nv12

SHAPES = {"libx264": [(72, 96), (34, 2), (2, 50)], "libx265": [(72, 96), (120, 150)]}  # x265 takes none smaller than 16
CASES = [(codec, shape) for codec, shapes in SHAPES.items() for shape in shapes]


def by_worker(frame: av.VideoFrame) -> np.ndarray:
    image = np.zeros((frame.height, frame.width, 3), np.uint8)
    RgbWriter().write(frame, image, Box(0, 0, frame.height, frame.width))
    return image


@pytest.mark.parametrize(("codec", "shape"), CASES)
@pytest.mark.parametrize("pixel_format", ["yuv420p", "yuvj420p"])
def test_rgb_equals_the_workers_bit_for_bit(make, codec: str, pixel_format: str, shape: tuple, monkeypatch) -> None:
    """Colours that change from pixel to pixel; wild levels, which no RGB has; a few frames at a time."""
    rng, options = np.random.default_rng(1), {"x265-params": "log-level=none"} if codec == "libx265" else {}
    images = rng.choice(np.array([0, 255], np.uint8), (4, *shape, 3))
    images[2:] = rng.integers(0, 256, images[2:].shape)
    data = make.clip(images, "mp4", codec, pixel_format=pixel_format, preset="ultrafast", crf="0", **options)
    monkeypatch.setattr(rgb, "_PIXELS", 2 * shape[0] * shape[1])
    with opened(data, Limits()) as video:
        frames = [frame for _, frame in video.pick(np.arange(4))]
        full = video.info.pixel_format == "yuvj420p"
    wild = [wilder(frame, rng) for frame in frames[:1]]
    expected = np.stack([by_worker(frame) for frame in [*frames, *wild]])
    stored = torch.from_numpy(np.stack([nv12(frame) for frame in [*frames, *wild]]))
    np.testing.assert_array_equal(rgb_of_nv12(stored, full).numpy(), expected)
    assert expected.std() > 20


def wilder(frame: av.VideoFrame, rng: np.random.Generator) -> av.VideoFrame:
    """The frame with any levels in all planes, in its own memory: what else is known of it stays."""
    frame.make_writable()
    for plane in frame.planes:
        np.frombuffer(plane, np.uint8)[:] = rng.choice([0, 16, 128, 240, 255], plane.buffer_size)
    return frame
