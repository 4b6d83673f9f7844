"""`bevt report` and `bevt runs`: every number as logged, damage named, and the page as a browser shows it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bevt_ds import UserError, cli
from bevt_ds.config.parse import to_dict
from bevt_ds.config.recipes import demo
from bevt_ds.report.page import MOST_PANELS, MOST_ROWS, render, spread_evenly
from bevt_ds.report.run_files import read_run

STEPS = 30
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
PROBE = """<script>addEventListener("load", () => {
  const images = [...document.images].map(i => i.naturalWidth > 0);
  const too_wide = document.documentElement.scrollWidth > innerWidth;
  document.title = JSON.stringify({images, too_wide, charts: document.querySelectorAll("svg").length});
})</script>"""


def log_line(step: int) -> dict:
    line = {
        "step": step,
        "time": f"2026-01-01T00:00:{step:02d}+00:00",
        "loss": 9 - step / 7,
        "loss_video": 5 - step / 9,
    }
    line |= {
        "loss_video": 5 - step / 9,
        "loss_image": 4 - step / 11,
        "lr": 1e-3 / (step + 1),
        "grad_norm": 1.5,
        "data_wait": 0.01,
        "mfu": None,
    }
    return line | ({"waits_for": "decode: raise data.workers"} if step == 5 else {})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run that was killed once and finished, as its files lie on disk."""
    run = tmp_path / "run"
    (run / "panels").mkdir(parents=True)
    settings = to_dict(demo())
    settings["optim"]["lr"] = 0.5
    files = {
        "config.json": settings,
        "summary.json": {"video": {"loss": 2.5, "unigram_entropy": 3.25, "id_counts": [9, 4, 1]}},
        "changes.json": [{"step": 10, "key": "optim.lr", "from": 0.25, "to": 0.5}],
        "run.json": {
            "starts": [
                {"started": "2026-01-01", "first_step": 0, "command": "bevt pretrain", "versions": {"torch": "2.13"}},
                {"started": "2026-01-02", "first_step": 10, "outcome": "finished", "devices": ["cpu (x86_64)"]},
            ]
        },
    }
    for name, content in files.items():
        (run / name).write_text(json.dumps(content))
    (run / "log.jsonl").write_text("".join(json.dumps(log_line(step)) + "\n" for step in range(STEPS)))
    bad = [{"stream": "video", "shard": "a.tar", "key": key, "reason": "<no> frames"} for key in ("x", "x", "y")]
    (run / "bad_samples.jsonl").write_text("".join(json.dumps(event) + "\n" for event in bad))
    for name in ("panels/step-00000010.png", "panels/step-00000020.png", "samples.png"):
        Image.fromarray(np.full((8, 8, 3), 200, np.uint8)).save(run / name)
    commit = run / "checkpoints" / "step-00000020"
    commit.mkdir(parents=True)
    (commit / "manifest.json").write_text(json.dumps({"loss": 6.125}))
    return run


def test_report_shows_the_logged_numbers(folder):
    html = render([read_run(folder)])
    cells = re.findall(r'data-field="(\w+)" data-value="([^"]*)"', html)
    shown = spread_evenly(range(STEPS), MOST_ROWS)
    assert [json.loads(value) for name, value in cells if name == "step"] == shown
    for name in ("loss", "loss_video", "lr"):
        assert [json.loads(v) for n, v in cells if n == name] == [log_line(step)[name] for step in shown]


def test_report_page_contents(folder):
    html = render([read_run(folder)])
    assert "from step 10 on, optim.lr: 0.25 to 0.5" in html
    assert f">{demo().optim.lr}</td>" in html  # the recipe's value next to the run's
    assert "&lt;no&gt; frames" in html and "<no>" not in html
    assert re.search(r'<td class="n">2</td><td>&lt;no', html)  # each sample counts once
    assert "1 log line: decode: raise data.workers" in html
    assert "step-00000020" in html and "6.125" in html
    assert html.count("data:image/png;base64,") == 3
    assert "unigram, clips" in html and "Damaged" not in html
    assert not re.search(r'(?:src|href)="(?!data:|#)', html)  # nothing is fetched


