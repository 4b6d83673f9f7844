"""Frame numbers: frame n is the n-th of a full decode, from any start and with any timestamps."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from functools import cache

import av
import numpy as np
import pytest

from bevt_ds.data.decoding.transcode import Profile, transcode
from bevt_ds.data.decoding.video import fits_gpu, opened, probe
from bevt_ds.data.limits import Limits
from tests.loader.media import at_any_size, decode_clip, encode_clip, noise, numbers_of, remuxed, shades
from tests.loader.test_containers import with_sound

LIMITS = Limits()
FRAMES = 30
B_FRAMES = {"g": "10", "bf": "2"}
VP9 = {"g": "10", "cpu-used": "8", "deadline": "realtime"}
X265 = "keyint=10:min-keyint=10:bframes=3:b-adapt=0:log-level=none:"


@cache
def moving(height: int = 48, width: int = 64) -> np.ndarray:
    """A pattern that moves, no two frames alike: uint8 (N,H,W,3)."""
    frame = noise(height, width, softness=8.0)
    return np.stack([np.roll(frame, 3 * i, axis=1) for i in range(FRAMES)])


def clip(container: str, codec: str, pixel_format: str = "yuv420p", **options) -> bytes:
    return encode_clip(moving(), container, codec, pixel_format, **options)


def as_decoded(packet: av.Packet) -> None:
    """What a muxer makes of a packet without a time of presentation, as of an AVI."""
    packet.pts = packet.dts


def a_frame_later(packet: av.Packet) -> None:
    """What FFmpeg's `genpts` makes of it."""
    packet.pts = packet.dts + packet.duration


def x264(parameters: str, **options: str) -> bytes:
    return clip("mp4", "libx264", **{"g": "10", "x264-params": parameters, **options})


def x265(parameters: str = "") -> bytes:
    return clip("mp4", "libx265", **{"x265-params": X265 + parameters})


def hidden(data: bytes) -> bytes:
    """A VP8 clip in which every seventh frame is only for others to refer to, as an alternate reference frame is."""

    def hide(i: int, payload: bytes) -> bytes:
        return bytes([payload[0] & ~0x10]) + payload[1:] if i % 7 == 5 else payload

    return remuxed(data, "webm", payload=hide)


def packed(data: bytes) -> bytes:
    """An MPEG-4 clip of I, P, B, P, B, ... as DivX packs it: P and B in one chunk, then one that stands for the B."""
    with av.open(io.BytesIO(data)) as container:
        payloads = [bytes(packet) for packet in container.demux(video=0) if packet.size]
    empty = b"\0\0\1\xb6\x51\x1f"
    user_data = b"\0\0\1\xb2DivX503b1393p"

    def pack(i: int, payload: bytes) -> bytes:
        if i == 0:
            return user_data + payload
        if i % 2:
            return payload + (payloads[i + 1] if i + 1 < len(payloads) else b"")
        return empty

    return remuxed(data, "mp4", as_decoded, payload=pack)


def with_other_sets() -> bytes:
    """H.264 in which the parameter sets are replaced on the way: the second half is coded without CABAC."""
    first, second = (
        clip("avi", "libx264", g="10", bf="0", **{"x264-params": parameters}) for parameters in ("cabac=1", "cabac=0")
    )
    with av.open(io.BytesIO(second)) as container:
        payloads = [bytes(packet) for packet in container.demux(video=0) if packet.size]
    return remuxed(first, "avi", payload=lambda i, payload: payloads[i] if i >= 10 else payload)


