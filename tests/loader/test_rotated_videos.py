"""Rotated videos: every path applies the display matrix and records it."""

from __future__ import annotations

import io
import json
import struct
import tarfile
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest

import bevt_ds
from bevt_ds.data.decoding.geometry import UPRIGHT, Box, Crop, Turn, source_box, turn_of_matrix
from bevt_ds.data.decoding.pool import DecodePool
from bevt_ds.data.decoding.transcode import Profile, transcode
from bevt_ds.data.decoding.video import fits_gpu, opened, probe
from bevt_ds.data.limits import BadSample, Limits
from bevt_ds.data.plan import CHOICES
from bevt_ds.shards.check import check
from bevt_ds.shards.pack import pack
from tests.loader.media import at_any_size, decode_clip, encode_clip, noise, remuxed

LIMITS = Limits()
ONE, LAST = 1 << 16, 1 << 30
FRAMES = noise(6, 48, 64)
# (a, b, c, d) of x' = ax + cy, y' = bx + dy -> degrees clockwise, after a mirror
MATRICES = {
    (1, 0, 0, 1): (0, False),
    (0, 1, -1, 0): (90, False),
    (-1, 0, 0, -1): (180, False),
    (0, -1, 1, 0): (270, False),
    (-1, 0, 0, 1): (0, True),
    (0, -1, -1, 0): (90, True),
    (1, 0, 0, -1): (180, True),
    (0, 1, 1, 0): (270, True),
}
STREAMS = {"mp4": ("mp4", "libx264"), "mkv": ("matroska", "libx264"), "webm": ("webm", "libvpx-vp9")}
SPEED = {"libx264": {"g": "3", "bf": "1"}, "libvpx-vp9": {"g": "3", "deadline": "realtime", "cpu-used": "8"}}


def clip(matrix: tuple[int, ...], stream: str = "mp4", frames: np.ndarray = FRAMES) -> bytes:
    a, b, c, d = (ONE * n for n in matrix)
    container, codec = STREAMS[stream]
    whole = (a, b, 0, c, d, 0, 0, 0, LAST)
    return encode_clip(frames, container, codec, matrix=whole, **SPEED[codec])


def shown(stored: np.ndarray, matrix: tuple[int, ...]) -> np.ndarray:
    """Where the matrix puts each pixel of (N,H,W,3), one by one, moved to begin at 0."""
    a, b, c, d = matrix
    y, x = np.mgrid[: stored.shape[1], : stored.shape[2]]
    columns, rows = a * x + c * y, b * x + d * y
    columns, rows = columns - columns.min(), rows - rows.min()
    result = np.empty((len(stored), rows.max() + 1, columns.max() + 1, 3), np.uint8)
    result[:, rows, columns] = stored
    return result


@pytest.fixture(scope="module")
def stored() -> dict[str, np.ndarray]:
    """The decoded frames of each stream, none of which is turned."""
    return {stream: decode_clip(clip((1, 0, 0, 1), stream), np.arange) for stream in STREAMS}


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("matrix", MATRICES)
def test_rotated_video_frames_are_upright(stored: dict[str, np.ndarray], stream: str, matrix: tuple[int, ...]) -> None:
    data = clip(matrix, stream)
    expected = shown(stored[stream], matrix)
    np.testing.assert_array_equal(decode_clip(data, np.arange), expected)
    np.testing.assert_array_equal(decode_clip(data, lambda _: np.array([4, 5])), expected[4:])
    info = probe(data, LIMITS)
    assert (info.rotation, info.mirrored) == MATRICES[matrix]
    assert (info.height, info.width) == expected.shape[1:3]
    assert fits_gpu(at_any_size(info)) == (matrix == (1, 0, 0, 1))  # on a GPU a worker decodes the others


@pytest.mark.parametrize("size", [(48, 64), (47, 63)])
@pytest.mark.parametrize("matrix", MATRICES)
def test_crop_of_a_rotated_video_is_of_the_upright_frame(matrix: tuple[int, ...], size: tuple[int, int]) -> None:
    """What a crop needs is cut before pixels are converted: the same as in the whole frame, but for the outermost."""
    data = clip(matrix, "webm", noise(2, *size))
    whole = decode_clip(data, np.arange)
    height, width = whole.shape[1:3]
    boxes = [Box(4, 8, 20, 30), source_box(height, width, Crop(32, 0.9, 0.2, 24))]
    with opened(data, LIMITS) as video:
        parts = video.decode_into(np.arange(2), lambda size: np.zeros(size, np.uint8), boxes)
    for part, frame, box in zip(parts, whole, boxes, strict=True):
        cut = np.s_[box.top + 1 : box.top + box.height - 1, box.left + 1 : box.left + box.width - 1]
        np.testing.assert_array_equal(part[cut], frame[cut])


def test_workers_give_upright_clips_for_training_and_testing(stored: dict[str, np.ndarray]) -> None:
    """For pretraining, fine-tuning and testing."""
    matrix, pool = (0, 1, -1, 0), DecodePool(1, 60.0, LIMITS)
    try:
        data = clip(matrix)
        for choice, position in zip(CHOICES, [(0.5, 0.0), (0, 1), (0.5, 0.5), (0, 1)], strict=True):
            numbers = CHOICES[choice](6, 2, 1, position)
            with pool.clips(data, [position], 2, 1, choice) as decoded:
                np.testing.assert_array_equal(decoded.copied()[0], shown(stored["mp4"], matrix)[numbers])
                assert decoded.reply["total"] == 6
    finally:
        pool.close()


