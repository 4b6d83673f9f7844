"""Making shards: drawing, packing, and the `bevt shards` command line."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import webdataset

from bevt_ds import cli
from bevt_ds.data.labels import read_classes
from bevt_ds.data.limits import BadSample, Limits
from bevt_ds.data.reading import index as index_module
from bevt_ds.data.reading.index import load_shard
from bevt_ds.data.reading.members import read_member
from bevt_ds.errors import UserError
from bevt_ds.shards.pack import pack
from bevt_ds.shards.synthetic import draw as draw_module
from bevt_ds.shards.synthetic.draw import draw, ensure_demo_shards
from bevt_ds.shards.synthetic.draw_worker import encode_jpeg


@pytest.fixture
def source(tmp_path: Path, make: SimpleNamespace) -> Path:
    """A folder with good files of both kinds, in subfolders and in odd spellings, and bad ones."""
    folder = tmp_path / "source"
    for i, name in enumerate(["a.jpg", "d/b.JPEG", "d/e/c.x.jpg", "z.png"]):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode_jpeg(make.noise(20, 30, seed=i)))
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    (folder / "z.jpg").write_bytes(encode_jpeg(make.noise(20, 30, seed=9)))
    (folder / "notes.txt").write_text("no image")
    return folder


def names(tar: Path) -> list[str]:
    with tarfile.open(tar) as archive:
        return archive.getnames()


def test_pack_writes_shards_that_webdataset_reads(source: Path, tmp_path: Path) -> None:
    packed = pack(source, tmp_path / "out", "image", "train", shard_samples=3)
    assert [p.name for p in packed.shards] == ["train-000000.tar", "train-000001.tar"]
    assert (packed.samples, packed.rejected) == (4, 2)
    samples = list(webdataset.WebDataset([str(p) for p in packed.shards], shardshuffle=False))
    assert [s["__key__"] for s in samples] == ["a", "d/b", "d/e/c_x", "z"]
    facts = json.loads(samples[1]["json"])
    assert facts == {"source": "d/b.JPEG", "width": 30, "height": 20, "rotation": 0, "mirrored": False}
    assert samples[1]["jpeg"] == (source / "d/b.JPEG").read_bytes()


def test_pack_lists_unusable_files_with_the_reason(source: Path, tmp_path: Path) -> None:
    pack(source, tmp_path / "out", "image", "train")
    lines = (tmp_path / "out" / "train-rejected.jsonl").read_text().splitlines()
    reasons = {event["path"]: event["reason"] for event in map(json.loads, lines)}
    assert set(reasons) == {"broken.jpg", "z.png"}
    assert "cut" in reasons["broken.jpg"] and "key 'z'" in reasons["z.png"]


def test_pack_does_not_open_pipes_or_folders(source: Path, tmp_path: Path) -> None:
    """A pipe has a reader's name and nothing to read; a list may name folders too."""
    os.mkfifo(source / "pipe.jpg")
    (source / "folder.jpg").mkdir()
    (source / "list.txt").write_text("pipe.jpg\nfolder.jpg\na.jpg\n")
    assert pack(source / "list.txt", tmp_path / "out", "image").samples == 1
    reasons = [json.loads(line)["reason"] for line in (tmp_path / "out" / "train-rejected.jsonl").open()]
    assert reasons[0] == "it is no regular file" and reasons[1].startswith("it is a folder")


def test_pack_reports_files_as_the_list_names_them(source: Path, tmp_path: Path) -> None:
    (source / "list.txt").write_text("gone.tif\nnotes.txt\na 3\n")
    assert pack(source / "list.txt", tmp_path / "out", "image").samples == 1
    events = [json.loads(line) for line in (tmp_path / "out" / "train-rejected.jsonl").open()]
    assert [event["path"] for event in events] == ["gone.tif", "notes.txt"]
    assert "No such file" in events[0]["reason"] and "it is no image by its name" in events[1]["reason"]


