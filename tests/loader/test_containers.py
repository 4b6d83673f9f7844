"""Container checks before decoding: valid MP4, WebM and AVI pass, contradictory or truncated ones do not."""

from __future__ import annotations

import io
import struct
import tracemalloc
from collections.abc import Callable
from fractions import Fraction
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
from nvidia.dali import fn
from PIL import Image

from bevt_ds.data.decoding.images import check_image, decode_image
from bevt_ds.data.decoding.matroska import CLUSTER, SIMPLE_BLOCK, _elements
from bevt_ds.data.decoding.verify import verify_video
from bevt_ds.data.decoding.video import check_container, full_decode, probe
from bevt_ds.data.limits import BadSample, Limits
from bevt_ds.shards.check import outlook
from bevt_ds.shards.synthetic.draw_worker import encode_jpeg
from tests.loader.media import by_dali, decode_clip

LIMITS = Limits()
WIDTH, HEIGHT, FRAMES = 64, 48, 20


@pytest.fixture(scope="module")
def videos(make: SimpleNamespace) -> dict[str, bytes]:
    frames = make.noise(FRAMES, HEIGHT, WIDTH, softness=5.0)
    vp9 = {"deadline": "realtime", "cpu-used": "8"}
    return {
        "mp4": make.clip(frames, "mp4", "libx264", g="8", bf="2"),
        "mov": make.clip(frames, "mov", "mpeg4"),
        "faststart": make.clip(frames, "mp4", "libx264", muxer={"movflags": "faststart", "use_editlist": "0"}),
        "webm": make.clip(frames, "webm", "libvpx-vp9", g="10", **vp9),
        "live": make.clip(frames, "webm", "libvpx-vp9", muxer={"live": "1", "cluster_time_limit": "200"}, **vp9),
        "mkv": make.clip(frames, "matroska", "libx264"),
        "avi": make.clip(frames, "avi", "mpeg4"),
        "sound": with_sound(frames, "mp4", "libx264", "aac"),
        "webm sound": with_sound(frames, "webm", "libvpx-vp9", "libopus", **vp9),
        "avi sound": with_sound(frames, "avi", "mpeg4", "pcm_s16le"),
    }


