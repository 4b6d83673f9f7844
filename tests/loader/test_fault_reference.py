"""The fault reference of docs/faults.md: each row is tried here, and has the outcome that the page states."""

from __future__ import annotations

import bz2
import re
import tarfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bevt_ds.data.decoding.gpu_decoder import GpuDecoder
from bevt_ds.data.decoding.images import decode_image
from bevt_ds.data.decoding.pool import DecodePool
from bevt_ds.data.decoding.sessions import GpuRefusal
from bevt_ds.data.decoding.transcode import Profile, transcode
from bevt_ds.data.decoding.verify import verify_video
from bevt_ds.data.decoding.video import fits_gpu
from bevt_ds.data.limits import BadSample, Limits
from bevt_ds.data.reading.index import load_shard
from bevt_ds.data.reading.shards import expand
from bevt_ds.errors import UserError
from bevt_ds.shards.file_lists import read_rows
from bevt_ds.shards.sources import list_items
from tests.loader.fake_gpu import FakeGpu
from tests.loader.media import deep_jpeg, encode_clip, encoded, noise, pooled_clips, special_member, write_tar
from tests.loader.test_frame_numbers import CACHED
from tests.loader.test_gpu_obstacles import OBSTACLES
from tests.loader.test_images import refused_by_pillow
from tests.loader.test_rotated_videos import clip as turned_clip
from tests.loader.test_sources import touched
from tests.loader.test_tar_members import SPARSE_FORMATS, tar_with_holes

PAGE = (Path(__file__).parents[2] / "docs" / "faults.md").read_text()
TABLE = PAGE.partition("| given | outcome | why |\n|---|---|---|\n")[2].partition("\n\n")[0]
OUTCOMES = dict(re.fullmatch(r"\| (.+) \| (.+) \| .+ \|", row).groups() for row in TABLE.splitlines())
LIMITS = Limits()
GPU, WORKER = "decoded", "decoded by workers only"
VP9 = {"deadline": "realtime", "cpu-used": "8"}


@dataclass(frozen=True)
class video:  # noqa: N801 - next to the functions that make the other attempts
    """Decoded as in training and compared with a full decode; then rewritten."""

    make: Callable[[], bytes]

    def __call__(self, folder: Path) -> str:
        data = self.make()
        try:
            info = verify_video(data, LIMITS)
        except BadSample:
            with pytest.raises(BadSample):
                transcode(data, Profile(), LIMITS)
            return "refused"
        rewritten, facts = transcode(data, Profile(), LIMITS)
        assert verify_video(rewritten, LIMITS).frames == facts["frames"]
        turns = [f"{info.rotation}°"] * (info.rotation > 0) + ["mirrored"] * info.mirrored
        return (f"turned ({', '.join(turns)}), " if turns else "") + (GPU if fits_gpu(vars(info)) else WORKER)


def image(make: Callable[[], bytes]) -> Callable[[Path], str]:
    def attempt(folder: Path) -> str:
        try:
            facts = decode_image(make(), LIMITS)
        except BadSample:
            return "refused"
        return f"turned ({facts['rotation']}°), decoded" if facts["rotation"] else "decoded"

    return attempt


def tar(make: Callable[[Path], Path]) -> Callable[[Path], str]:
    """A tar with a plain `a.mp4` besides."""

    def attempt(folder: Path) -> str:
        try:
            shard = load_shard(str(make(folder)))
        except UserError:
            return "the tar is refused"
        assert "a" in shard.keys
        return "passed over, counted and named" if shard.ignored else "read"

    return attempt


def member(name: str, kind: bytes, to: str) -> Callable[[Path], Path]:
    return lambda folder: write_tar(folder / "s.tar", {"a.mp4": b"data"}, special=[special_member(name, kind, to)])