def test_pack_reports_broken_links_and_other_extensions(source: Path, tmp_path: Path, capsys) -> None:
    (source / "linked").symlink_to("gone")
    (source / "again").symlink_to(".")
    out = tmp_path / "out"
    assert cli.main(["shards", "pack", str(source), str(out), "--kind", "image", "--jobs", "1"]) == 0
    shown = capsys.readouterr().out
    assert f"passed over for their ending: 1 .txt\n4 files rejected: {out}/train-rejected.jsonl says why\n" in shown
    again = ["shards", "pack", str(source), str(out), "--kind", "image", "--jobs", "1", "--strict"]
    assert cli.main(again) == 1, "rejected files"
    assert capsys.readouterr().out.startswith("nothing to do: ")
    reasons = {event["path"]: event["reason"] for event in map(json.loads, (out / "train-rejected.jsonl").open())}
    assert "it is a link to 'gone', which cannot be opened" in reasons["linked"]
    assert "it is a link to '.', a folder that it lies in itself" in reasons["again"]
    manifest = json.loads((out / "train-manifest.json").read_text())
    assert (manifest["rejected"], manifest["passed_over"]) == (4, {".txt": 1})


LIMITED = {  # words -> what the messages cite
    "data.max_pixels=599": "its header says 30x20 pixels, over data.max_pixels=599",
    "data.max_file_bytes=99": "bytes, over data.max_file_bytes=99",
}


@pytest.mark.parametrize("limit", LIMITED)
def test_pack_image_limits_can_be_set(source: Path, tmp_path: Path, capsys, limit: str) -> None:
    out = tmp_path / "out"
    pack_it = ["shards", "pack", str(source), str(out), "--kind", "image", "--jobs", "1"]
    assert cli.main([*pack_it[:2], limit, *pack_it[2:], "--split", "none"]) == 2
    assert LIMITED[limit] in capsys.readouterr().err
    assert cli.main([*pack_it, limit.replace("99", "99999")]) == 0
    check_it = ["shards", "check", f"{out}/train-*.tar", "--jobs", "1"]
    assert cli.main([*check_it, limit]) == 1
    assert LIMITED[limit] in capsys.readouterr().out
    assert cli.main(check_it) == 0


def test_pack_video_limits_can_be_set(tmp_path: Path, make: SimpleNamespace, capsys) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.mp4").write_bytes(make.clip(make.noise(6, 48, 64), "mp4", "libx264"))
    command = ["shards", "pack", str(tmp_path / "in"), str(tmp_path / "out"), "--jobs", "1"]
    for words in (["data.max_frames=5"], ["--profile", "train", "data.max_frames=5"]):
        assert cli.main([*command, *words]) == 2
        assert "it has 6 frames, over data.max_frames=5" in capsys.readouterr().err
    assert cli.main([*command, "data.max_frames=6"]) == 0