def with_sound(
    frames: np.ndarray, container: str, codec: str, sound: str, muxer: dict[str, str] | None = None, **options: str
) -> bytes:
    """The sound is the first stream: the images must be looked for."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container, options=muxer or {}) as out:
        audio = out.add_stream(sound, rate=48000, layout="mono")
        stream = out.add_stream(codec, rate=Fraction(25))
        stream.height, stream.width, stream.pix_fmt, stream.options = HEIGHT, WIDTH, "yuv420p", options
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 38400), np.int16), "s16", "mono")
        samples.rate = 48000
        for packet in audio.encode(av.AudioResampler("fltp" if sound == "aac" else "s16").resample(samples)[0]):
            out.mux(packet)
        for frame in frames:
            out.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        out.mux(stream.encode(None))
        out.mux(audio.encode(None))
    return buffer.getvalue()


NAMES = ["mp4", "faststart", "mov", "webm", "live", "mkv", "avi", "sound", "webm sound", "avi sound"]
UNCOUNTED = ["mp4", "mov", "sound", "avi", "avi sound"]  # an edit list may hide some; an AVI's header is not asked


@pytest.mark.parametrize("name", NAMES)
def test_valid_containers_pass(videos: dict[str, bytes], name: str) -> None:
    claims = check_container(videos[name], LIMITS)
    assert (claims.width, claims.height) == (WIDTH, HEIGHT)
    assert claims.frames == (None if name in UNCOUNTED else FRAMES)
    assert sum(1 for _ in full_decode(videos[name], LIMITS)) == FRAMES


def u32(*values: int) -> bytes:
    return struct.pack(f">{len(values)}I", *values)


def box(name: bytes, content: bytes = b"") -> bytes:
    return struct.pack(">I4s", 8 + len(content), name) + content


# what cameras, downloaders and editors leave behind a file
BEHIND = {
    "mfra": box(b"mfra"),
    "ID32": box(b"ID32", b"x" * 20),
    "private": box(b"abcd", b"x" * 20) + box(b"efgh"),
    "bytes": b"xyz",
    "text": b"GPRO" * 10,
    "a few zeros": bytes(4),
    "zeros": bytes(1000),
    "half a box": u32(100) + b"free",
}


@pytest.mark.parametrize("what", BEHIND)
def test_unknown_boxes_and_elements_are_ignored(videos: dict[str, bytes], what: str) -> None:
    """ISO/IEC 14496-12 says so of boxes that are not known; the frames are the same."""
    for name in ("mp4", "faststart", "mov"):
        longer = videos[name] + BEHIND[what]
        assert check_container(longer, LIMITS) == check_container(videos[name], LIMITS)
        np.testing.assert_array_equal(decode_clip(longer, np.arange), decode_clip(videos[name], np.arange))
        if len(BEHIND[what]) >= 8:
            moov = longer.index(b"moov")
            with pytest.raises(BadSample):  # the video's own bytes are still looked for
                check_container(videos[name][: moov + 200] + BEHIND[what], LIMITS)


def test_unknown_box_after_ftyp_is_ignored(videos: dict[str, bytes]) -> None:
    """Between `ftyp` and the rest, the offsets moved by as much."""
    data, start = videos["mp4"], struct.unpack(">I", videos["mp4"][:4])[0]
    table = data.index(b"stco") + 4
    moved = np.frombuffer(data, ">u4", *struct.unpack_from(">I", data, table + 4), table + 8) + 16
    data = data[: table + 8] + moved.astype(">u4").tobytes() + data[table + 8 + 4 * len(moved) :]
    assert decode_clip(data[:start] + box(b"prft", bytes(8)) + data[start:], np.arange).shape[0] == FRAMES


@pytest.mark.parametrize("encoding", ["JPEG", "PNG"])
def test_bytes_after_the_end_of_an_image_are_ignored(make: SimpleNamespace, encoding: str) -> None:
    buffer = io.BytesIO()
    Image.fromarray(make.noise(30, 40)).save(buffer, encoding)
    data = buffer.getvalue()
    whole, *longer = [data, *(data + tail for tail in (b"\n" * 40, bytes(1000), b"SEFT" * 99))]
    for each in longer:
        assert decode_image(each, LIMITS) == {"width": 40, "height": 30, "rotation": 0, "mirrored": False}
    images = by_dali(fn.decoders.image, [whole, *longer])
    for other in images[1:]:
        np.testing.assert_array_equal(other, images[0])
    for cut in (data[:-20], data[:-20] + bytes(1000)):
        with pytest.raises(BadSample, match="cut"):
            check_image(cut, LIMITS)


def test_dali_ignores_unknown_boxes_and_elements(make: SimpleNamespace) -> None:
    """VP9 is what it decodes on a CPU."""
    frames = make.noise(6, HEIGHT, WIDTH, softness=5.0)
    data = make.clip(frames, "mp4", "libvpx-vp9", deadline="realtime")
    clips = by_dali(fn.decoders.video, [data, *(data + behind for behind in BEHIND.values())])
    assert len(clips[0]) == len(frames)
    for other in clips[1:]:
        np.testing.assert_array_equal(other, clips[0])


def test_containers_of_real_clips_pass(media_folder: Path) -> None:
    for path in media_folder.iterdir():
        if path.suffix in (".mp4", ".avi"):
            assert probe(path.read_bytes(), LIMITS).frames > 0


@pytest.mark.parametrize("name", [name for name in NAMES if name != "live"])
def test_truncation_at_any_byte_is_found_d15(videos: dict[str, bytes], name: str) -> None:
    """D15: at every byte, box and element boundaries among them, by the container alone."""
    data = videos[name]
    for length in range(len(data)):
        with pytest.raises(BadSample):
            check_container(data[:length], LIMITS)


def test_live_webm_cut_between_clusters_keeps_its_frames_d15(videos: dict[str, bytes]) -> None:
    """D15: such a file states no sizes, so that a cut between clusters shows nowhere; what is left is as it was."""
    data = videos["live"]
    whole = decode_clip(data, np.arange)
    left = []
    for length in range(len(data)):
        try:
            claims = check_container(data[:length], LIMITS)
        except BadSample:
            continue
        left.append(claims.frames)
        np.testing.assert_array_equal(decode_clip(data[:length], np.arange), whole[: claims.frames])
    assert left == [6, 12, 18]


def put(data: bytes, box: bytes, offset: int, value: bytes, nth: int = 0) -> bytes:
    """`data` with `value` at `offset` behind the nth occurrence of a box's name (`avc1` is first named in `ftyp`)."""
    at = -1
    for _ in range(nth + 1):
        at = data.index(box, at + 1)
    at += 4 + offset
    return data[:at] + value + data[at + len(value) :]


