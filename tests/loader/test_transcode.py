"""The training profile of `pack`: properties, timing, determinism, resumption after a kill."""

from __future__ import annotations

import hashlib
import io
import json
import signal
import subprocess
import tarfile
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest

from bevt_ds.data.decoding import subprocess_env
from bevt_ds.data.decoding.transcode import CRF, Profile, nearest, transcode
from bevt_ds.data.decoding.video import fits_gpu, opened, probe
from bevt_ds.data.limits import BadSample, Limits
from bevt_ds.errors import UserError
from bevt_ds.shards.pack import _digest, pack
from bevt_ds.shards.writer import ShardLimits
from tests.loader.media import at_any_size, decode_clip, encode_clip, shades

LIMITS = Limits()


@pytest.fixture(scope="module")
def clip(make: SimpleNamespace) -> bytes:
    """60 frames at 25 a second, each of its own brightness, with B-frames and one keyframe."""
    frames = np.stack([np.full((80, 120, 3), 40 + 3 * i, np.uint8) for i in range(60)])
    return make.clip(frames, "mp4", "libx264", g="250", bf="3")


def test_training_profile_properties(clip: bytes) -> None:
    data, facts = transcode(clip, Profile(short_side=64), LIMITS)
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        packets = [p for p in container.demux(stream) if p.size]
        assert not container.streams.audio
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
    assert all(p.pts == p.dts for p in packets)  # no B-frames
    assert [i for i, p in enumerate(packets) if p.is_keyframe] == [0, 16, 32, 48]
    assert len({b.pts - a.pts for a, b in zip(packets, packets[1:], strict=False)}) == 1  # constant rate
    info = probe(data, LIMITS)
    assert (info.width, info.height, info.frames, info.fps) == (96, 64, 60, 25.0)
    assert facts["original"]["fps"] == 25.0 and facts["times"][25] == 1.0 and facts["duration"] == 2.4


def test_hevc_profile_has_the_same_properties_and_the_same_bytes_each_time(clip: bytes) -> None:
    profile = Profile(short_side=64, codec="hevc", crf=CRF["hevc"], keyframe_every=8)
    data, facts = transcode(clip, profile, LIMITS)
    assert data == transcode(clip, profile, LIMITS)[0] and facts["codec"] == "hevc"
    with opened(data, LIMITS) as video:
        info, index = video.info, video.index
        assert [entry.frame for entry in index.entries] == list(range(0, 60, 8))
        assert index.numbers == tuple(range(60)), "no B-frames"
        brightness = [frame.mean() for frame in video.frames(np.arange(60))]
    assert (info.codec, info.pixel_format, info.width, info.height) == ("hevc", "yuv420p", 96, 64)
    assert info.is_plain and fits_gpu(at_any_size(info))
    np.testing.assert_allclose(brightness, 40 + 3 * np.arange(60), atol=3)


def test_packings_of_before_there_was_hevc_are_known_again() -> None:
    """What a finished packing is known by: of H.264 it does not name the codec."""
    full, limits = ShardLimits(1 << 30, 100), Limits()
    old = "Profile(short_side=256, keyframe_every=16, crf=20, fps=0.0)"
    expected = hashlib.sha256(f"('video', {old}, {full!r}, {limits!r})".encode()).hexdigest()
    of = {codec: _digest([], "video", Profile(codec=codec), full, limits) for codec in ("h264", "hevc")}
    assert of["h264"] == expected != of["hevc"]


@pytest.mark.parametrize(
    ("container", "codec", "pixel_format"),
    [
        ("mp4", "libx264", "yuv420p"),
        ("mp4", "libx264", "yuvj420p"),
        ("avi", "mjpeg", "yuvj420p"),
        ("mp4", "libx264", "yuv420p10le"),
        ("avi", "png", "rgb24"),
    ],
)
@pytest.mark.parametrize("short_side", [48, 96])
def test_transcoding_keeps_grey_levels(container: str, codec: str, pixel_format: str, short_side: int) -> None:
    """Of full range too, which cameras and screen recorders write: black is 0 there, and 16 in the profile's video."""
    levels = np.stack([np.full((96, 128, 3), level, np.uint8) for level in (0, 8, 60, 128, 200, 247, 255)])
    source = encode_clip(levels, container, codec, pixel_format)
    packed, _ = transcode(source, Profile(short_side=short_side, crf=1), LIMITS)
    assert probe(source, LIMITS).pixel_format == pixel_format and probe(packed, LIMITS).pixel_format == "yuv420p"
    before, after = (decode_clip(data, np.arange, LIMITS).mean((1, 2)) for data in (source, packed))
    assert np.abs(before - after).max() < 4


def test_transcoding_to_a_lower_rate_shows_the_same_moments(clip: bytes) -> None:
    """At a fifth of the rate a stride of 1 shows what a stride of 5 showed."""
    data, facts = transcode(clip, Profile(fps=5.0, crf=10), LIMITS)
    assert facts["frames"] == 12 and facts["times"] == [round(0.2 * i, 4) for i in range(12)]
    sparse = decode_clip(data, lambda total: np.arange(total), LIMITS)
    source = decode_clip(clip, lambda total: np.arange(0, total, 5), LIMITS)
    assert np.abs(sparse.mean((1, 2, 3)) - source.mean((1, 2, 3))).max() < 1.5  # frames are 15 levels apart