def source(make: Callable[[Path], object], class_folders: bool = False) -> Callable[[Path], str]:
    """A folder `ds` with a plain `B/a.mp4` besides."""

    def attempt(folder: Path) -> str:
        ds = touched(folder, "ds/B/a.mp4") / "ds"
        make(ds)
        listing = list_items(str(ds), "video", class_folders=class_folders)
        if any(item.fault for item in listing.items):
            return "rejected, named with the reason"
        return "passed over, counted by ending" if listing.passed_over else f"packed ({len(listing.items)} of 2)"

    return attempt


def line(text: str) -> Callable[[Path], str]:
    def attempt(folder: Path) -> str:
        try:
            (read,) = read_rows(Path("list.csv"), text)
        except UserError as error:
            assert "line 1" in str(error)
            return "refused, with line and remedy"
        return f"`{read[0]}`, `{read[1]}`".replace("\u2028", "[U+2028]")

    return attempt


def odd_pattern(folder: Path) -> str:
    touched(folder, "data[v2]/t-000000.tar", "data[v2]/t-000001.tar", "datav/t-000000.tar")
    found = expand(f"{folder}/data[v2]/t-{{000000..000001}}.tar")
    assert [path.removeprefix(f"{folder}/") for path in found] == ["data[v2]/t-000000.tar", "data[v2]/t-000001.tar"]
    return "the files of that name"


def compressed(folder: Path) -> Path:
    path = write_tar(folder / "s.tar", {"a.mp4": b"data"})
    path.write_bytes(bz2.compress(path.read_bytes()))
    return path


def slanted() -> bytes:
    matrix = (56755, -32767, 0, 32767, 56755, 0, 0, 0, 1 << 30)
    return encode_clip(noise(3, 48, 64), "mp4", "libx264", matrix=matrix)


def plain(codec: str = "libx264", size: tuple[int, int] = (48, 64), pixels: str = "yuv420p", **options: str) -> bytes:
    return encode_clip(noise(4, *size), "webm" if "vpx" in codec else "mp4", codec, pixels, **options)