def mdat(data: bytes) -> int:
    """Where an MP4's frames begin."""
    return data.index(b"mdat") + 4


def with_table(data: bytes, old: bytes, new: bytes, content: bytes) -> bytes:
    """A table of an MP4's first track in the place of another. The frames must lie before it: they do not move."""
    at = data.index(old)
    (size,) = struct.unpack_from(">I", data, at - 4)
    table = box(new, content)
    data = data[: at - 4] + table + data[at - 4 + size :]
    for parent in (b"moov", b"trak", b"mdia", b"minf", b"stbl"):
        (whole,) = struct.unpack_from(">I", data, data.index(parent) - 4)
        data = put(data, parent, -8, u32(whole + len(table) - size))
    return data


def with_co64(data: bytes) -> bytes:
    """An MP4 of one chunk, whose offset takes 64 bits."""
    return with_table(data, b"stco", b"co64", u32(0, 1, 0, mdat(data)))


def with_runs(data: bytes, *runs: tuple[int, int, int]) -> bytes:
    """An MP4 whose chunks have so many frames: (first chunk, frames, description)."""
    return with_table(data, b"stsc", b"stsc", u32(0, len(runs), *chain(*runs)))


def with_empty_chunk(data: bytes) -> bytes:
    """An MP4 with a second chunk, at the first one's place, of no frame."""
    return with_runs(with_table(data, b"stco", b"stco", u32(0, 2, mdat(data), mdat(data))), (1, FRAMES, 1), (2, 0, 1))


