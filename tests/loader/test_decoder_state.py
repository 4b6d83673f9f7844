"""What a damaged sample decodes to depends on its own bytes only, not on the sample before it (D16).

DALI's video decoder has been seen to hand out the previous sample's pixels. Here each damaged file is decoded twice,
after two different good ones: were there a trace of those, the two outcomes would differ.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from PIL import Image

from bevt_ds.data.decoding.images import check_image
from bevt_ds.data.decoding.pool import DecodePool
from bevt_ds.data.limits import BadSample, Limits
from bevt_ds.data.pixels.pipeline import PixelPipeline
from tests.loader.damage import mutate, quiet
from tests.loader.media import encode_clip, images_of, noise, pooled_clips

FRAMES, HEIGHT, WIDTH = 12, 48, 64
CASES = 80
LIMITS = Limits(pixels=1 << 20, frames=5000, clip_bytes=1 << 26)
VP9 = {"deadline": "realtime", "cpu-used": "8"}
CODECS = {
    "h264": ("mp4", "libx264", {"g": "6", "bf": "2"}),
    "vp9": ("mp4", "libvpx-vp9", VP9),
    "webm": ("webm", "libvpx-vp9", VP9),
    "avi": ("avi", "mpeg4", {}),
}


@pytest.fixture
def decode() -> Iterator[Callable[[bytes], bytes | str]]:
    """Through one worker: the pixels of all frames, or why there are none."""
    pool = DecodePool(1, 20.0, LIMITS)

    def run(data: bytes) -> bytes | str:
        try:
            return pooled_clips(pool, data, [(0.0, 0.0)], FRAMES, 1).tobytes()
        except BadSample as bad:
            return str(bad)

    yield run
    pool.close()


def outcomes(
    run: Callable[[bytes], bytes | str], good: bytes, before: tuple[bytes, bytes], damaged: Iterator[bytes]
) -> Counter[type]:
    """How many damaged files became pixels (bytes) and how many a reason (str), the same after either good file."""
    assert len({run(good), *map(run, before)}) == 3
    seen = Counter()
    for number, data in enumerate(damaged):
        results = []
        for other in before:
            assert isinstance(run(other), bytes)
            results.append(run(data))
        assert results[0] == results[1], f"case {number} depends on the sample before it"
        seen[type(results[0])] += 1
    return seen


@pytest.mark.parametrize("name", CODECS)
def test_damaged_video_decodes_the_same_after_any_other(decode: Callable[[bytes], bytes | str], name: str) -> None:
    container, codec, options = CODECS[name]
    good, *before = (
        encode_clip(noise(FRAMES, HEIGHT, WIDTH, seed=seed), container, codec, **options) for seed in range(3)
    )
    payload = range(len(good) // 8, len(good) // 2)  # behind WebM's and AVI's header, before MP4's tables
    damaged = (mutate(good, np.random.default_rng((9, i)), payload.start, payload.stop) for i in range(CASES))
    seen = outcomes(decode, good, tuple(before), damaged)
    assert seen[bytes] > 0.05 * CASES and seen[str] > 0.05 * CASES


def drawn_image(seed: int, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(noise(HEIGHT, WIDTH, seed=seed)).save(buffer, form, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("form", ["JPEG", "progressive", "PNG"])
def test_damaged_image_decodes_the_same_after_any_other(entry, form: str) -> None:
    """Through DALI in this process. What is cut and has its end marker back is decoded in part."""
    pipeline, view = PixelPipeline("image", 1, 32, 16, threads=1), entry(short_side=32)

    def run(data: bytes) -> bytes | str:
        try:
            check_image(data, LIMITS)
            with quiet():
                return images_of(pipeline, [data], [view])[0].numpy().tobytes()
        except BadSample as bad:
            return str(bad)

    options = {"progressive": True} if form == "progressive" else {}
    good, *before = (drawn_image(seed, "JPEG" if form == "progressive" else form, **options) for seed in range(3))
    end = good[-12:] if form == "PNG" else good[-2:]
    cut = (good[:at] + end for at in np.linspace(700, len(good) - len(end) - 1, 40).astype(int))
    damaged = [*cut, *(mutate(good, np.random.default_rng((8, i)), 40) for i in range(CASES // 2))]
    seen = outcomes(run, good, tuple(before), iter(damaged))
    assert seen[str] > 0 and (form == "PNG" or seen[bytes] > 0.05 * CASES)