@pytest.mark.parametrize(
    ("times", "fps", "expected"),
    [
        ([0.0], 25.0, [0]),
        ([0.0, 0.1, 0.2, 0.3], 10.0, [0, 1, 2, 3]),
        ([0.0, 0.1, 0.2, 0.3], 5.0, [0, 2]),
        ([0.0, 0.1, 0.2, 0.3], 20.0, [0, 0, 1, 1, 2, 2, 3, 3]),
        ([0.0, 0.1, 1.0], 10.0, [0, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 2]),  # a variable rate
    ],
)
def test_transcoding_takes_the_nearest_frame_in_time(times: list, fps: float, expected: list) -> None:
    assert nearest(np.array(times), np.arange(len(expected)) / fps).tolist() == expected


def test_frames_a_year_apart_are_refused_d17() -> None:
    """D17: refused before memory is taken for its ticks."""
    year = 365 * 86400 * 25  # 1/25 s
    data = encode_clip(shades(2), "matroska", "libx264", times=[0, year])
    with pytest.raises(BadSample, match=r"it has \d{8,} frames, over data.max_frames"):
        transcode(data, Profile(), Limits())


def test_time_lapse_keeps_its_frames() -> None:
    """Of a frame in an hour the rate would be rounded to none. The last one is shown for 1/25 s."""
    data = encode_clip(shades(3), "mp4", "libx264", times=[0, 90_000, 180_000])
    _, facts = transcode(data, Profile(), LIMITS)
    assert facts["frames"] == 7 and facts["times"] == [0.0] * 2 + [3600.0] * 4 + [7200.0]


def test_transcoding_is_the_same_for_any_number_of_processes(clip: bytes, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for i in range(4):
        (source / f"{i}.mp4").write_bytes(clip)
    outputs = [pack(source, tmp_path / str(jobs), "video", profile=Profile(), jobs=jobs).shards for jobs in (1, 3)]
    assert outputs[0][0].read_bytes() == outputs[1][0].read_bytes()
    with tarfile.open(outputs[0][0]) as tar:
        facts = json.loads(tar.extractfile("2.json").read())
    assert facts["source"] == "2.mp4" and facts["original"]["codec"] == "h264"
    assert facts["fps"] == 25.0 and len(facts["times"]) == 60
    manifest = json.loads((tmp_path / "1" / "train-manifest.json").read_text())
    assert manifest["codecs"] == {"h264": 4} and manifest["seconds"] == 9.6 and manifest["frames"] == 240


# Killed when its fourth sample is in the tar and not yet in the journal.
PACK = """
import os, signal, sys
from pathlib import Path
from bevt_ds.shards.pack import _digest, pack
from bevt_ds.shards.writer import ShardLimits
from bevt_ds.shards.writer import ShardWriter
note, written = ShardWriter.note, []
def dying(self, event):
    written.append(1) if "shard" in event else None
    os.kill(os.getpid(), signal.SIGKILL) if len(written) == 4 else note(self, event)
ShardWriter.note = dying
pack(sys.argv[1], Path(sys.argv[2]), "video", shard_samples=5, jobs=1)
"""


def test_killed_pack_continues_where_it_stopped(clip: bytes, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for i in range(13):
        (source / f"{i:02d}.mp4").write_bytes(clip if i != 7 else clip[:-50])
    command = [*subprocess_env.command("x")[:-2], "-c", PACK, str(source), str(tmp_path / "out")]
    journal = tmp_path / "out" / ".train.unfinished" / "journal.jsonl"
    for kills in range(1, 4):
        assert subprocess.run(command, env=subprocess_env.environment()).returncode == -signal.SIGKILL
        assert sum('"shard"' in line for line in journal.read_text().splitlines()) == 3 * kills  # nothing done twice
    with journal.open("a") as file:
        file.write('{"item": 9')  # a line that was cut
    interrupted = pack(source, tmp_path / "out", "video", shard_samples=5, jobs=2)
    straight = pack(source, tmp_path / "straight", "video", shard_samples=5)
    assert [p.read_bytes() for p in interrupted.shards] == [p.read_bytes() for p in straight.shards]
    assert (interrupted.samples, interrupted.rejected) == (straight.samples, straight.rejected) == (12, 1)
    for name in ("train-manifest.json", "train-rejected.jsonl"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()
    assert not journal.parent.exists()


def test_unfinished_pack_of_other_input_is_not_continued(clip: bytes, tmp_path: Path, monkeypatch) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "a.mp4").write_bytes(clip)
    with monkeypatch.context() as patch:
        patch.setattr("bevt_ds.shards.pack._write_reports", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            pack(source, tmp_path / "out", "video")
    for other in ({"profile": Profile()}, {"shard_samples": 5}, {"shard_bytes": 1 << 20}):
        with pytest.raises(UserError, match="unfinished packing of other files or with other options"):
            pack(source, tmp_path / "out", "video", **other)
    assert pack(source, tmp_path / "out", "video").samples == 1  # killed while it gave the shards their names


def test_transcoded_video_decodes_from_any_keyframe(clip: bytes) -> None:
    data, _ = transcode(clip, Profile(), LIMITS)
    with opened(data, LIMITS) as video:
        video.frames(np.array([40, 41]))
        assert video.decoded <= 41 - 32 + 2