KINDS: dict[str, Callable[[], bytes]] = {
    "H.264, times as decoded": lambda: remuxed(clip("mp4", "libx264", **B_FRAMES), "mp4", as_decoded),
    "H.264, generated times": lambda: remuxed(clip("mp4", "libx264", **B_FRAMES), "matroska", a_frame_later),
    "H.264 from AVI": lambda: remuxed(clip("avi", "libx264", **B_FRAMES), "mp4"),
    "H.264 in AVI": lambda: clip("avi", "libx264", **B_FRAMES),
    "H.264 in AVI, no B-frames": lambda: clip("avi", "libx264", g="10", bf="0"),
    "H.264, B-pyramid, CAVLC": lambda: x264("b-pyramid=normal:ref=4:b-adapt=0:cabac=0", bf="5"),
    "H.264, interlaced": lambda: clip("mp4", "libx264", flags="+ildct+ilme", **B_FRAMES),
    "H.264, scaling lists": lambda: x264("cqm=jvt", profile="high"),
    "H.264, sets in its packets": lambda: x264("repeat-headers=1"),
    "H.264, other sets on the way": with_other_sets,
    "H.264, intra-refresh": lambda: x264("intra-refresh=1", bf="0"),
    "H.264, intra-refresh, B-frames": lambda: x264("intra-refresh=1", bf="2"),
    "H.264, open groups": lambda: x264("open-gop=1:b-adapt=0", bf="3"),
    "H.264, open groups, cut": lambda: remuxed(x264("open-gop=1:b-adapt=0", bf="3"), "mp4", first=9),
    "H.264, between keyframes": lambda: remuxed(x264("", bf="2"), "matroska", first=4),
    "HEVC": x265,
    "HEVC, times as decoded": lambda: remuxed(x265(), "matroska", as_decoded),
    "HEVC, open groups, cut": lambda: remuxed(x265("open-gop=1"), "mp4", first=9),
    "HEVC, between keyframes": lambda: remuxed(x265(), "mp4", first=4),
    "HEVC, closed groups that begin early": lambda: x265("open-gop=0:radl=2"),
    "HEVC, temporal layers": lambda: x265("temporal-layers=3"),
    "MPEG-4": lambda: clip("mp4", "mpeg4", **B_FRAMES),
    "MPEG-4 in AVI": lambda: clip("avi", "mpeg4", **B_FRAMES),
    "MPEG-4, times as decoded": lambda: remuxed(clip("avi", "mpeg4", **B_FRAMES), "mp4", as_decoded),
    "MPEG-4, packed": lambda: packed(clip("avi", "mpeg4", g="100", bf="1")),
    "MPEG-4, between keyframes": lambda: remuxed(clip("avi", "mpeg4", g="10"), "mp4", first=4),
    "MPEG-2": lambda: clip("mp4", "mpeg2video", **B_FRAMES),
    "AV1": lambda: clip("mp4", "libsvtav1", g="10", preset="10"),
    "AV1 in Matroska": lambda: clip("matroska", "libsvtav1", g="10", preset="10"),
    "VP8, hidden frames": lambda: hidden(clip("webm", "libvpx", g="20")),
    "VP8, between keyframes": lambda: remuxed(clip("webm", "libvpx", g="10"), "webm", first=4),
    "VP9, superframes": lambda: clip("webm", "libvpx-vp9", g="30", **{"lag-in-frames": "16", "cpu-used": "4"}),
    "VP9, 4:4:4": lambda: clip("webm", "libvpx-vp9", "yuv444p", **VP9),
    "VP9, between keyframes": lambda: remuxed(clip("webm", "libvpx-vp9", **VP9), "webm", first=4),
    "ProRes": lambda: clip("mov", "prores_ks", "yuv422p10le"),
    "DV": lambda: encode_clip(noise(3, 576, 720), "mov", "dvvideo"),
    "PNG": lambda: clip("mov", "png", "rgb24"),
    "QuickTime RLE": lambda: clip("mov", "qtrle", "rgb24"),
    "HuffYUV": lambda: clip("avi", "huffyuv", "yuv422p"),
    "Motion JPEG": lambda: clip("mov", "mjpeg", "yuvj420p"),
    "fragmented": lambda: clip("mp4", "libx264", muxer={"movflags": "frag_keyframe+empty_moov"}, **B_FRAMES),
    "fragmented, with a header's samples": lambda: clip("mp4", "libx264", muxer={"movflags": "frag_keyframe"}),
    "fragmented, DASH": lambda: clip("mp4", "libx264", muxer={"movflags": "dash"}, **B_FRAMES),
    "fragmented, each frame": lambda: clip("mp4", "libx264", muxer={"movflags": "frag_every_frame+default_base_moof"}),
}
CACHED = {name: cache(make) for name, make in KINDS.items()}


def fully_decoded(data: bytes) -> list[np.ndarray]:
    """What a player shows: whatever comes out, from the beginning; it does not mind what is lost before a keyframe."""
    shown, seen = [], False
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        for packet in container.demux(stream):
            seen = seen or packet.is_keyframe
            try:
                shown += [frame.to_ndarray() for frame in packet.decode()]
            except av.error.InvalidDataError:
                assert not seen
    return shown


@pytest.mark.parametrize("kind", KINDS)
def test_frames_from_any_start_equal_a_full_decode(kind: str) -> None:
    data = CACHED[kind]()
    shown = fully_decoded(data)
    assert len(shown) >= 3 and probe(data, LIMITS).frames == len(shown)
    near, far = ((start, 3) for start in range(len(shown))), ((start, 11) for start in range(0, len(shown), 4))
    for start, step in [*near, *far]:
        wanted = np.unique(np.minimum(start + step * np.arange(4), len(shown) - 1))
        with opened(data, LIMITS) as video:
            got = {number: frame.to_ndarray() for number, frame in video.pick(wanted)}
        assert list(got) == wanted.tolist()
        assert all(np.array_equal(shown[number], frame) for number, frame in got.items()), (start, step)


@pytest.mark.parametrize("kind", ["MPEG-4, packed", "fragmented", "ProRes", "VP8, hidden frames", "HuffYUV"])
def test_transcoding_keeps_every_frame_of_every_kind(kind: str) -> None:
    data = CACHED[kind]()
    total = len(fully_decoded(data))
    packed, facts = transcode(data, Profile(), LIMITS)
    assert facts["original"]["frames"] == total and decode_clip(packed, np.arange).shape[0] == facts["frames"]


