"""Videos that a GPU's decoder would show otherwise than a worker go to a worker; those that only look odd do not."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from bevt_ds.data.decoding.gpu_decoder import GpuDecoder
from bevt_ds.data.decoding.pool import DecodePool
from bevt_ds.data.decoding.sessions import GpuRefusal
from bevt_ds.data.decoding.video import fits_gpu, probe
from bevt_ds.data.limits import BadSample, Limits
from tests.loader.fake_gpu import FakeGpu
from tests.loader.media import decode_clip, encode_clip, noise, pooled_clips, remuxed

HEIGHT, WIDTH = 144, 160
FRAMES = noise(10, HEIGHT, WIDTH, softness=8.0)
STARTS = [(0.0, 0.0), (0.7, 0.5)]


def x264(parameters: str = "", frames: np.ndarray = FRAMES, **options: str) -> bytes:
    return encode_clip(frames, "mp4", "libx264", g="5", bf="1", **{"x264-params": parameters}, **options)


def x265(parameters: str = "", frames: np.ndarray = FRAMES, **options: str) -> bytes:
    parameters = f"log-level=none:keyint=5:{parameters}".rstrip(":")
    return encode_clip(frames, "mp4", "libx265", preset="ultrafast", **{"x265-params": parameters}, **options)


def cropped(left: int, top: int, right: int, bottom: int) -> bytes:
    """H.264 of which a part is shown; the container is told its size."""
    data = x264(f"crop-rect={left},{top},{right},{bottom}:qp=4")
    stored, shown = struct.pack(">HH", WIDTH, HEIGHT), struct.pack(">HH", WIDTH - left - right, HEIGHT - top - bottom)
    assert data.count(stored) == 1
    return data.replace(stored, shown)


def layered() -> bytes:
    """HEVC with filler data of a second layer in its first packet."""
    unit = b"\x4c\x09\xff\x80"
    return remuxed(x265(), "mp4", payload=lambda i, d: struct.pack(">I", len(unit)) + unit + d if i == 0 else d)


def unlabelled() -> bytes:
    """HEVC whose general_progressive_source_flag is off, in its header and in its first packet's sets."""
    flags = rb"(\x01\x60\x00\x00\x03?\x00)\x90"  # behind Main and what it is compatible with; units escape two zeros
    data, count = re.subn(flags, b"\\1\x10", x265())
    assert count == 3, "the header's own, and those of the video's and the sequence's parameter sets"
    return data


OBSTACLES = {
    "H.264, interlaced": (lambda: x264("tff=1"), "interlaced"),
    "H.264 that may be interlaced": (lambda: x264("fake-interlaced=1"), "may be interlaced"),
    "HEVC that may be interlaced": (unlabelled, "may be interlaced"),
    "H.264, lossless": (lambda: x264("qp=0"), "profile 244 of H.264"),
    "H.264, cropped at its left": (lambda: cropped(6, 0, 0, 0), "cropped at its left or top"),
    "H.264, cropped at its top": (lambda: cropped(0, 8, 0, 0), "cropped at its left or top"),
    "HEVC, interlaced": (lambda: x265("interlace=tff"), "interlaced"),
    "HEVC of another profile": (lambda: x265(profile="main-intra"), "profile 4 of HEVC"),
    "HEVC of several layers": (layered, "of several layers"),
    "MPEG-4, interlaced": (lambda: encode_clip(FRAMES, "mp4", "mpeg4", flags="+ildct"), "interlaced"),
}
ALIKE = {
    "pixels that are not square": lambda: x264("sar=16/11"),
    "colours of another space": lambda: x264("colormatrix=bt709:transfer=smpte2084:colorprim=bt2020"),
    "full range": lambda: x264("fullrange=on"),
    "cropped at its right and bottom": lambda: x264("qp=10", FRAMES[:, :130, :150]),
    "cropped by a rectangle": lambda: cropped(0, 0, 6, 8),
    "H.264, Baseline": lambda: x264(profile="baseline"),
    "chroma at the left, said so": lambda: x264("chromaloc=0"),
    "HEVC, cropped": lambda: x265("", FRAMES[:, :, :150]),
    "HEVC, lossless": lambda: x265("lossless=1"),
}


