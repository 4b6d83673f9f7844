"""`bevt features`: the same files whatever the number of ranks and stops, and what is in them."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import pyarrow.parquet
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import bevt_ds
from bevt_ds import UserError, cli
from bevt_ds.config.features import FeaturesRunConfig
from bevt_ds.config.parse import config_fields
from bevt_ds.config.validate import check_fields
from bevt_ds.interop import extraction
from bevt_ds.interop.features import as_overrides, main
from bevt_ds.rng import Use, generator
from bevt_ds.shards.synthetic.draw_worker import encode_jpeg, encode_mp4
from bevt_ds.shards.synthetic.scene import Extent, render
from tests.loader.media import write_tar

SIZES = {"embed_dim": 16, "depths": (1, 1), "num_heads": (1, 2), "window": (2, 3, 3)}
SMALL = {"data.frames": "4", "data.stride": "2", "data.size": "32", "views.short_side": "40", "views.micro_videos": "2"}
SMALL |= {"features.chunk": "3", "precision": "fp32", "data.workers": "1"}
VIDEOS, BROKEN = 7, 4
FPS = 25


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Weights of a joint model, and a shard of seven labelled videos, of which one is broken, and of five images."""
    folder = tmp_path_factory.mktemp("features")
    torch.manual_seed(0)
    bevt_ds.BEVT(vocab_size=16, **SIZES).save_pretrained(folder / "weights")
    members: dict[str, bytes] = {}
    for i in range(VIDEOS):
        frames = render(generator(7, Use.SYNTHETIC, 0, i), Extent(height=48, width=64, frames=12))
        video, image = encode_mp4(frames), encode_jpeg(frames[0])
        members |= {f"clip-{i}.mp4": video[:400] if i == BROKEN else video, f"clip-{i}.cls": str(i % 2).encode()}
        members |= {f"image-{i}.jpg": image} if i < 5 else {}
        (folder / f"clip-{i}.mp4").write_bytes(video)
        (folder / f"image-{i}.jpg").write_bytes(image)
    write_tar(folder / "all.tar", members)
    return folder


def extract(world: Path, out: Path, monkeypatch, *words: str, ranks: int = 1) -> None:
    """The command on so many ranks, one after the other: they never meet."""
    for rank in reversed(range(ranks)):
        for name, value in (("RANK", rank), ("WORLD_SIZE", ranks)):
            monkeypatch.setenv(name, str(value))
        settings = SMALL | dict(word.split("=") for word in words)
        options = [f"{key}={value}" for key, value in settings.items()]
        assert main([str(world / "weights"), str(world / "all.tar"), str(out), *options]) == 0


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir()}


def texts(path: Path) -> dict:
    with safe_open(path, "pt") as file:
        return {key: json.loads(text) for key, text in file.metadata().items() if key != "format"}


@pytest.fixture(scope="module")
def alone(world) -> Path:
    """What one rank writes."""
    with pytest.MonkeyPatch.context() as patch:
        extract(world, world / "alone", patch)
    return world / "alone"


def test_three_ranks_write_the_files_of_one(world, alone, tmp_path, monkeypatch, capsys):
    extract(world, tmp_path / "out", monkeypatch, ranks=3)
    assert contents(tmp_path / "out") == contents(alone)
    assert f"rank 0: complete: {tmp_path / 'out'}/" in capsys.readouterr().out


def test_stopped_command_continues_with_the_same_bytes(world, alone, tmp_path, monkeypatch, capsys):
    def stopping(folder, features, number, chunk):
        if number == 1:
            raise KeyboardInterrupt
        write(folder, features, number, chunk)

    write, out = extraction.write_chunk, tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(extraction, "write_chunk", stopping)
        with pytest.raises(KeyboardInterrupt):
            extract(world, out, patch)
    assert {path.name for path in out.iterdir()} == {"_manifest.json", "features-00000.safetensors"}
    first = (out / "features-00000.safetensors").stat().st_mtime_ns
    (out / ".features-00001.safetensors.12.partial").write_bytes(b"cut")  # what a kill leaves
    extract(world, out, monkeypatch, ranks=2)
    assert contents(out) == contents(alone)
    assert (out / "features-00000.safetensors").stat().st_mtime_ns == first
    assert "wrote 1 of the 3 files of 7 samples" in capsys.readouterr().out