def test_stream_copied_from_avi_shows_the_requested_frames() -> None:
    for container in ("mp4", "matroska"):
        copy = remuxed(encode_clip(shades(40), "avi", "libx264", **B_FRAMES), container, as_decoded)
        assert numbers_of(decode_clip(copy, lambda total: np.array([0, 3, 6, 9]))) == [0, 3, 6, 9]
        packed, _ = transcode(copy, Profile(crf=1), LIMITS)
        assert numbers_of(decode_clip(packed, np.arange)) == list(range(40))


FROM_THE_MIDDLE = ["HEVC", "MPEG-4", "MPEG-4 in AVI", "AV1", "H.264, open groups", "VP9, 4:4:4", "fragmented", "ProRes"]


@pytest.mark.parametrize("kind", FROM_THE_MIDDLE)
def test_decoding_seeks_to_a_keyframe_where_that_is_safe(kind: str) -> None:
    with opened(CACHED[kind](), LIMITS) as video:
        video.frames(np.array([25]))
        assert video.decoded <= 15


@pytest.mark.parametrize("kind", FROM_THE_MIDDLE)
def test_decoding_passes_over_what_lies_between_the_frames_wanted(kind: str) -> None:
    with opened(CACHED[kind](), LIMITS) as video:
        video.frames(np.array([2, 25]))
        assert video.decoded <= (2 if kind == "ProRes" else 20)


CPU_ONLY = ["H.264, times as decoded", "H.264, intra-refresh", "H.264, other sets on the way", "HEVC, open groups, cut"]
CPU_ONLY += ["VP8, hidden frames", "MPEG-4, packed", "fragmented", "ProRes"]


@pytest.mark.parametrize("kind", CPU_ONLY)
def test_videos_with_unsafe_timestamps_are_not_for_a_gpu(kind: str) -> None:
    assert not fits_gpu(at_any_size(probe(CACHED[kind](), LIMITS)))


def test_drawing_a_clip_leaves_this_process_scheduled_as_it_was():
    before = os.sched_getscheduler(0)
    clip("mp4", "libsvtav1", g="10", preset="10")
    assert os.sched_getscheduler(0) == before


@pytest.mark.parametrize(("kind", "codec"), [("AV1", "av1"), ("HEVC", "hevc"), ("ProRes", "prores"), ("VP9", "vp9")])
def test_codecs_are_named_not_their_libraries(kind: str, codec: str) -> None:
    """Not those of the libraries that decode them: AV1 is not "libdav1d"."""
    info = probe(next(make() for name, make in CACHED.items() if name.startswith(kind)), LIMITS)
    assert info.codec == codec


def test_gpu_decoder_may_take_av1() -> None:
    assert fits_gpu(at_any_size(probe(CACHED["AV1"](), LIMITS)))


DROPPED = [*range(10), *range(30, 55)]  # 1/25 s


@pytest.mark.parametrize(
    ("container", "codec", "options"),
    [("avi", "mpeg4", {}), ("avi", "mjpeg", {"pixel_format": "yuvj420p"}), ("matroska", "libx264", {"bf": "2"})],
)
def test_duration_is_that_of_the_container(container: str, codec: str, options: dict) -> None:
    """Frames that were dropped take time, and so does each of a variable rate; an AVI has empty chunks for them."""
    data = encode_clip(shades(len(DROPPED)), container, codec, times=DROPPED, **options)
    with av.open(io.BytesIO(data)) as opened_container:
        seconds = opened_container.duration / av.time_base
    assert seconds == pytest.approx(2.2, abs=0.01)
    assert probe(data, LIMITS).duration == pytest.approx(seconds, abs=0.002)
    packed, facts = transcode(data, Profile(fps=5, crf=1), LIMITS)
    assert facts["frames"] == 11 and facts["duration"] == pytest.approx(seconds, abs=0.01)
    nearest = [min(range(len(DROPPED)), key=lambda i: abs(DROPPED[i] - 5 * tick)) for tick in range(11)]
    assert numbers_of(decode_clip(packed, np.arange)) == nearest


CUT = ["H.264, open groups, cut", "HEVC, open groups, cut", "VP8, between keyframes"]


@pytest.mark.parametrize("kind", CUT)
def test_duration_begins_with_the_first_shown_frame(kind: str) -> None:
    info = probe(CACHED[kind](), LIMITS)
    assert info.frames <= 20 and info.duration == pytest.approx(info.frames / 25, abs=0.01)


@pytest.mark.parametrize(
    ("container", "codec", "sound"), [("matroska", "libx264", "libopus"), ("mp4", "libx264", "aac")]
)
def test_duration_ignores_a_longer_audio_track(container: str, codec: str, sound: str) -> None:
    """It lasts 0.8 s, the frames 0.4."""
    assert probe(with_sound(moving()[:10], container, codec, sound), LIMITS).duration == pytest.approx(0.4, abs=0.01)