def test_pack_is_byte_for_byte_repeatable(source: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(source, tmp_path / "elsewhere" / "source")
    first = pack(source, tmp_path / "1", "image", shard_bytes=4000)
    again = pack(moved, tmp_path / "2", "image", shard_bytes=4000)
    assert len(first.shards) > 1
    assert [p.read_bytes() for p in first.shards] == [p.read_bytes() for p in again.shards]


def test_pack_writes_an_index_for_each_tar(source: Path, tmp_path: Path, monkeypatch) -> None:
    """So that what changes between packing and the first run is found, and by whoever has a copy of both."""
    packed = pack(source, tmp_path / "out", "image", shard_samples=3)
    first = load_shard(str(packed.shards[0])).member(0)
    moved = shutil.copytree(tmp_path / "out", tmp_path / "moved", copy_function=shutil.copyfile)
    (tmp_path / "out").rename(tmp_path / "gone")
    with (moved / packed.shards[0].name).open("r+b") as tar:
        tar.seek(first.offset + 7)
        tar.write(b"\x55")
    with monkeypatch.context() as patch:
        patch.setattr(index_module, "scan", lambda *_: pytest.fail("there was no index"))
        shards = [load_shard(str(moved / path.name)) for path in packed.shards]
    with pytest.raises(BadSample, match="not those that were indexed"):
        read_member(shards[0].member(0))
    assert read_member(shards[1].member(0)) == (source / "z.jpg").read_bytes()
    assert shards[1] == load_shard(str(moved / packed.shards[1].name), fresh=True)


def test_pack_overwrites_nothing_and_leaves_no_partial_shard(source, tmp_path, monkeypatch) -> None:
    pack(source, tmp_path / "out", "image", "train")
    with pytest.raises(UserError, match="train-000000.tar exists"):
        pack(source, tmp_path / "out", "image", "train", shard_samples=1)
    pack(source, tmp_path / "out", "image", "eval-2024")
    pack(source, tmp_path / "out", "image", "eval")  # the others' names begin with its name

    def interrupt(data: bytes, limits: Limits) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("bevt_ds.shards.pack.describe_image", interrupt)
    with pytest.raises(KeyboardInterrupt):
        pack(source, tmp_path / "new", "image", "train")
    assert [p.name for p in (tmp_path / "new").iterdir()] == [".train.unfinished"]


@pytest.mark.parametrize(
    ("make_source", "message"),
    [
        (lambda p: p / "absent", "is no folder, no list, and no glob"),
        (lambda p: p, "no video file in"),
        (lambda p: p / "*.mp4", "no glob that matches a video file"),
    ],
)
def test_pack_without_input_is_an_error(source: Path, tmp_path: Path, make_source, message: str) -> None:
    with pytest.raises(UserError, match=message):
        pack(make_source(source), tmp_path / "out", "video")


def test_pack_label_keeps_unicode_line_separators(tmp_path: Path, make: SimpleNamespace) -> None:
    """Unicode has line separators of its own; a list's lines end with line feeds only."""
    (tmp_path / "list.csv").write_text("a.jpg,push\u2028left\nb.jpg,x\x85y\n")
    for i, name in enumerate("ab"):
        (tmp_path / f"{name}.jpg").write_bytes(encode_jpeg(make.noise(20, 30, seed=i)))
    packed = pack(tmp_path / "list.csv", tmp_path / "out", "image", jobs=1)
    shard = load_shard(str(packed.shards[0]))
    assert (shard.keys, shard.labels) == (("a", "b"), ("push\u2028left", "x\x85y"))
    (tmp_path / "names.txt").write_text("push\u2028left\nx\x85y\n")
    for file in ("", str(tmp_path / "names.txt")):
        assert read_classes([shard], [], file).names == ("push\u2028left", "x\x85y")


def test_pack_refuses_folders_of_frames(tmp_path: Path) -> None:
    """As Something-Something V1 and Jester come."""
    (tmp_path / "100218").mkdir()
    (tmp_path / "v1.csv").write_text("100218;Something falling, like a feather\n")
    with pytest.raises(UserError, match="it is a folder: frames in folders are packed once ffmpeg has made a video"):
        pack(tmp_path / "v1.csv", tmp_path / "out", "video", jobs=1)


def test_drawing_shards_is_repeatable_and_never_overwrites(tmp_path: Path) -> None:
    draw(tmp_path / "a", clips=3, images=2, jobs=2)
    draw(tmp_path / "b", clips=3, images=2, jobs=1)
    files = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert files == ["clip-000000.mp4", "clip-000001.mp4", "clip-000002.mp4", "image-000000.jpg", "image-000001.jpg"]
    assert all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files)
    with pytest.raises(UserError, match="not an empty folder"):
        draw(tmp_path / "a", clips=1, images=1)