TRACKS = b"\x16\x54\xae\x6b"  # named in the list of what is where, and then there
LIES: dict[str, tuple[str, Callable[[bytes], bytes], str]] = {
    "D14 width": ("mp4", lambda d: put(d, b"avc1", 24, struct.pack(">H", 640), nth=1), "640x48.*its stream 64x48"),
    "D14 no width": ("mp4", lambda d: put(d, b"avc1", 24, bytes(2), nth=1), "0x48 pixels"),
    "D14 two descriptions": ("mp4", lambda d: put(d, b"stsd", 4, u32(2)), "several sample descriptions"),
    "D14 chunk offset": ("mp4", lambda d: put(d, b"stco", 8, u32(1 << 30)), "points at byte"),
    "D14 chunk count": ("mp4", lambda d: put(d, b"stco", 4, u32(1 << 30)), "more than it holds"),
    "D14 sample size": ("mp4", lambda d: put(d, b"stsz", 12, u32(1 << 24)), "points at byte"),
    "D14 frame count": ("mp4", lambda d: put(d, b"stsz", 8, u32(FRAMES - 1)), "disagree about the number of frames"),
    "D14 samples a chunk": ("mp4", lambda d: put(d, b"stsc", 12, u32(7)), "disagree|damaged"),
    "D14 times": ("mp4", lambda d: put(d, b"stts", 8, u32(3)), "does not cover its frames"),
    "D14 keyframes": ("mp4", lambda d: put(d, b"stss", 8, u32(999)), "keyframes points outside"),
    "D14 box size": ("mp4", lambda d: put(d, b"minf", -8, u32(1 << 20)), "says 1048576 bytes"),
    "D14 box size below 8": ("mp4", lambda d: put(d, b"minf", -8, u32(4)), "says 4 bytes"),
    "D14 short box": ("mp4", lambda d: put(d, b"stco", -8, u32(8)), "box 'stco' is too short"),
    "D14 stray bytes": ("mp4", lambda d: put(d, b"stco", -8, u32(17)), "stray bytes"),
    "D14 tiny boxes": ("mp4", lambda d: d + (u32(8) + b"free") * 10_000, "more than 10000 boxes"),
    "D14 second entry": ("mp4", lambda d: put(d, b"avc1", -8, u32(86), nth=1), "sample description is damaged"),
    "D14 no offsets": ("mp4", lambda d: put(d, b"stco", -4, b"free"), "0 tables of chunk offsets"),
    "D14 chunk one byte late": ("faststart", lambda d: put(d, b"stco", 8, u32(mdat(d) + 1)), "points at byte"),
    "D14 offset beyond 2^62": ("mp4", lambda d: put(with_co64(d), b"co64", 8, b"\xff" * 8), "points outside the file"),
    "D14 offset beyond 2^32": ("mp4", lambda d: put(with_co64(d), b"co64", 11, b"\x01"), "points at byte"),
    "D14 no runs": ("mp4", lambda d: put(d, b"stsc", 4, u32(0)), "table 'stsc' is damaged"),
    "D14 first chunk": ("mp4", lambda d: put(d, b"stsc", 8, u32(2)), "table 'stsc' is damaged"),
    "D14 second description": ("mp4", lambda d: put(d, b"stsc", 16, u32(2)), "table 'stsc' is damaged"),
    "D14 runs backwards": ("mp4", lambda d: with_runs(d, (1, FRAMES, 1), (1, FRAMES, 1)), "table 'stsc' is damaged"),
    "D14 run behind the chunks": ("mp4", lambda d: with_runs(d, (1, FRAMES, 1), (9, 1, 1)), "the number of chunks"),
    "D14 chunk of none": ("mp4", lambda d: with_empty_chunk(d), "the number of frames"),
    "D14 shifts": ("mp4", lambda d: put(d, b"ctts", 8, u32(3)), "'ctts' does not cover its frames"),
    "D14 keyframe 0": ("mp4", lambda d: put(d, b"stss", 8, u32(0)), "keyframes points outside"),
    "D14 codec": ("mp4", lambda d: d.replace(b"avc1\0\0\0\0\0\0", b"xyz1\0\0\0\0\0\0"), "codec 'xyz1'"),
    "D14 two moov": ("mp4", lambda d: d + d[d.index(b"moov") - 4 :], "2 boxes 'moov'"),
    "D17 frames": ("mp4", lambda d: put(d, b"stsz", 4, u32(1, 1_000_000)), "over data.max_frames"),
    "D17 size": ("mp4", lambda d: put(d, b"avc1", 24, struct.pack(">HH", 60000, 60000), nth=1), "over data.max_pixels"),
    "D14 webm width": ("webm", lambda d: d.replace(b"\xb0\x81\x40", b"\xb0\x81\x50", 1), "80x48.*its stream 64x48"),
    "D14 webm codec": ("webm", lambda d: d.replace(b"V_VP9", b"V_XYZ"), "FFmpeg does not know its codec"),
    "D14 webm empty frame": ("live", lambda d: d + b"\xa3\x84\x81\0\0\0", f"{FRAMES + 1} frames, {FRAMES} are found"),
    "D14 webm lacing": ("webm", lambda d: d.replace(b"\x81\0\0\x80", b"\x81\0\0\x82"), "laced"),
    "D14 webm open size": ("webm", lambda d: put(d, TRACKS, 0, b"\xff", nth=1), "has no size"),
    "D15 webm block": ("live", lambda d: d + b"\xa3\x81\x81", "cut inside a block's header"),
    "D15 webm size": ("webm", lambda d: d.replace(b"\xae\x01", b"\xae\x08", 1), "cut|damaged|impossible"),
    "D18 sound only": ("sound", lambda d: d.replace(b"vide", b"soun"), "no video stream"),
    "fragmented": ("mp4", lambda d: d + u32(8) + b"moof", "fragmented"),
    "fragments, cut": ("mp4", lambda d: d + u32(99) + b"moof", "fragmented"),
    "second track": ("mp4", lambda d: d + d[d.index(b"trak") - 4 :], "box 'trak' outside 'moov'"),
    "second track, cut": ("mp4", lambda d: d + d[d.index(b"trak") - 4 : -20], "box 'trak' outside 'moov'"),
    "second moov, cut": ("mp4", lambda d: d + d[d.index(b"moov") - 4 : -20], "2 boxes 'moov'"),
    "stray bytes before the tables": ("mp4", lambda d: d[: d.index(b"moov") - 4] + b"abc", "stray bytes"),
    "text": ("mp4", lambda d: b"not a video" * 20, "neither MP4"),
    "empty": ("mp4", lambda d: b"", "empty"),
    "avi size": ("avi", lambda d: d[:4] + struct.pack("<I", len(d) + 10) + d[8:], "cut"),
    "avi chunk": ("avi", lambda d: d[:16] + struct.pack("<I", 1 << 30) + d[20:], "damaged"),
}


