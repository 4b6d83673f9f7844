"""Unusual but valid videos: edit lists, odd sizes, variable frame rates (D18)."""

from __future__ import annotations

import io
import struct

import av
import numpy as np
import pytest
from nvidia.dali import fn

from bevt_ds.data.decoding.transcode import Profile, transcode
from bevt_ds.data.decoding.video import fits_gpu, full_decode, opened, probe
from bevt_ds.data.limits import Limits
from tests.loader.media import at_any_size, by_dali, decode_clip, encode_clip, numbers_of, shades

LIMITS = Limits()
FRAMES = 40
MOVIE_TICKS, MEDIA_TICKS = 40, 512  # a frame, in FFmpeg's time scales of 1000 and 25 x 512
VP9 = {"g": "10", "deadline": "realtime", "cpu-used": "8"}


@pytest.fixture(scope="module")
def plain() -> dict[str, bytes]:
    """A keyframe every 10 of 40 frames; with B-frames and without."""
    return {
        "h264": encode_clip(shades(FRAMES), "mp4", "libx264", g="10", bf="2"),
        "vp9": encode_clip(shades(FRAMES), "mp4", "libvpx-vp9", **VP9),
    }


def edited(data: bytes, first: int, count: int) -> bytes:
    """The same MP4, its edit list showing `count` frames from `first` on: what `ffmpeg -ss -c copy` leaves."""
    at = data.index(b"elst") + 12
    (start,) = struct.unpack_from(">i", data, at + 4)
    entry = struct.pack(">Ii", count * MOVIE_TICKS, start + first * MEDIA_TICKS)
    return data[:at] + entry + data[at + len(entry) :]


EDITS = {
    "everything": (0, 40),
    "from a keyframe": (10, 30),
    "inside a GOP": (13, 27),
    "both ends": (13, 10),
    "end": (0, 17),
}


@pytest.mark.parametrize("codec", ["h264", "vp9"])
@pytest.mark.parametrize("edit", EDITS)
def test_edit_list_hides_reference_frames(plain: dict[str, bytes], codec: str, edit: str) -> None:
    """The frames are those that FFmpeg shows, from any of them on."""
    first, count = EDITS[edit]
    data = edited(plain[codec], first, count)
    shown = list(range(first, first + count))
    with av.open(io.BytesIO(data)) as container:
        theirs = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    assert numbers_of(theirs) == shown
    assert numbers_of(decode_clip(data, np.arange)) == shown
    for start in range(0, count, 4):
        assert numbers_of(decode_clip(data, lambda _, s=start: np.array([s, count - 1]))) == [shown[start], shown[-1]]
    assert sum(1 for _ in full_decode(data, LIMITS)) == count
    info = probe(data, LIMITS)
    assert info.frames == count and (info.hidden == 0) == (edit in ("everything", "from a keyframe"))
    assert fits_gpu(at_any_size(info)) == (info.hidden == 0)


@pytest.mark.parametrize(("height", "width"), [(48, 63), (47, 64), (47, 63)])
def test_odd_frame_sizes_are_not_for_a_gpu(height: int, width: int) -> None:
    """VP9 has them, Something-Something's 427x240 among others. The CPU decodes them whole."""
    data = encode_clip(shades(4, height, width), "webm", "libvpx-vp9", **VP9)
    info = probe(data, LIMITS)
    assert (info.height, info.width) == (height, width)
    larger = at_any_size(info)
    assert fits_gpu(larger) and not fits_gpu({**larger, "width": 256 + width % 2, "height": 256 + height % 2})
    assert decode_clip(data, np.arange).shape == (4, height, width, 3)


def test_dali_counts_the_same_frames(plain: dict[str, bytes]) -> None:
    """VP9 is what DALI decodes on a CPU."""
    (frames,) = by_dali(fn.decoders.video, [edited(plain["vp9"], 10, 30)], frames=[0, 5, 20])
    assert numbers_of(frames) == [10, 15, 30]


UNEVEN = [0, 1, 2, 3, 8, 9, 10, 11, 30, 31, 32, 33, 34, 60, 61, 62, 63, 64, 65, 66]  # 1/25 s


@pytest.mark.parametrize(
    ("container", "codec", "options"),
    [
        ("mp4", "libx264", {"g": "8", "bf": "2"}),
        ("matroska", "libx264", {"g": "8", "bf": "2"}),
        ("webm", "libvpx-vp9", VP9),
    ],
)
def test_variable_frame_rate_numbers_frames_as_shown(container: str, codec: str, options: dict[str, str]) -> None:
    """Frames are numbered as they are shown, however long each lasts; their times are the file's."""
    data = encode_clip(shades(len(UNEVEN)), container, codec, times=UNEVEN, **options)
    assert numbers_of(decode_clip(data, np.arange)) == list(range(len(UNEVEN)))
    assert numbers_of(decode_clip(data, lambda _: np.array([17, 4, 9]))) == [17, 4, 9]
    with opened(data, LIMITS) as video:
        # Matroska counts milliseconds
        np.testing.assert_allclose(video.times(), np.array(UNEVEN) / 25, atol=0.5e-3 + 1e-9)


def test_training_profile_makes_the_rate_constant() -> None:
    """At 25 frames a second each tick shows the source's nearest frame in time."""
    source = encode_clip(shades(len(UNEVEN)), "mp4", "libx264", times=UNEVEN, bf="2", crf="1")
    data, facts = transcode(source, Profile(fps=25.0, crf=1), LIMITS)
    expected = [min(range(len(UNEVEN)), key=lambda i: (abs(UNEVEN[i] - tick), i)) for tick in range(67)]
    shown = numbers_of(decode_clip(data, np.arange))
    assert shown[:67] == expected and facts["times"][:67] == [round(UNEVEN[i] / 25, 4) for i in expected]


def test_two_frames_at_one_timestamp_are_counted() -> None:
    """Of a thousand and more a second Matroska cannot tell the times: the frames are counted."""
    data = encode_clip(shades(8), "webm", "libvpx-vp9", **VP9)
    second = b"\x81\x00\x28\x00"  # track 1, 40 ms, no keyframe
    assert data.count(second) == 1
    same = data.replace(second, b"\x81\x00\x00\x00")
    assert numbers_of(decode_clip(same, np.arange)) == list(range(8))


FOR_A_GPU = {"container": "mp4", "hidden": 0, "is_plain": True, "codec": "h264", "pixel_format": "yuv420p"}
FOR_A_GPU |= {"width": 64, "height": 48, "rotation": 0, "mirrored": False, "gpu_obstacle": ""}


@pytest.mark.parametrize(
    "change",
    [
        {"container": "avi"},
        {"container": "fragmented mp4"},
        {"hidden": 2},
        {"is_plain": False},
        {"codec": "mjpeg"},
        {"pixel_format": "yuv420p10le"},
        {"width": 63},
        {"height": 47},
        {"rotation": 180},
        {"mirrored": True},
        {"gpu_obstacle": "interlaced"},
        {"width": 46},
        {"height": 14},
        {"height": 4098},
        {"codec": "hevc", "width": 256, "height": 142},
    ],
)
def test_videos_that_only_the_cpu_decodes(change: dict) -> None:
    assert fits_gpu(FOR_A_GPU) and not fits_gpu(FOR_A_GPU | change)


def test_file_without_a_frame_rate_is_packed_at_25() -> None:
    """A single frame has no rate: packing then takes 25 a second."""
    data = encode_clip(shades(1), "matroska", "mjpeg", pixel_format="yuvj420p")
    _, facts = transcode(data, Profile(), LIMITS)
    assert facts["frames"] == 1 and facts["fps"] == 25