def test_files_hold_features_keys_labels_and_seconds(world, alone):
    keys, labels, unreadable = [], [], {}
    encoder = bevt_ds.VideoSwin.from_pretrained(world / "weights").eval()
    for number, path in enumerate(sorted(alone.glob("*.safetensors"))):
        tensors, found = load_file(path), texts(path)
        assert tensors["features"].shape == (len(found["keys"]), 1, 32) and tensors["features"].dtype == torch.float32
        for features, n, seconds in zip(
            tensors["features"], tensors["numbers"].tolist(), tensors["seconds"], strict=True
        ):
            clip = bevt_ds.load_clip(world / f"clip-{n}.mp4", 4, 2, 32, 40)
            with torch.no_grad():
                torch.testing.assert_close(features[0], encoder(clip[None])[0].mean((1, 2, 3)), rtol=0, atol=1e-5)
            shown = 2 + 2 * torch.arange(4)  # the middle one of the 5 possible clips of 12 frames
            torch.testing.assert_close(seconds, (shown.double() / FPS)[None], rtol=0, atol=1e-6)
            assert n // 3 == number
        keys, labels, unreadable = keys + found["keys"], labels + found["labels"], unreadable | found["unreadable"]
    readable = [i for i in range(VIDEOS) if i != BROKEN]
    assert keys == [f"all.tar/clip-{i}" for i in readable] and labels == [str(i % 2) for i in readable]
    assert unreadable.keys() == {f"all.tar/clip-{BROKEN}"} and all(unreadable.values())


def test_manifest_says_what_the_features_are_of(world, alone):
    manifest = json.loads((alone / "_manifest.json").read_text())
    weights = (world / "weights" / "model.safetensors").read_bytes()
    assert manifest["weights_sha256"] == hashlib.sha256(weights).hexdigest()
    assert manifest["views"] == {"clips": 1, "crops": 1, "short_side": 40, "micro_videos": 2}
    assert manifest["data"] == {"frames": 4, "stride": 2, "sampling": "dense", "size": 32}
    assert (manifest["samples"], manifest["channels"], manifest["precision"]) == (VIDEOS, 32, "fp32")


def test_dense_views_in_parquet(world, tmp_path, monkeypatch):
    words = ["features.dense=true", "features.format=parquet", "views.clips=2", "views.crops=3"]
    extract(world, tmp_path, monkeypatch, *words, "features.dtype=float16")
    table = pyarrow.parquet.read_table(tmp_path)  # the whole folder
    assert table.num_rows == (VIDEOS - 1) * 6
    row = {name: table[name][4].as_py() for name in table.column_names}
    assert (row["number"], row["key"], row["label"], row["clip"], row["crop"]) == (0, "all.tar/clip-0", "0", 1, 1)
    assert len(row["seconds"]) == 4 and row["seconds"][0] > table["seconds"][0].as_py()[0]
    shape = json.loads(pyarrow.parquet.read_schema(tmp_path / "features-00000.parquet").metadata[b"shape"])
    assert shape == [2, 4, 4, 32] and len(row["features"]) == math.prod(shape)


@pytest.mark.parametrize("dense", [False, True])
def test_images_go_through_their_own_stem(world, tmp_path, monkeypatch, dense):
    extract(world, tmp_path, monkeypatch, "features.kind=image", f"features.dense={dense}".lower())
    model = bevt_ds.BEVT.from_pretrained(world / "weights").eval()
    files = [load_file(path) for path in sorted(tmp_path.glob("*.safetensors"))]
    features = torch.cat([tensors["features"] for tensors in files])
    images = torch.stack([bevt_ds.load_image(world / f"image-{i}.jpg", 32, 40) for i in range(5)])
    with torch.no_grad():
        tokens = model.encoder.features_of(images, model.image_embed, model.image_windows).squeeze(2).movedim(1, -1)
    wanted = tokens if dense else tokens.mean((1, 2))
    torch.testing.assert_close(features[:, 0], wanted, rtol=0, atol=1e-5)
    assert "seconds" not in files[0]


@pytest.mark.parametrize("word", ["data.stride=1", "views.crops=3", "features.dense=true", "precision=bf16"])
def test_folder_of_other_settings_is_refused(world, alone, word, monkeypatch):
    before = contents(alone)
    with pytest.raises(UserError, match=rf"has features of other settings: {word.split('=')[0]}="):
        extract(world, alone, monkeypatch, word)
    assert contents(alone) == before


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ([], "weights= is missing"),
        (["W"], "data.val is empty"),
        (["W", "S"], "OUT is missing"),
        (["W", "S", "O", "more"], "'more' comes after WEIGHTS, SHARDS and OUT"),
        (["W", "S", "O", "features.kind=image", "views.clips=2"], "an image has no clips along time"),
        (["W", "S", "O", "recipe=demo"], "bevt features has no recipe"),
        (["W", "S", "O", "features.chunk=0"], "features.chunk=0: must be at least 1"),
    ],
)
def test_mistakes_are_named(world, words, part):
    with pytest.raises(UserError, match=part):
        main([str(world / "weights") if word == "W" else word for word in words])


def test_command_line_and_help(world, capsys):
    words = ["W", "--local_rank=0", "a.tar", "views.crops=3", "OUT"]
    assert as_overrides(words) == ["weights=W", "--local_rank=0", "data.val=a.tar", "views.crops=3", "output_dir=OUT"]
    assert cli.main(["features", "--help"]) == 0
    text = capsys.readouterr().out
    assert all(f" {field.key}=" in text for field in config_fields(FeaturesRunConfig) if field.key != "recipe")
    check_fields(FeaturesRunConfig())