@pytest.mark.parametrize("matrix", MATRICES)
def test_transcoding_rotates_the_pixels(matrix: tuple[int, ...]) -> None:
    """For good, so that whatever reads the shards has them upright; the JSON keeps what was done."""
    smooth = noise(3, 48, 64, softness=0)
    data, facts = transcode(clip(matrix, frames=smooth), Profile(crf=1), LIMITS)
    upright = clip((1, 0, 0, 1), frames=smooth)
    rewritten, expected = decode_clip(data, np.arange), shown(decode_clip(upright, np.arange), matrix)
    assert rewritten.shape == expected.shape
    assert np.abs(rewritten.astype(int) - expected).mean() < 6  # another turn: over 40; chroma moves by part of a pixel
    assert (facts["height"], facts["width"]) == expected.shape[1:3]
    assert (facts["original"]["rotation"], facts["original"]["mirrored"]) == MATRICES[matrix]
    assert probe(data, LIMITS).rotation == 0 and not probe(data, LIMITS).mirrored


def test_pack_records_rotation(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    data = clip((0, 1, -1, 0))
    (tmp_path / "in" / "a.mp4").write_bytes(data)
    for profile, rotation in ((None, 90), (Profile(), None)):
        packed = pack(tmp_path / "in", tmp_path / str(rotation), "video", jobs=1, profile=profile)
        with tarfile.open(packed.shards[0]) as tar:
            facts = json.load(tar.extractfile("a.json"))
            assert (tar.extractfile("a.mp4").read() == data) == (profile is None)
        assert (facts["width"], facts["height"], facts.get("rotation")) == (48, 64, rotation)
        report = check([str(packed.shards[0])], jobs=1)
        assert report.findings == [] and (report.facts[0]["width"], report.facts[0]["height"]) == (48, 64)


def test_load_video_returns_upright_frames(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(clip((0, 1, -1, 0)))
    (tmp_path / "b.mp4").write_bytes(clip((1, 0, 0, 1), frames=shown(FRAMES, (0, 1, -1, 0))))
    lying, upright = (bevt_ds.load_clip(tmp_path / f"{name}.mp4", frames=2, stride=1, size=32) for name in "ab")
    assert (lying - upright).abs().mean() < 0.3 < (lying - upright.transpose(-1, -2)).abs().mean()


def test_movie_level_display_matrix_is_applied() -> None:
    """That of the whole MP4, on top of its tracks'."""
    data = clip((0, 1, -1, 0))
    at = data.index(b"mvhd") + 40
    half = struct.pack(">9i", -ONE, 0, 0, 0, -ONE, 0, 0, 0, LAST)
    assert probe(data[:at] + half + data[at + 36 :], LIMITS).rotation == 270


@pytest.mark.parametrize("codec", ["libx264", "libx265"])
def test_display_orientation_sei_is_applied(codec: str) -> None:
    """A display orientation of 90 degrees counter-clockwise in the first frame's packet, no matrix in the container."""
    plain = encode_clip(
        FRAMES, "mp4", codec, bf="0", g="3", **({"x265-params": "log-level=0"} if codec == "libx265" else {})
    )
    header, rest = (b"\x06", "01001") if codec == "libx264" else (b"\x4e\x01", "11000")  # until the next message
    message = int("000" + f"{1 << 14:016b}" + rest, 2).to_bytes(3, "big")
    unit = header + bytes([47, len(message)]) + message + b"\x80"
    data = remuxed(plain, "mp4", payload=lambda i, d: struct.pack(">I", len(unit)) + unit + d if i == 0 else d)
    info = probe(data, LIMITS)
    assert (info.rotation, info.mirrored, info.width, info.height) == (270, False, 48, 64)
    expected = shown(decode_clip(plain, np.arange), (0, -1, 1, 0))
    np.testing.assert_array_equal(decode_clip(data, np.arange), expected)
    np.testing.assert_array_equal(decode_clip(data, lambda _: np.array([4])), expected[4:5])


def test_rotation_by_other_angles_is_refused() -> None:
    slanted = (56755, -32767, 0, 32767, 56755, 0, 0, 0, LAST)
    data = encode_clip(FRAMES, "mp4", "libx264", matrix=slanted)
    with pytest.raises(BadSample, match="by no multiple of 90 degrees"):
        probe(data, LIMITS)


@pytest.mark.parametrize("scales", [(1, 1), (3, 0.5), (1e-4, 1)])
def test_display_matrix_scale_is_ignored(scales: tuple[float, float]) -> None:
    for (a, b, c, d), (rotation, mirrored) in MATRICES.items():
        turn = turn_of_matrix([a * scales[0], b * scales[1], 0, c * scales[0], d * scales[1], 0, 0, 0, 1])
        assert turn.facts == {"rotation": rotation, "mirrored": mirrored}
    assert turn_of_matrix([0] * 9) == UPRIGHT


@pytest.mark.parametrize("turn", [Turn(*parts) for parts in product([False, True], repeat=3)])
def test_rotation_can_be_inverted(make: SimpleNamespace, turn: Turn) -> None:
    stored = make.noise(5, 7)
    upright = turn.applied(stored)
    assert upright.shape[1::-1] == turn.size(7, 5)
    np.testing.assert_array_equal(turn.undone(upright), stored)


def test_ffmpeg_reads_the_same_display_matrix() -> None:
    """The tests' matrices are in the files as they are meant."""
    with av.open(io.BytesIO(clip((0, 1, -1, 0)))) as container:
        assert next(container.decode(video=0)).rotation == -90  # counter-clockwise