CASES: dict[str, Callable[[Path], str]] = {  # what is given, as the page names it, and the attempt to use it
    "H.264 in MP4": video(plain),
    "AV1": video(lambda: plain("libsvtav1", (128, 128), preset="12")),
    "interlaced": video(OBSTACLES["H.264, interlaced"][0]),
    "may be interlaced (H.264 or HEVC that does not exclude it)": video(OBSTACLES["H.264 that may be interlaced"][0]),
    "H.264, lossless": video(OBSTACLES["H.264, lossless"][0]),
    "H.264, cropped at its left or top": video(OBSTACLES["H.264, cropped at its left"][0]),
    "smaller than NVDEC's least": video(lambda: plain(size=(48, 46))),
    "display matrix, 90° clockwise": video(lambda: turned_clip((0, 1, -1, 0))),
    "display matrix, mirrored": video(lambda: turned_clip((-1, 0, 0, 1))),
    "display matrix of another angle": video(slanted),
    "B-frames copied from AVI (H.264)": video(CACHED["H.264 from AVI"]),
    "B-frames copied from AVI (MPEG-4, packed)": video(CACHED["MPEG-4, packed"]),
    "x264's intra-refresh": video(CACHED["H.264, intra-refresh"]),
    "VP8 with hidden frames": video(CACHED["VP8, hidden frames"]),
    "open groups, cut by stream copy (H.264)": video(CACHED["H.264, open groups, cut"]),
    "open groups, cut by stream copy (HEVC)": video(CACHED["HEVC, open groups, cut"]),
    "beginning between keyframes": video(CACHED["HEVC, between keyframes"]),
    "ProRes in MOV": video(CACHED["ProRes"]),
    "PNG in MOV": video(CACHED["PNG"]),
    "QuickTime RLE in MOV": video(CACHED["QuickTime RLE"]),
    "HuffYUV in AVI": video(CACHED["HuffYUV"]),
    "fragmented MP4": video(CACHED["fragmented"]),
    "odd size": video(lambda: plain("libvpx-vp9", (47, 63), **VP9)),
    "4:4:4": video(lambda: plain("libx264", pixels="yuv444p")),
    "cut": video(lambda: plain()[:-400]),
    "image with an EXIF orientation": image(lambda: encoded(noise(20, 30), "JPEG", 6)),
    "JPEG with a damaged application segment": image(lambda: refused_by_pillow(SimpleNamespace(noise=noise))),
    "JPEG of 12 bits": image(deep_jpeg),
    "JPEG that is cut": image(lambda: encoded(noise(20, 30), "JPEG")[:-20]),
    "GIF, WebP, TIFF named `.jpg`": image(lambda: b"GIF89a" + bytes(99)),
    "hard link to a member before it": tar(member("b.mp4", tarfile.LNKTYPE, "a.mp4")),
    "hard link to what is not in the tar": tar(member("b.mp4", tarfile.LNKTYPE, "c.mp4")),
    "symbolic link, device": tar(member("b.mp4", tarfile.SYMTYPE, "a.mp4")),
    "sparse member (`tar --sparse`)": tar(lambda folder: tar_with_holes(folder, SPARSE_FORMATS["pax 1.0"], "b")),
    "`.tar.gz`, `.tar.bz2`, `.tar.xz`, `.tar.zst`": tar(compressed),
    "class folder that is a link": source(
        lambda ds: (ds / "A").symlink_to(touched(ds.parent, "real/x.mp4") / "real"), class_folders=True
    ),
    "link to nowhere": source(lambda ds: (ds / "A").symlink_to("gone")),
    "link to a folder around it": source(lambda ds: (ds / "B" / "up").symlink_to("..")),
    "file of another ending": source(lambda ds: touched(ds, "B/x.wmv")),
    "list: `a.mp4,push[U+2028]left`": line("a.mp4,push\u2028left"),
    "list: `100218;Falling, like a feather`": line("100218;Falling, like a feather"),
    "list: `# a.mp4,3` above `b.mp4,3`": line("# a.mp4,3\nb.mp4,3"),
    "list: `#a.mp4,3`": line("#a.mp4,3"),
    "shards `data[v2]/t-{000000..000001}.tar`": odd_pattern,
}


def test_every_row_of_the_fault_reference_is_tried() -> None:
    assert list(OUTCOMES) == list(CASES)


@pytest.mark.parametrize("given", CASES)
def test_fault_has_the_documented_outcome(given: str, tmp_path: Path) -> None:
    assert CASES[given](tmp_path) == OUTCOMES[given]


def test_every_video_of_the_table_is_decoded_by_a_gpus_sessions_or_left_to_a_worker() -> None:
    """No file makes a session fail, so nothing is built again; what a session decodes is what the worker does."""
    videos = {given: attempt.make for given, attempt in CASES.items() if isinstance(attempt, video)}
    videos |= {kind: make for kind, make in CACHED.items() if kind.startswith("H.264")}
    pool, gpu, decoded = DecodePool(1, 60.0, LIMITS), FakeGpu(), []
    decoder = GpuDecoder(pool, gpu, sessions=8)
    for name, make in videos.items():
        data, by_worker = make(), None
        with suppress(BadSample):
            by_worker = pooled_clips(pool, data, [(0.9, 0.5)], 3, 5)
        try:
            clips, _ = decoder.clips(data, [(0.9, 0.5)], 3, 5)
        except GpuRefusal as refusal:
            assert not refusal.is_fault and by_worker is not None, name
        except BadSample:
            assert by_worker is None, name
        else:
            np.testing.assert_array_equal(torch.stack(clips).numpy(), by_worker, err_msg=name)
            decoded.append(name)
    pool.close()
    assert "H.264 in MP4" in decoded and len(decoded) >= 5
    assert gpu.closed == 0 and sorted(gpu.opened) == sorted(set(gpu.opened)), "each kind is opened once"
    decoder.sessions.close()
