"""docs/own-videos.md from its first line to its last, on drawn clips: a folder of videos becomes features."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest

from bevt_ds import cli
from bevt_ds.shards.synthetic.draw_worker import encode_mp4
from tests.training.processes import launch

DOCS = Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "own-videos.md").read_text()
EXAMPLES = Path(__file__).parents[1] / "examples"
BLOCKS = re.findall(r"```(python)?\n(.*?)```", PAGE, re.DOTALL)
COMMANDS = [line for kind, block in BLOCKS if not kind for line in block.splitlines()]
SHORTER = [
    "train.steps=2",
    "train.global_clips=2",
    "train.micro_clips=2",
    "data.workers=1",
]  # than the page's 20 epochs


def draw(path: Path, seed: int) -> None:
    """A clip of 40 frames: noise that moves sideways."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (128, 160, 3), np.uint8)
    path.write_bytes(encode_mp4(np.stack([np.roll(pixels, 4 * t, 1) for t in range(40)])))


SHOWING = {
    line: page
    for page in ("quickstart.md", "watching.md")
    for line in re.findall(r"^bevt (?:report|runs|view|compare) .*", (DOCS / page).read_text(), re.MULTILINE)
}
STAND_INS = {  # what those pages name, and what stands for it here
    "runs/joint": "runs/mine",
    "runs/demo": "runs/mine",
    "demo-data/train-video-*.tar": "shards/mine-*.tar",
    "clip-000003": "day-1/clip-3",
}


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> tuple[Path, dict[str, str]]:
    """The folder after all commands, and what each of them printed where it ran in a process of its own."""
    folder, said = tmp_path_factory.mktemp("own"), {}
    for i in range(6):
        draw(folder / "VIDEOS" / f"day-{i % 2}" / f"clip-{i}.mp4", i)
    for split in ("train", "test"):
        for name in ("jump", "run"):
            for i in range(2):
                draw(folder / split / name / f"{split}-{name}-{i}.mp4", i)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for command in COMMANDS:
            program, *words = shlex.split(command)
            assert program == "bevt"
            if words[0] in ("pretrain", "probe") and "dry_run=true" not in words:  # these make a process group
                words = [re.sub(r"=(runs|shards)/", rf"={folder}/\1/", word) for word in words]
                words += SHORTER if words[0] == "pretrain" else ["data.workers=1"]
                said[command] = launch(["-m", "bevt_ds.cli", *words], 1)
            else:
                assert cli.main(words) == 0, command
    return folder, said


def test_page_has_its_commands():
    assert [command.split()[1] for command in COMMANDS] == [
        *("shards", "shards", "view", "pretrain", "pretrain", "report", "shards", "shards", "probe")
    ]


def test_commands_of_the_tutorial_lead_to_a_trained_and_probed_network(done):
    folder, said = done
    output = "\n".join(said.values())
    assert (folder / "runs" / "mine" / "weights" / "model.safetensors").is_file(), output
    assert (folder / "runs" / "mine" / "report.html").stat().st_size > 10_000
    assert (folder / "view.png").stat().st_size > 10_000
    assert (folder / "runs" / "mine" / "probe-1" / "scores.json").is_file(), output
    assert "top-1" in output


def test_python_of_the_tutorial_gives_a_vector_for_each_file(done, monkeypatch, capsys):
    folder, _ = done
    monkeypatch.chdir(folder)
    names: dict = {}
    exec("\n".join(block for kind, block in BLOCKS if kind), names)
    saved = np.load("features.npz")
    assert saved["features"].shape == (6, 256) and np.isfinite(saved["features"]).all()
    assert [Path(file).name for file in saved["files"]] == sorted(
        (f"clip-{i}.mp4" for i in range(6)), key=lambda name: (int(name[5]) % 2, name)
    )
    assert capsys.readouterr().out.count("is like clip-") == 5


def replaced(text: str) -> str:
    for name, stand_in in STAND_INS.items():
        text = text.replace(name, stand_in)
    return text


@pytest.mark.parametrize("command", SHOWING)
def test_documented_command_shows_the_run_and_its_samples(done, command, tmp_path, monkeypatch, capsys):
    folder, _ = done
    monkeypatch.chdir(tmp_path)
    Path("shards").symlink_to(folder / "shards")
    for name in ("mine", "other"):
        shutil.copytree(folder / "runs" / "mine", Path("runs", name))
    bad = {"stream": "video", "shard": "mine-000000.tar", "key": "day-0/clip-0", "reason": "too dark"}
    Path("runs/mine/bad_samples.jsonl").write_text(json.dumps(bad) + "\n")
    words = shlex.split(replaced(command), comments=True)
    assert cli.main(words[1:]) == 0
    if words[1] in ("runs", "compare"):
        assert "mine" in capsys.readouterr().out
    else:
        out = words[words.index("--out") + 1] if "--out" in words else "view.png"
        assert Path("runs/mine/report.html" if words[1:] == ["report", "runs/mine"] else out).stat().st_size > 10_000


def test_python_of_the_quickstart_gives_maps_of_a_clip(done, monkeypatch):
    folder, _ = done
    monkeypatch.chdir(folder)
    text = re.search(r"```python\n(.*?)```", (DOCS / "quickstart.md").read_text(), re.DOTALL)[1]
    names: dict = {}
    exec(replaced(text).replace("clip.mp4", "VIDEOS/day-0/clip-0.mp4"), names)
    assert names["maps"].shape == (1, 256, 4, 4, 4)


def test_notebook_runs_from_its_first_cell_to_its_last(done, monkeypatch, capsys):
    """Its cells' code in one process, as a kernel would run them."""
    folder, _ = done
    monkeypatch.chdir(folder)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    notebook = json.loads((EXAMPLES / "features_of_my_videos.ipynb").read_text())
    names: dict = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
    assert names["features"].shape == (6, 256) and names["places"].shape == (6, 2)
    assert Path("features.png").stat().st_size > 5_000
    assert "6 files" in capsys.readouterr().out


def test_examples_pretrain_on_a_folder_and_probe(done, tmp_path):
    folder, _ = done
    words = [str(folder / "VIDEOS"), str(tmp_path), *SHORTER]
    output = launch([str(EXAMPLES / "pretrain_on_a_folder.py"), *words], 1)
    assert (tmp_path / "run" / "report.html").is_file(), output
    words = [
        str(tmp_path / "run"),
        str(folder / "train"),
        str(folder / "test"),
        str(tmp_path / "few"),
        "data.workers=1",
    ]
    output = launch([str(EXAMPLES / "probe_on_folders.py"), *words], 1)
    assert json.loads((tmp_path / "few" / "probe" / "scores.json").read_text()), output


def test_example_accelerates_a_model_of_torchvision(monkeypatch, capsys):
    monkeypatch.syspath_prepend(EXAMPLES)
    difference = importlib.import_module("accelerate_torchvision").main()
    assert difference < 1e-4
    assert "12 replaced, 0 left" in capsys.readouterr().out