def test_report_of_several_runs_shows_differing_settings_first(folder, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    settings = json.loads((other / "config.json").read_text())
    settings["train"]["seed"] = 77
    (other / "config.json").write_text(json.dumps(settings))
    html = render([read_run(folder), read_run(other)])
    table = html[html.index("Settings that differ") : html.index("Curves")]
    assert re.findall(r"<td>([\w.]+)</td>", table) == ["train.seed"]
    assert ">77<" in table
    assert "Loss: clips" in html and "Loss: images" in html


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("config.json", "{", "config.json is damaged"),
        ("summary.json", "[1]", "summary.json is damaged"),
        ("run.json", "{}", "run.json is damaged"),
        ("changes.json", "3", "changes.json is damaged"),
        ("log.jsonl", '{"step": 1}\nx\n[]\n{"st', "log.jsonl: 2 lines cannot be read"),
        ("checkpoints/step-00000020/manifest.json", "", "manifest.json is damaged"),
        ("checkpoints/step-00000020/manifest.json", '{"loss": []}', "manifest.json is damaged: its loss is no number"),
        ("summary.json", '{"video": {"id_counts": 3}}', "summary.json is damaged: video has no numbers"),
        ("changes.json", '[3, {"step": "x"}, {"step": 1}]', "changes.json: 2 entries cannot be read"),
        ("run.json", '{"starts": [7, {"devices": 1}, {"commit": null}]}', "run.json: 2 entries cannot be read"),
        ("panels/step-00000010.png", "half of it", "step-00000010.png is cut short and left out"),
        ("samples.png", "", "samples.png is cut short and left out"),
    ],
)
def test_report_names_damage_and_shows_the_rest(folder, name, content, said):
    (folder / name).write_text(content)
    run = read_run(folder)
    assert [problem for problem in run.damage if said in problem] == run.damage != []
    html = render([run])
    assert said in html and "Starts" in html or name == "run.json"


@pytest.mark.parametrize(
    "name", ["config.json", "log.jsonl", "run.json", "summary.json", "changes.json", "samples.png"]
)
@pytest.mark.parametrize("part", [0, 0.3, 0.5, 0.95])
def test_report_of_a_run_with_a_file_that_was_cut_anywhere(folder, name, part):
    """As a full disk or a lost machine leaves it; a line of the log that is being written is no damage."""
    content = (folder / name).read_bytes()
    content = content[: int(part * len(content))]
    (folder / name).write_bytes(content)
    (folder / "checkpoints" / "step-00000030").mkdir()  # a commit that has only begun
    run = read_run(folder)
    assert all(name in problem for problem in run.damage)
    assert run.damage or name == "log.jsonl"
    assert [commit.step for commit in run.commits] == [20]
    assert name != "log.jsonl" or run.rows == [json.loads(line) for line in content.splitlines() if line[-1:] == b"}"]
    assert "<h2>Curves</h2>" in render([run])


@pytest.mark.parametrize("kept", ["config.json", "log.jsonl", "run.json"])
def test_report_of_a_run_that_has_just_begun(folder, kept):
    for path in folder.iterdir():
        if path.name != kept:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert "<h2>Curves</h2>" in render([read_run(folder)])


def test_report_mistakes_are_named(folder, tmp_path, capsys):
    with pytest.raises(UserError, match="is not a run's folder"):
        read_run(tmp_path / "nothing")
    assert cli.main(["report", str(folder), "--out", str(tmp_path / "no" / "x.html")]) == 2
    assert "name another file with --out" in capsys.readouterr().err
    assert cli.main(["report", str(folder)]) == 0
    assert (folder / "report.html").stat().st_size > 10_000


def test_runs_lists_every_run_below_a_folder(folder, tmp_path, capsys):
    shutil.copytree(folder, tmp_path / "deep" / "er")
    (tmp_path / "deep" / "er" / "run.json").unlink()
    assert cli.main(["runs", str(tmp_path)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[:4] for line in lines[1:]] == [
        ["deep/er", "unknown", "demo", f"{STEPS}/{demo().train.steps}"],
        ["run", "finished", "demo", f"{STEPS}/{demo().train.steps}"],
    ]
    assert cli.main(["runs", str(tmp_path / "run" / "panels")]) == 2


def test_evenly_spread_points_keep_both_ends():
    assert spread_evenly(range(100), 4) == [0, 33, 66, 99]
    assert len(spread_evenly(range(100), MOST_PANELS)) == MOST_PANELS
    assert spread_evenly([1, 2], 4) == [1, 2]


@pytest.mark.parametrize("width", [390, 1200])
def test_report_page_in_a_browser_has_no_error_and_fits(folder, tmp_path, width):
    """A real headless browser: no console error, all images present, as wide as a phone's screen."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None and "CI" not in os.environ:
        pytest.skip("need a browser: one of " + ", ".join(BROWSERS))
    assert browser, "install chromium"
    page = tmp_path / "page.html"
    page.write_text(render([read_run(folder)]).replace("</body>", PROBE + "</body>"))
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", f"--window-size={width},900"]
    options += ["--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    done = subprocess.run([browser, *options, page.as_uri()], capture_output=True, text=True, timeout=300)
    found = json.loads(re.search(r"<title>(\{.*?\})</title>", done.stdout)[1])
    assert found["images"] == [True] * 3
    assert not found["too_wide"]
    assert found["charts"] >= 5
    assert "CONSOLE" not in done.stderr, done.stderr
