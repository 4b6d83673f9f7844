"""`bevt view`: contact sheets show what training takes, by key and of bad samples too."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from PIL import Image

from bevt_ds import cli
from bevt_ds.batch import denormalised
from bevt_ds.config.recipes import demo
from bevt_ds.data.loader import Loader
from bevt_ds.report.view import sheets, view_config


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("view")
    assert cli.main(["shards", "draw", str(folder / "drawn"), "--clips", "6", "--images", "4"]) == 0
    for kind, ending in (("video", "mp4"), ("image", "jpg")):
        source = str(folder / "drawn" / "**" / f"*.{ending}")
        assert cli.main(["shards", "pack", source, str(folder / kind), "--kind", kind]) == 0
    return {kind: str(folder / kind / "train-*.tar") for kind in ("video", "image")}


def test_view_sheets_show_pixels_and_masks_of_the_training_batch(shards):
    settings = ["train.global_images=0", "train.global_clips=4", "train.micro_clips=4", "data.workers=1"]
    config = view_config(settings, shards["video"], "video")
    found = list(sheets(config, "video", 3, 2, {}))
    with Loader(config, start_step=3) as loader:
        stream = next(iter(loader)).video
    assert len(found) == 2
    for i, sheet in enumerate(found):
        frames = np.clip(denormalised(stream.pixels[i]), 0, 1)
        assert np.array_equal(np.stack(sheet.rows["input"]), frames)
        cells = stream.mask[i].numpy().repeat(2, 0).repeat(16, 1).repeat(16, 2)
        assert np.array_equal(np.stack(sheet.rows["masked"]), np.where(cells[..., None], 0.5, frames))
        views = [view for view, cell in zip(sheet.rows["tokenizer"], cells, strict=True) if cell.any()]
        first = int(stream.mask[:i].any((-1, -2)).sum()) * 2
        expected = stream.view[first : first + len(views)].permute(0, 2, 3, 1).numpy()
        assert np.array_equal(np.stack(views), expected)
        numbers = [int(title.partition(":")[0]) for title in sheet.titles]
        assert numbers == list(range(numbers[0], numbers[0] + demo().data.frames))


def test_view_writes_sheets_by_key_and_of_bad_samples(shards, tmp_path, capsys):
    png, page, bad = tmp_path / "a.png", tmp_path / "a.html", tmp_path / "bad_samples.jsonl"
    assert cli.main(["view", shards["image"], "--kind", "image", "--out", str(png), "--count", "2"]) == 0
    assert Image.open(png).width > 500
    assert cli.main(["view", shards["video"], "--key", "clip-000003", "--out", str(page)]) == 0
    text = page.read_text()
    assert re.findall(r"<figcaption>train-000000.tar/(clip-\d+)", text) == ["clip-000003"]
    bad.write_text(json.dumps({"key": "clip-000001", "reason": "<cut>"}) + '\n{"key": "clip')
    assert cli.main(["view", shards["video"], "--bad", str(tmp_path), "--out", str(page)]) == 0
    assert "clip-000001: &lt;cut&gt;" in page.read_text()
    capsys.readouterr()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--key", "none"], "no video has the key 'none'"),
        (["--out", "a.gif"], "name a .png or a .html"),
        (["--count", "0"], "--count is at least 1"),
        (["data.size=33"], "data.size"),
        (["--bad", "nowhere"], "nowhere cannot be read"),
    ],
)
def test_view_mistakes_are_one_line(shards, arguments, said, capsys):
    assert cli.main(["view", shards["video"], *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