@pytest.mark.parametrize("lie", LIES)
def test_containers_that_contradict_themselves_are_refused(videos: dict[str, bytes], lie: str) -> None:
    name, change, reason = LIES[lie]
    changed = change(videos[name])
    assert changed != videos[name]
    with pytest.raises(BadSample, match=reason):
        probe(changed, LIMITS)


def in_groups(data: bytes) -> bytes:
    """A live WebM with each block in a group of its own, as other muxers write them, and no size of any cluster."""
    pieces, end = [], 0
    for element, start, stop in _elements(data):
        if element == CLUSTER:
            at = data.rindex(CLUSTER.to_bytes(4, "big"), end, start) + 4
            pieces += [data[end:at], b"\xff"]
            end = start
        elif element == SIMPLE_BLOCK:
            at = data.rindex(b"\xa3", end, start)
            block = b"\xa1" + data[at + 1 : stop]
            pieces += [data[end:at], b"\xa0" + (0x4000 | len(block)).to_bytes(2, "big"), block]
            end = stop
    return b"".join([*pieces, data[end:]])


def with_long_mdat(data: bytes) -> bytes:
    """An MP4 whose frames' box states its size in 64 bits, where the muxer has left room for it."""
    at = data.index(b"free\0\0") - 4
    (size,) = struct.unpack_from(">I", data, at + 8)
    return data[:at] + u32(1) + b"mdat" + struct.pack(">Q", size + 8) + data[at + 16 :]


FORMS: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "64-bit size": ("mp4", with_long_mdat),
    "64-bit offset": ("mp4", with_co64),
    "size up to the end": ("faststart", lambda d: put(d, b"mdat", -8, u32(0))),
    "first keyframe not marked": ("mov", lambda d: put(d, b"stss", 8, u32(2))),
    "text that is none": ("mp4", lambda d: d.replace(b"Lavf", b"\xff\xfe\xfd\xfc")),
    "block groups": ("live", in_groups),
    "top to bottom": ("avi", lambda d: put(d, b"strf", 12, struct.pack("<i", -HEIGHT))),
}


@pytest.mark.parametrize("form", FORMS)
def test_rare_but_valid_layouts_pass(videos: dict[str, bytes], form: str) -> None:
    """What another muxer may write: the same frames."""
    name, change = FORMS[form]
    changed = change(videos[name])
    assert changed != videos[name]
    np.testing.assert_array_equal(decode_clip(changed, np.arange), decode_clip(videos[name], np.arange))


