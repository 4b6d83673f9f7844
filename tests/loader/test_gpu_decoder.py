"""Decoding on a GPU by sessions that are kept, with a stand-in that decodes the same packets on the CPU."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bevt_ds.data.decoding import gpu_decoder
from bevt_ds.data.decoding.gpu_decoder import GpuDecoder
from bevt_ds.data.decoding.nvdec import NvdecSession
from bevt_ds.data.decoding.pool import DecodePool
from bevt_ds.data.decoding.rgb import rgb_of_nv12
from bevt_ds.data.decoding.sessions import GpuRefusal, StreamKind
from bevt_ds.data.limits import BadSample, Limits
from tests.loader.fake_gpu import FakeGpu, refusing
from tests.loader.media import pooled_clips, remuxed

STARTS = [(0.0, 0.0), (0.4, 0.5), (0.999, 0.9)]
HEVC = {"x265-params": "log-level=none:keyint=8"}


@pytest.fixture(scope="module")
def pool() -> Iterator[DecodePool]:
    pool = DecodePool(2, 60.0, Limits())
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def videos(make: SimpleNamespace) -> dict[str, bytes]:
    """What NVDEC takes: B-frames, keyframes, an open group, HEVC, full range, Matroska; one is shorter than a clip."""
    frames = make.noise(40, 144, 160, softness=8.0)
    plain = make.clip(frames, "mp4", "libx264", g="12", bf="3")
    return {
        "h264": plain,
        "mkv": remuxed(plain, "matroska"),
        "open group": make.clip(frames, "mp4", "libx264", **{"x264-params": "open-gop=1:keyint=8:bframes=3"}),
        "no B-frames": make.clip(frames, "mp4", "libx264", g="16", bf="0"),
        "full range": make.clip(frames, "mp4", "libx264", pixel_format="yuvj420p"),
        "hevc": make.clip(frames, "mp4", "libx265", **HEVC),
        "short": make.clip(frames[:5], "mp4", "libx264"),
    }


@pytest.mark.parametrize("stride", [1, 3])
def test_gpu_frames_are_the_workers_by_number_and_bit_for_bit(pool, videos, stride: int) -> None:
    gpu, stretches = FakeGpu(), 0
    decoder = GpuDecoder(pool, gpu, sessions=2)
    for name, data in videos.items():
        clips, reply = decoder.clips(data, STARTS, 8, stride)
        expected = pooled_clips(pool, data, STARTS, 8, stride)
        np.testing.assert_array_equal(torch.stack(clips).numpy(), expected, err_msg=name)
        assert reply["total"] == (5 if name == "short" else 40)
        stretches += len(reply["lengths"])
    assert gpu.stretches == stretches and gpu.closed == 0
    assert gpu.opened == [StreamKind("h264", 160, 144), StreamKind("hevc", 160, 144)]


def test_gpu_gets_only_the_packets_that_a_clip_needs(pool: DecodePool, videos: dict[str, bytes]) -> None:
    asked = {"work": "packets", "choice": "clip", "frames": 2, "stride": 9}
    reply, payload = pool.ask(videos["h264"], {**asked, "positions": [(0.999, 0.5)]})
    first, last = reply["wanted"]
    assert reply["numbers"][0] == 12 * (first // 12), "from the keyframe in front of the first one on"
    assert {first, last} <= set(reply["numbers"]) and last - first == 9
    assert len(reply["numbers"]) < 1 + max(reply["numbers"]) - min(reply["numbers"]), "spare frames are left out"
    assert len(payload) == sum(reply["sizes"]) and bytes(payload[:4]) == b"\0\0\0\1"


def test_gpu_gets_no_packets_between_one_wanted_frame_and_the_next_ones_keyframe(
    pool: DecodePool, videos: dict[str, bytes]
) -> None:
    gpu = FakeGpu()
    decoder = GpuDecoder(pool, gpu, sessions=1)
    for name in ("no B-frames", "open group", "hevc", "mkv"):
        packets = gpu.packets
        clips, reply = decoder.clips(videos[name], [(0.9, 0.0)], 2, 30)
        np.testing.assert_array_equal(torch.stack(clips).numpy(), pooled_clips(pool, videos[name], [(0.9, 0.0)], 2, 30))
        first, last = reply["wanted"]
        assert last - first == 30 and len(reply["lengths"]) == 2, name
        assert sum(reply["lengths"]) == gpu.packets - packets == len(reply["numbers"]) < 25, name


def test_videos_that_are_not_for_nvdec_are_refused_without_a_session(pool: DecodePool, make: SimpleNamespace) -> None:
    frames = make.noise(6, 48, 64)
    plain = make.clip(frames, "mp4", "libx264")
    videos = {
        "mpeg4": make.clip(frames, "mp4", "mpeg4"),
        "vp9": make.clip(frames, "webm", "libvpx-vp9", deadline="realtime"),
        "avi": make.clip(frames, "avi", "mpeg4"),
        "4:4:4": make.clip(frames, "mp4", "libx264", pixel_format="yuv444p"),
        "10 bit": make.clip(frames, "mp4", "libx264", pixel_format="yuv420p10le"),
        "fragmented": remuxed(plain, "mp4", muxer={"movflags": "frag_keyframe+empty_moov"}),
        "odd": make.clip(make.noise(6, 47, 63), "mp4", "libx264", pixel_format="yuv444p"),
        "turned": make.clip(frames, "mp4", "libx264", matrix=(0, 65536, 0, -65536, 0, 0, 0, 0, 1 << 30)),
    }
    gpu = FakeGpu()
    decoder = GpuDecoder(pool, gpu, sessions=1)
    for name, data in videos.items():
        with pytest.raises(GpuRefusal) as refusal:
            decoder.clips(data, [(0.0, 0.0)], 2, 1)
        assert not refusal.value.is_fault, name
    assert not gpu.opened


def test_damaged_videos_are_bad_samples_and_not_the_gpus(pool: DecodePool, videos: dict[str, bytes]) -> None:
    gpu, whole = FakeGpu(), videos["h264"]
    decoder = GpuDecoder(pool, gpu, sessions=1)
    for data in (b"", whole[: len(whole) // 2], b"\0" * 1000):
        with pytest.raises(BadSample):
            decoder.clips(data, STARTS, 8, 1)
    assert not gpu.opened


def test_failing_session_is_closed_and_the_next_clip_gets_another(pool: DecodePool, videos: dict[str, bytes]) -> None:
    def once(packets: int) -> None:
        if packets == 3:
            refusing(packets)

    gpu = FakeGpu(once)
    decoder = GpuDecoder(pool, gpu, sessions=1)
    with pytest.raises(GpuRefusal, match="out of sessions") as refusal:
        decoder.clips(videos["h264"], STARTS, 8, 1)
    assert refusal.value.is_fault and (len(gpu.opened), gpu.closed) == (1, 1)
    for _ in range(2):
        decoder.clips(videos["h264"], STARTS, 8, 1)
    assert (len(gpu.opened), gpu.closed) == (2, 1)


def test_codec_whose_frames_are_not_a_workers_is_refused_from_then_on(pool, videos, monkeypatch) -> None:
    monkeypatch.setattr(gpu_decoder, "rgb_of_nv12", lambda frames, full: 255 - rgb_of_nv12(frames, full))
    gpu = FakeGpu()
    decoder = GpuDecoder(pool, gpu, sessions=1)
    with pytest.raises(GpuRefusal, match="its h264 frames are .* levels from a worker's"):
        decoder.clips(videos["h264"], STARTS, 8, 1)
    packets = gpu.packets
    with pytest.raises(GpuRefusal, match="its h264 frames are") as later:
        decoder.clips(videos["mkv"], STARTS, 8, 1)
    assert not later.value.is_fault and gpu.packets == packets > 0


class Library:
    """The names of PyNvVideoCodec that nvdec.py uses."""

    PyNvVCException = type("PyNvVCException", (Exception,), {})
    cudaVideoCodec = SimpleNamespace(H264="H.264", HEVC="H.265")  # noqa: N815 - the library's name
    PacketData = SimpleNamespace

    def __init__(self) -> None:
        self.made: dict = {}
        self.packets: list[tuple[bytes, int]] = []

    def CreateDecoder(self, **how: object) -> SimpleNamespace:  # noqa: N802 - the library's name
        self.made = how
        return SimpleNamespace(Decode=self.decode)

    def decode(self, part: SimpleNamespace) -> list:
        if not vars(part):
            return [Frame(8)]
        data = ctypes.string_at(part.bsl_data, part.bsl)
        if data == b"broken":
            raise self.PyNvVCException("cuvidParseVideoData failed\nin a file")
        self.packets.append((data, part.pts))
        return [Frame(part.pts)]


class Frame:
    def __init__(self, number: int) -> None:
        self._frame, self.getPTS = torch.full((24, 16), number, dtype=torch.uint8), lambda: number

    def __dlpack__(self, **how: object) -> object:
        return self._frame.__dlpack__(**how)

    def __dlpack_device__(self) -> tuple:
        return self._frame.__dlpack_device__()


def test_nvdec_session_hands_packets_and_numbers_to_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for PyNvVideoCodec: what it is asked for, what becomes of its frames and of what it raises."""
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: SimpleNamespace(cuda_stream=77))
    library = Library()
    session = NvdecSession(library, StreamKind("hevc", 16, 16), torch.device("cuda", 3))
    assert library.made == {
        "gpuid": 3, "codec": "H.265", "cudastream": 77, "usedevicememory": True, "maxwidth": 16, "maxheight": 16
    }  # fmt: skip
    for frames, number in ((session.decode(memoryview(b"packet"), 5), 5), (session.flush(), 8)):
        ((got, frame),) = frames
        assert got == number and frame.shape == (24, 16) and (frame == number).all()
    assert library.packets == [(b"packet", 5)]
    with pytest.raises(GpuRefusal, match="^hevc 16 16: cuvidParseVideoData failed$"):
        session.decode(memoryview(b"broken"), 6)