@pytest.fixture(scope="module")
def pool() -> Iterator[DecodePool]:
    pool = DecodePool(1, 60.0, Limits())
    yield pool
    pool.close()


@pytest.mark.parametrize("name", OBSTACLES)
def test_video_that_a_gpu_would_show_otherwise_goes_to_a_worker(pool: DecodePool, name: str) -> None:
    make, obstacle = OBSTACLES[name]
    data, gpu = make(), FakeGpu()
    info = probe(data, Limits())
    assert info.gpu_obstacle == obstacle and not fits_gpu(vars(info))
    assert fits_gpu({**vars(info), "gpu_obstacle": ""}), "nothing else keeps it from a GPU"
    with pytest.raises(GpuRefusal, match=f"{info.codec}, {obstacle}|mpeg4 is decoded by workers") as refusal:
        GpuDecoder(pool, gpu, sessions=1).clips(data, STARTS, 4, 2)
    assert not refusal.value.is_fault and not gpu.opened
    assert pooled_clips(pool, data, STARTS, 4, 2).shape == (2, 4, info.height, info.width, 3)


@pytest.mark.parametrize("name", ALIKE)
def test_video_that_only_looks_odd_is_decoded_on_the_gpu_to_the_workers_pixels(pool: DecodePool, name: str) -> None:
    data = ALIKE[name]()
    clips, _ = GpuDecoder(pool, FakeGpu(), sessions=1).clips(data, STARTS, 4, 2)
    np.testing.assert_array_equal(torch.stack(clips).numpy(), pooled_clips(pool, data, STARTS, 4, 2))


@pytest.mark.parametrize("make", [x264, x265])
def test_chroma_elsewhere_sends_a_video_to_a_worker_and_condemns_no_codec(pool: DecodePool, make) -> None:
    gpu = FakeGpu()
    decoder = GpuDecoder(pool, gpu, sessions=1)
    with pytest.raises(GpuRefusal, match="its chroma lies elsewhere") as refusal:
        decoder.clips(make("chromaloc=2"), STARTS, 4, 2)
    assert not refusal.value.is_fault and not gpu.opened
    decoder.clips(make(), STARTS, 4, 2)
    assert gpu.stretches >= 1


def test_size_that_changes_on_the_way_is_not_for_a_gpu(pool: DecodePool) -> None:
    """The second group of frames is of another size, its sets in its packets; a worker says that it cannot be used."""
    first, second = (x264("repeat-headers=1", part) for part in (FRAMES, FRAMES[:, :96, :112]))
    others: list[bytes] = []
    remuxed(second, "mp4", lambda packet: others.append(bytes(packet)))
    data = remuxed(first, "mp4", payload=lambda i, packet: others[i] if i >= 5 else packet)
    gpu = FakeGpu()
    with pytest.raises(GpuRefusal) as refusal:
        GpuDecoder(pool, gpu, sessions=1).clips(data, STARTS, 4, 2)
    assert not refusal.value.is_fault and not gpu.opened
    with pytest.raises(BadSample, match="a frame is 112x96, its header says 160x144"):
        pooled_clips(pool, data, STARTS, 4, 2)


@pytest.mark.parametrize("edges", [(6, 0, 0, 0), (16, 8, 0, 0), (30, 2, 4, 10)])
def test_video_that_is_cropped_at_its_left_is_shown_to_the_pixel(edges: tuple[int, int, int, int]) -> None:
    left, top, right, bottom = edges
    shown = decode_clip(cropped(*edges), np.arange).astype(int)
    assert np.abs(shown - FRAMES[:, top : HEIGHT - bottom, left : WIDTH - right]).mean() < 7  # elsewhere: over 20