def test_demo_shards_are_drawn_once_and_appear_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draw_module, "DEMO_SPLITS", {"train": (2, 2), "eval": (1, 1)})
    folder = tmp_path / "demo"
    ensure_demo_shards(folder)
    before = {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
    splits = [f"{s}-{k}" for s in ("train", "eval") for k in ("video", "image")]
    assert set(before) == {
        f"{split}-{end}" for split in splits for end in ("000000.tar", "000000.tar.index.json", "manifest.json")
    }
    ensure_demo_shards(folder)
    assert before == {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
    (folder / "eval-image-000000.tar").unlink()
    with pytest.raises(UserError, match="remove it"):
        ensure_demo_shards(folder)


def test_without_file_locks_the_first_demo_drawing_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draw_module, "DEMO_SPLITS", {"train": (1, 1)})
    folder, whole = tmp_path / "demo", draw_module._draw_demo

    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    def overtaken(unfinished: Path) -> None:
        monkeypatch.setattr(draw_module, "_draw_demo", whole)
        ensure_demo_shards(folder)  # the other program, which ends first
        whole(unfinished)

    monkeypatch.setattr(draw_module, "fcntl", SimpleNamespace(flock=no_locks, LOCK_EX=fcntl.LOCK_EX))
    monkeypatch.setattr(draw_module, "_draw_demo", overtaken)
    ensure_demo_shards(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]
    assert len(list(folder.glob("*.tar"))) == 2


RANK = """
import sys, time
from pathlib import Path
from bevt_ds.shards.synthetic import draw

here, rank, world = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
draw.DEMO_SPLITS, whole = {"train": (1, 1)}, draw._draw_demo

def counted(folder):
    print("drawn")
    while len(list(here.glob("rank-*"))) < world:
        time.sleep(0.02)
    time.sleep(0.3)  # the others have passed their first look
    whole(folder)

draw._draw_demo = counted
(here / f"rank-{rank}").touch()
draw.ensure_demo_shards(here / "demo")
print(len(list((here / "demo").glob("*.tar"))))
"""


def test_one_rank_draws_the_demo_shards(tmp_path: Path) -> None:
    command = [sys.executable, "-c", RANK, str(tmp_path)]
    ranks = [subprocess.Popen([*command, str(n), "3"], stdout=subprocess.PIPE, text=True) for n in range(3)]
    outputs = [rank.communicate(timeout=240)[0].split() for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0, 0]
    assert sorted(outputs) == [["2"], ["2"], ["drawn", "2"]]


def test_interrupted_drawing_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(draw_module, "DEMO_SPLITS", {"train": (1, 1)})
    monkeypatch.setattr(draw_module, "pack", interrupt)
    with pytest.raises(KeyboardInterrupt):
        ensure_demo_shards(tmp_path / "demo")
    assert list(tmp_path.iterdir()) == []


def test_shards_command_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    media, out = str(tmp_path / "media"), str(tmp_path / "out")
    assert cli.main(["shards", "draw", media, "--clips", "2", "--images", "1"]) == 0
    assert cli.main(["shards", "pack", media, out, "--shard-size", "1K"]) == 0
    assert cli.main(["shards", "index", f"{out}/*.tar"]) == 0
    assert "train-000001.tar: 0 images, 1 videos" in capsys.readouterr().out
    assert cli.main(["shards", "pack", media, out]) == 2
    assert "train-000000.tar exists" in capsys.readouterr().err


def test_ctrl_c_of_shards_command_is_one_line(source: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    def interrupt(data: bytes, limits: Limits) -> None:
        raise KeyboardInterrupt

    command = ["shards", "pack", str(source), str(tmp_path / "out"), "--kind", "image"]
    with monkeypatch.context() as patch:
        patch.setattr("bevt_ds.shards.pack.describe_image", interrupt)
        assert cli.main(command) == 130
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "bevt: interrupted: the same command goes on where this one was"
    assert cli.main(command) == 0


@pytest.mark.parametrize("with_errors", [False, True])
@pytest.mark.parametrize(
    "words",
    [
        ["-m", "bevt_ds.cli", "--help"],
        ["-m", "bevt_ds.cli", "shards", "pack", "--help"],
        ["-m", "bevt_ds.cli", "shards", "index", "TAR"],
        ["-m", "bevt_ds.pretrain", "--help"],
    ],
)
def test_closed_stdout_of_shards_command_is_no_traceback(tmp_path, make, words: list[str], with_errors: bool) -> None:
    """What `| head` and `2>&1 | head` do."""
    tar = str(make.tar(tmp_path / "s.tar", {"a.mp4": b""}))
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, *(tar if word == "TAR" else word for word in words)]
    errors = writer if with_errors else subprocess.PIPE
    done = subprocess.run(command, stdout=writer, stderr=errors, text=True, cwd=Path(__file__).parents[2])
    os.close(writer)
    assert done.returncode in (0, 141) and not done.stderr  # 0: argparse itself passes over what cannot be written


def test_broken_pipe_other_than_stdout_is_an_error() -> None:
    """One between processes, say: the output is read."""
    code = "import os; from bevt_ds.config.command_line import while_read; r, w = os.pipe(); os.close(r)"
    code += "; while_read(lambda: os.write(w, b'x'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 1 and "BrokenPipeError" in done.stderr


@pytest.mark.parametrize(("argv", "code"), [([], 2), (["--help"], 0), (["nonsense"], 2)])
def test_shards_usage_errors(argv: list[str], code: int, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(argv) == code
    captured = capsys.readouterr()
    assert "shards" in captured.out + captured.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("pack . out --jobs 0", "'0' is not a whole number from 1 on"),
        ("pack . out --shard-samples x", "'x' is not a whole number from 1 on"),
        ("pack . out --shard-size 0", "'0' is not a size such as 500M"),
        ("pack . out --crf 99", "'99' is not a whole number from 0 to 51"),
        ("pack . out --fps -3", "'-3' is not a positive number"),
        ("pack . out --fps nan", "'nan' is not a positive number"),
        ("pack . out --fps 0.0001", "'0.0001' is not a rate from 0.01 to 1000 frames a second"),
        ("pack . out --fps 5", "--fps need --profile train"),
        ("pack . out --codec hevc", "--codec, --crf and --fps need --profile train"),
        ("pack . out --split a/b", "'a/b' is not a name"),
        ("pack . file/out", "cannot make the folder"),
        ("pack nothing out", "is no folder, no list, and no glob"),
        ("pack list.csv out --kind image", "files of list.csv is usable: 'gone.jpg': cannot read it: No such"),
        ("index .", "is a folder"),
        ("index nothing.tar", "do not exist"),
        ("index clip.mp4", "clip.mp4 is not a whole tar file"),
        ("index http://host/a.tar", "is remote: it is indexed by the run that reads it"),
        ("check nothing-*.tar", "no file matches"),
        ("check a.tar --report nowhere/x.jsonl", "not a file in a folder that exists"),
        ("stats a.tar --plot nowhere/x.png", "not a file in a folder that exists"),
        ("stats a.tar --stride 0", "'0' is not a whole number from 1 on"),
        ("stats a.tar --clips-per-second 0", "'0' is not a positive number"),
        ("draw . --clips -1", "'-1' is not a whole number from 0 on"),
        ("draw . --seed 9223372036854775808", "is not a whole number from 0 on, below 2**63"),
        ("draw . --seed 99999999999999999999999", "is not a whole number from 0 on, below 2**63"),
        ("pack . out data.max_pixel=3", "unknown key 'data.max_pixel'. Near: data.max_pixels"),
        ("pack . out data.size=3", "data.size is none of data.max_pixels, data.max_frames"),
        ("pack . out data.max_pixels=many", "data.max_pixels=many"),
        ("check a.tar data.decode_seconds=0", "data.decode_seconds"),
        ("draw . data.max_pixels=3", "data.max_pixels=3: this command reads no shards and no files"),
    ],
)
def test_shards_command_mistakes_are_one_line(words: str, message: str, tmp_path: Path, monkeypatch, capsys) -> None:
    """And exit code 2, before anything has been done."""
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("no folder")
    Path("list.csv").write_text("gone.jpg,3\n")
    Path("clip.mp4").write_bytes(b"\0\0\0\x20ftypisom" * 99)
    try:
        code = cli.main(["shards", *words.split()])
    except SystemExit as end:  # argparse's way
        code = end.code
    assert code == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_repeating_a_finished_pack_does_nothing(tmp_path: Path, source: Path) -> None:
    """But other files, other options or a shard that is gone are not the same call."""
    out = tmp_path / "out"
    first = pack(source, out, "image")
    times = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    again = pack(source, out, "image")
    assert again == replace(first, repeated=True)
    assert times == {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    with pytest.raises(UserError, match=r"train-000000\.tar exists"):
        pack(source, out, "image", shard_samples=1)
    (out / "train-000000.tar").unlink()
    assert not pack(source, out, "image").repeated
