"""The fault reference of docs/faults.md: each row is a case here, and the page's table is made of them."""

from __future__ import annotations

import bz2
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest

from bevt_ds.data.decoding.images import decode_image
from bevt_ds.data.decoding.transcode import Profile, transcode
from bevt_ds.data.decoding.verify import verify_video
from bevt_ds.data.decoding.video import fits_gpu
from bevt_ds.data.limits import BadSample, Limits
from bevt_ds.data.reading.index import load_shard
from bevt_ds.data.reading.shards import expand
from bevt_ds.errors import UserError
from bevt_ds.shards.file_lists import read_rows
from bevt_ds.shards.sources import list_items
from tests.loader.media import encode_clip, noise, write_tar
from tests.loader.test_frame_numbers import CACHED
from tests.loader.test_gpu_obstacles import OBSTACLES
from tests.loader.test_images import encoded, refused_by_pillow
from tests.loader.test_rotated_videos import clip as turned_clip
from tests.loader.test_sources import touched
from tests.loader.test_tar_members import SPARSE_FORMATS, tar_with_holes

PAGE = Path(__file__).parents[2] / "docs" / "faults.md"
LIMITS = Limits()
GPU, WORKER = "decoded", "decoded by workers only"
VP9 = {"deadline": "realtime", "cpu-used": "8"}


@dataclass(frozen=True)
class Case:
    """A row: what is given, what becomes of it, and why. `outcome` is what `attempt` must return."""

    what: str
    outcome: str
    why: str
    attempt: Callable[[Path], str]

    @property
    def row(self) -> str:
        return f"| {self.what} | {self.outcome} | {self.why} |"


def video(make: Callable[[], bytes]) -> Callable[[Path], str]:
    """Decoded as in training and compared with a full decode; then rewritten."""

    def attempt(folder: Path) -> str:
        data = make()
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

    return attempt


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


def member(name: str, kind: bytes, to: str = "") -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        path = write_tar(folder / "s.tar", {"a.mp4": b"data"})
        with tarfile.open(path, "a") as archive:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, to
            archive.addfile(info)
        return path

    return make


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


def line(text: str, row: tuple[str, str] | None = None) -> Callable[[Path], str]:
    def attempt(folder: Path) -> str:
        try:
            (read,) = read_rows(Path("list.csv"), text)
        except UserError as error:
            assert "line 1" in str(error)
            return "refused, with line and remedy"
        assert read == row
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


def deep_jpeg() -> bytes:
    data = encoded(noise(20, 30), "JPEG")
    frame = data.index(b"\xff\xc0")
    return data[: frame + 4] + b"\x0c" + data[frame + 5 :]


def plain(codec: str = "libx264", size: tuple[int, int] = (48, 64), pixels: str = "yuv420p", **options: str) -> bytes:
    return encode_clip(noise(4, *size), "webm" if "vpx" in codec else "mp4", codec, pixels, **options)