def test_file_of_many_tiny_elements_is_refused_d17(videos: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    """D17: it may not take for ever."""
    monkeypatch.setattr("bevt_ds.data.decoding.matroska._MAX_ELEMENTS", 20)
    with pytest.raises(BadSample, match="more than 20 elements"):
        check_container(videos["live"], LIMITS)


def test_change_of_frame_size_within_a_video_is_refused_d14(videos: dict[str, bytes], make: SimpleNamespace) -> None:
    """D14: the header's size holds for the first frames only."""
    larger = make.clip(
        make.noise(6, 2 * HEIGHT, 2 * WIDTH), "webm", "libvpx-vp9", deadline="realtime", muxer={"live": "1"}
    )
    joined = videos["live"] + larger[larger.index(b"\x1f\x43\xb6\x75") :]
    with pytest.raises(BadSample, match="a frame is 128x96, its header says 64x48"):
        decode_clip(joined, np.arange)


def not_shown(data: bytes) -> bytes:
    """A WebM whose first frame, a keyframe of VP9, is only for others to refer to: a packet without an image."""
    at = data.index(b"\x81\0\0\x80") + 4
    return data[:at] + bytes([data[at] & ~2]) + data[at + 1 :]


def test_packets_without_a_frame_are_not_numbered_d15(videos: dict[str, bytes], make: SimpleNamespace) -> None:
    """D15: the first frame is the first that is shown."""
    data = not_shown(videos["webm"])
    shown = decode_clip(data, np.arange)
    np.testing.assert_array_equal(shown, decode_clip(videos["webm"], np.arange)[1:])
    assert verify_video(data, LIMITS).frames == FRAMES - 1
    with pytest.raises(BadSample, match="none of its frames can be decoded"):
        probe(not_shown(make.clip(make.noise(1, HEIGHT, WIDTH), "webm", "libvpx-vp9")), LIMITS)


def test_payload_that_ffmpeg_refuses_is_a_bad_sample_d16(videos: dict[str, bytes]) -> None:
    """D16: a whole container around zeros."""
    data = videos["mp4"]
    zeros = data[: mdat(data)] + bytes(data.index(b"moov") - 4 - mdat(data)) + data[data.index(b"moov") - 4 :]
    check_container(zeros, LIMITS)
    with pytest.raises(BadSample, match="FFmpeg cannot decode it: Invalid data"):
        probe(zeros, LIMITS)


@pytest.mark.parametrize("name", ["mp4", "webm", "avi"])
def test_limits_of_bytes_frames_and_pixels_hold_d17(videos: dict[str, bytes], name: str) -> None:
    """D17: the file, its frames, an image, and a clip's decoded bytes."""
    clip = 3 * 4 * HEIGHT * WIDTH
    for limits, reason in [
        (Limits(file_bytes=100), "over data.max_file_bytes=100"),
        (Limits(frames=FRAMES - 1), f"it has {FRAMES} frames, over data.max_frames"),
        (Limits(pixels=100), "64x48 pixels, over data.max_pixels=100"),
        (Limits(clip_bytes=clip - 1), f"would take {clip} bytes, over data.max_clip_bytes"),
    ]:
        with pytest.raises(BadSample, match=reason):
            decode_clip(videos[name], lambda total: np.arange(4), limits)
    with pytest.raises(BadSample, match="over data.max_pixels=100"):
        check_container(videos[name], Limits(pixels=100))
    assert len(decode_clip(videos[name], lambda total: np.arange(4), Limits(clip_bytes=clip))) == 4
    with pytest.raises(BadSample, match="over data.max_file_bytes=100"):
        check_image(b"\xff\xd8\xff" + bytes(200), Limits(file_bytes=100))


def test_decompression_bombs_are_refused_by_their_header_d13_d17(videos, make) -> None:
    """D13, D17: without memory for what they would be."""
    video = put(videos["mp4"], b"avc1", 24, struct.pack(">HH", 60000, 60000), nth=1)
    frames = put(videos["mp4"], b"stsz", 4, u32(1, 1 << 24))
    png = b"\x89PNG\r\n\x1a\n" + u32(13) + b"IHDR" + u32(30000, 30000) + bytes(17) + b"IEND" + bytes(4)
    jpeg = encode_jpeg(make.noise(8, 8))
    size = jpeg.index(b"\xff\xc0") + 5
    giant = jpeg[:size] + struct.pack(">HH", 30000, 30000) + jpeg[size + 4 :]
    scans = jpeg[:-2] + b"\xff\xda\x00\x02" * 65_000 + jpeg[-2:]
    cases = [
        (check_container, video),
        (check_container, frames),
        (check_image, png),
        (check_image, giant),
        (check_image, scans),
    ]
    tracemalloc.start()
    for check, data in cases:
        with pytest.raises(BadSample, match="over data.max_(pixels|frames)|65001 scans"):
            check(data, LIMITS)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


@pytest.mark.parametrize("pixel_format", ["yuv422p", "yuv444p", "yuv420p10le"])
def test_pixel_formats_10_bit_422_444_are_decoded_d18(make: SimpleNamespace, pixel_format: str) -> None:
    """D18: the CPU path takes them; `bevt shards check` notes that a GPU would not."""
    frames = make.noise(4, HEIGHT, WIDTH, softness=5.0)
    data = make.clip(frames, "mp4", "libx264", pixel_format=pixel_format)
    pixels = decode_clip(data, lambda total: np.arange(total), LIMITS)
    assert pixels.shape == frames.shape
    assert np.abs(pixels.astype(int) - frames).mean() < 12
    facts = vars(probe(data, LIMITS))
    assert "not for GPU decoding" in outlook([facts])[0]


@pytest.mark.parametrize(("height", "width", "frames"), [(50, 34, 1), (66, 98, 3)])
def test_single_frame_and_odd_sizes_are_decoded_d18(make, height: int, width: int, frames: int) -> None:
    """D18: a single frame, sides that are no multiple of 16."""
    data = make.clip(make.noise(frames, height, width), "mp4", "libx264")
    assert decode_clip(data, lambda total: np.zeros(5, int), LIMITS).shape == (5, height, width, 3)
