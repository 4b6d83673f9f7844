"""Decoding of clips by PyAV: frames, seeking, pixels equal to DALI's, refusals."""

from __future__ import annotations

import io
from types import SimpleNamespace

import av
import numpy as np
import pytest
from nvidia.dali import fn

from bevt_ds.data.decoding.frame_index import Entry
from bevt_ds.data.decoding.geometry import Box
from bevt_ds.data.decoding.video import RgbWriter, opened, probe
from bevt_ds.data.limits import BadSample, Limits
from tests.loader.media import by_dali, decode_clip

LIMITS = Limits()
CODECS = {
    "h264": ("mp4", "libx264", {"g": "10", "bf": "2"}),
    "h264 open GOP": ("mp4", "libx264", {"g": "10", "bf": "3", "x264-params": "open-gop=1"}),
    "mpeg4": ("mp4", "mpeg4", {"g": "8", "bf": "2"}),
    "mpeg4 in AVI": ("avi", "mpeg4", {"g": "8", "bf": "2"}),
    "mpeg4 in MKV": ("matroska", "mpeg4", {"g": "8"}),
    "vp9": ("webm", "libvpx-vp9", {"g": "12", "deadline": "realtime", "cpu-used": "8"}),
}


@pytest.fixture(scope="module")
def clips(make: SimpleNamespace) -> dict[str, bytes]:
    frames = make.noise(40, 50, 66, softness=10.0)
    frames = np.stack([np.roll(frame, 3 * i, axis=1) for i, frame in enumerate(frames)])
    return {name: make.clip(frames, c, codec, **options) for name, (c, codec, options) in CODECS.items()}


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("wanted", [[0], [39], [21, 23, 25], [30, 5, 5, 12], list(range(40))])
def test_any_frames_equal_a_full_decode(clips: dict[str, bytes], name: str, wanted: list) -> None:
    with av.open(io.BytesIO(clips[name])) as container:
        everything, writer = np.empty((40, 50, 66, 3), np.uint8), RgbWriter()
        for image, frame in zip(everything, container.decode(video=0), strict=True):
            writer.write(frame, image, Box(0, 0, 50, 66))
    seen = []
    got = decode_clip(clips[name], lambda total: seen.append(total) or np.array(wanted), LIMITS)
    assert seen == [40]
    np.testing.assert_array_equal(got, np.stack([everything[i] for i in wanted]))


def test_decoding_starts_at_the_nearest_keyframe(clips: dict[str, bytes]) -> None:
    """Frame 25 of a file with a keyframe every 10 needs few packets, not 26."""
    with opened(clips["h264"], LIMITS) as video:
        video.frames(np.array([25]))
        assert video.decoded <= 10
        assert Entry(20, 20) in video.index.entries and video.index.stretches([25])[0].beginnings == [20, 10, 0]


def test_probe_returns_video_properties(clips: dict[str, bytes]) -> None:
    info = probe(clips["h264"], LIMITS)
    assert (info.frames, info.width, info.height, info.codec) == (40, 66, 50, "h264")
    assert info.fps == pytest.approx(25)


def test_decoded_pixels_equal_dali(clips: dict[str, bytes]) -> None:
    """VP9 is what DALI's CPU decoder knows: swscale's flags make the conversion to RGB the same."""
    wanted = [3, 17, 4, 39]
    (theirs,) = by_dali(fn.decoders.video, [clips["vp9"]], frames=wanted)
    np.testing.assert_array_equal(decode_clip(clips["vp9"], lambda _: np.array(wanted), LIMITS), theirs)


def sound() -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as out:
        stream = out.add_stream("aac", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.rate = 16000
        out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return buffer.getvalue()


def test_file_of_sound_alone_is_refused() -> None:
    with pytest.raises(BadSample, match="no video stream"):
        decode_clip(sound(), np.arange, LIMITS)