COUNTED = "its timestamps do not tell the frames: their order is read from the stream, or they are counted"
CASES = [
    Case("H.264 in MP4", GPU, "of even size, 4:2:0, 8 bits, with timestamps that tell its frames", video(plain)),
    Case(
        "AV1",
        GPU,
        "every start decodes; the codec is `av1` whichever library decodes it",
        video(lambda: plain("libsvtav1", (128, 128), preset="12")),
    ),
    Case("interlaced", WORKER, "libraries let a GPU deinterlace", video(OBSTACLES["H.264, interlaced"][0])),
    Case(
        "may be interlaced (H.264 or HEVC that does not exclude it)",
        WORKER,
        "the same",
        video(OBSTACLES["H.264 that may be interlaced"][0]),
    ),
    Case("H.264, lossless", WORKER, "a profile that NVDEC does not know", video(OBSTACLES["H.264, lossless"][0])),
    Case(
        "H.264, cropped at its left or top",
        WORKER,
        "libraries leave that out on a GPU",
        video(OBSTACLES["H.264, cropped at its left"][0]),
    ),
    Case("smaller than NVDEC's least", WORKER, "H.264: 48x16, HEVC: 144x144", video(lambda: plain(size=(48, 46)))),
    Case(
        "display matrix, 90° clockwise",
        f"turned (90°), {WORKER}",
        "as players, decord, OpenCV and torchcodec show it; a GPU's decoder would not",
        video(lambda: turned_clip((0, 1, -1, 0))),
    ),
    Case(
        "display matrix, mirrored",
        f"turned (mirrored), {WORKER}",
        "the same; also upside down, in Matroska, or as a message in the stream",
        video(lambda: turned_clip((-1, 0, 0, 1))),
    ),
    Case(
        "display matrix of another angle",
        "refused",
        "turned exactly, or not at all: `ffmpeg -i IN OUT.mp4` makes a video as it shows",
        video(slanted),
    ),
    Case("B-frames copied from AVI (H.264)", WORKER, COUNTED, video(CACHED["H.264 from AVI"])),
    Case("B-frames copied from AVI (MPEG-4, packed)", WORKER, COUNTED, video(CACHED["MPEG-4, packed"])),
    Case(
        "x264's intra-refresh",
        WORKER,
        "no keyframe after the first: decoding begins where all is refreshed",
        video(CACHED["H.264, intra-refresh"]),
    ),
    Case(
        "VP8 with hidden frames",
        WORKER,
        "packets that give no frame have no number",
        video(CACHED["VP8, hidden frames"]),
    ),
    Case(
        "open groups, cut by stream copy (H.264)",
        WORKER,
        "what comes before the first keyframe is what a full decode shows of it",
        video(CACHED["H.264, open groups, cut"]),
    ),
    Case("open groups, cut by stream copy (HEVC)", WORKER, "the same", video(CACHED["HEVC, open groups, cut"])),
    Case("beginning between keyframes", WORKER, "the same", video(CACHED["HEVC, between keyframes"])),
    Case("ProRes in MOV", WORKER, "any codec that FFmpeg knows", video(CACHED["ProRes"])),
    Case("PNG in MOV", WORKER, "the same", video(CACHED["PNG"])),
    Case("QuickTime RLE in MOV", WORKER, "the same", video(CACHED["QuickTime RLE"])),
    Case("HuffYUV in AVI", WORKER, "the same", video(CACHED["HuffYUV"])),
    Case("fragmented MP4", WORKER, "its tables are in its fragments", video(CACHED["fragmented"])),
    Case(
        "odd size",
        WORKER,
        "DALI's kernel writes two by two pixels",
        video(lambda: plain("libvpx-vp9", (47, 63), **VP9)),
    ),
    Case("4:4:4", WORKER, "not what a GPU's decoder is for", video(lambda: plain("libx264", pixels="yuv444p"))),
    Case("cut", "refused", "samples that its tables name are not there", video(lambda: plain()[:-400])),
    Case(
        "image with an EXIF orientation",
        "turned (90°), decoded",
        "DALI applies it; sizes in the JSON are those after it",
        image(lambda: encoded(noise(20, 30), "JPEG", 6)),
    ),
    Case(
        "JPEG with a damaged application segment",
        "decoded",
        "Pillow refuses it, DALI, which training uses, does not",
        image(lambda: refused_by_pillow(SimpleNamespace(noise=noise))),
    ),
    Case("JPEG of 12 bits", "refused", "DALI cannot decode it", image(deep_jpeg)),
    Case("JPEG that is cut", "refused", "it has no end marker", image(lambda: encoded(noise(20, 30), "JPEG")[:-20])),
    Case("GIF, WebP, TIFF named `.jpg`", "refused", "neither JPEG nor PNG", image(lambda: b"GIF89a" + bytes(99))),
    Case(
        "hard link to a member before it",
        "read",
        "its data is that member's",
        tar(member("b.mp4", tarfile.LNKTYPE, "a.mp4")),
    ),
    Case(
        "hard link to what is not in the tar",
        "passed over, counted and named",
        "there is no data; index, check, stats and a run's start name it",
        tar(member("b.mp4", tarfile.LNKTYPE, "c.mp4")),
    ),
    Case(
        "symbolic link, device",
        "passed over, counted and named",
        "no regular file",
        tar(member("b.mp4", tarfile.SYMTYPE, "a.mp4")),
    ),
    Case(
        "sparse member (`tar --sparse`)",
        "passed over, counted and named",
        "its data is in pieces; the other members are read",
        tar(lambda folder: tar_with_holes(folder, SPARSE_FORMATS["pax 1.0"], "b")),
    ),
    Case(
        "`.tar.gz`, `.tar.bz2`, `.tar.xz`, `.tar.zst`",
        "the tar is refused",
        "compressed: samples are read by offset",
        tar(compressed),
    ),
    Case(
        "class folder that is a link",
        "packed (2 of 2)",
        "links are followed",
        source(lambda ds: (ds / "A").symlink_to(touched(ds.parent, "real/x.mp4") / "real"), class_folders=True),
    ),
    Case(
        "link to nowhere",
        "rejected, named with the reason",
        "in `SPLIT-rejected.jsonl`, and counted",
        source(lambda ds: (ds / "A").symlink_to("gone")),
    ),
    Case(
        "link to a folder around it",
        "rejected, named with the reason",
        "its files are packed once",
        source(lambda ds: (ds / "B" / "up").symlink_to("..")),
    ),
    Case(
        "file of another ending",
        "passed over, counted by ending",
        "printed, and in the manifest",
        source(lambda ds: touched(ds, "B/x.wmv")),
    ),
    Case(
        "list: `a.mp4,push[U+2028]left`",
        "`a.mp4`, `push[U+2028]left`",
        "lines end with line feeds only",
        line("a.mp4,push\u2028left", ("a.mp4", "push\u2028left")),
    ),
    Case(
        "list: `100218;Falling, like a feather`",
        "`100218`, `Falling, like a feather`",
        "as Something-Something V1 and Jester have it",
        line("100218;Falling, like a feather", ("100218", "Falling, like a feather")),
    ),
    Case("list: `# a.mp4,3` above `b.mp4,3`", "`b.mp4`, `3`", "a comment", line("# a.mp4,3\nb.mp4,3", ("b.mp4", "3"))),
    Case("list: `#a.mp4,3`", "refused, with line and remedy", "a comment, or a file of that name", line("#a.mp4,3")),
    Case(
        "shards `data[v2]/t-{000000..000001}.tar`",
        "the files of that name",
        "what exists as it is written is no pattern",
        odd_pattern,
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.what)
def test_fault_has_the_documented_outcome(case: Case, tmp_path: Path) -> None:
    assert case.attempt(tmp_path) == case.outcome


def test_fault_table_in_docs_matches_the_cases() -> None:
    """To write it: `python -m tests.loader.test_fault_reference`."""
    assert table() in PAGE.read_text()


def table() -> str:
    return "\n".join(["| given | outcome | why |", "|---|---|---|", *(case.row for case in CASES)]) + "\n"


def main() -> None:
    """Put the table into the page, between its heading and the next one."""
    text = PAGE.read_text()
    start = text.index("| given | outcome | why |")
    PAGE.write_text(text[:start] + table() + text[text.index("\n\n", start) + 1 :])


if __name__ == "__main__":
    main()
