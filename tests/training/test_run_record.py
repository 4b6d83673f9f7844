"""run.json, console.log, TensorBoard settings and images, peak memory."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
from datetime import datetime
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from bevt_ds.config.recipes import get_recipe
from bevt_ds.errors import UserError
from bevt_ds.runtime.checkpoint import Facts
from bevt_ds.runtime.console import Tee
from bevt_ds.runtime.continuing import print_changes
from bevt_ds.runtime.logging import peak_bytes
from bevt_ds.runtime.run_log import RunLog
from bevt_ds.runtime.run_record import RunRecord, commit_of, read_record, versions
from tests.downstream.worlds import ALONE
from tests.training.processes import environment


def test_run_json_appends_each_start(tmp_path):
    weights = tmp_path / "encoder.pkl"
    weights.write_bytes(b"weights")
    with pytest.raises(KeyboardInterrupt), RunRecord(tmp_path, ALONE, 0, {"tokenizer": str(weights), "teacher": ""}):
        (going,) = read_record(tmp_path / "run.json")
        assert "ended" not in going
        raise KeyboardInterrupt
    with RunRecord(tmp_path, ALONE, 4):
        pass
    first, second = json.loads((tmp_path / "run.json").read_text())["starts"]
    assert (first["outcome"], second["outcome"]) == ("KeyboardInterrupt", "finished")
    assert (first["first_step"], second["first_step"], second["ranks"]) == (0, 4, 1)
    assert first["tokenizer"] == {"file": str(weights), "sha256": hashlib.sha256(b"weights").hexdigest()}
    assert "tokenizer" not in second
    assert {"bevt_ds", "torch", "deepspeed", "python"} <= set(second["versions"])
    assert second["command"] and second["hosts"] and second["devices"][0].startswith("cpu")
    assert datetime.fromisoformat(first["started"]) <= datetime.fromisoformat(second["ended"])
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(UserError, match="run.json is damaged"):
        RunRecord(tmp_path, ALONE, 4)


def test_other_versions_than_those_of_a_checkpoint_are_told(tmp_path, capsys):
    """Of its run's starts, the one that committed it counts: not one that began at its step or later."""
    folder = tmp_path / "checkpoints" / "step-00000004"
    here, start = versions(), (folder, Facts(4, 1, 2, get_recipe("demo"), "abc", {}))
    old = here | {"torch": "1.0", "deepspeed": "0.1", "system": "another", "gone": "3"}
    starts = [(0, here | {"torch": "0.9"}), (2, old), (4, here)]
    record = {"starts": [{"first_step": step, "versions": of} for step, of in starts]}
    (tmp_path / "run.json").write_text(json.dumps(record))
    print_changes((), start)
    torch_line = f"deepspeed 0.1 -> {here['deepspeed']}, torch 1.0 -> {here['torch']}"
    assert capsys.readouterr().out == f"warning: other versions than those that committed step 4: {torch_line}\n"
    for text in (json.dumps({"starts": [record["starts"][2]]}), "{", '{"starts": [1]}', '{"starts": [{}]}'):
        (tmp_path / "run.json").write_text(text)
        print_changes((), start)
        assert capsys.readouterr().out == ""
    (tmp_path / "run.json").unlink()
    print_changes((), start)
    assert capsys.readouterr().out == ""


def test_other_ranks_write_no_run_record(tmp_path):
    gathered = SimpleNamespace(is_main=False, device=torch.device("cpu"), gather=lambda value: [value] * 2, world=2)
    with RunRecord(tmp_path, gathered, 0):
        pass
    assert list(tmp_path.iterdir()) == []


def test_run_record_names_the_commit_of_a_checkout(tmp_path):
    assert commit_of(tmp_path) is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    (tmp_path / "file").write_text("one")
    for words in (["init", "-q"], ["add", "file"], ["commit", "-q", "-m", "one"], ["tag", "v1"]):
        subprocess.run([*git, *words], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    assert commit_of(tmp_path) == head
    (tmp_path / "file").write_text("two")
    assert commit_of(tmp_path) == f"{head}-dirty"


def test_console_log_keeps_what_a_terminal_shows():
    screen, log = io.StringIO(), io.BytesIO()
    tee = Tee(screen, log)
    written = [
        "one\ntw",
        "o\n",
        "\r 10%|#  ",
        "\r 20%|## ",
        "\r        \r",
        "said\n",
        "\r 50%",
        "\r100%",
        "\n",
        "\n",
        "end\n",
    ]
    for text in written:
        tee.write(text)
    assert screen.getvalue() == "".join(written)
    assert log.getvalue().decode() == "one\ntwo\nsaid\n100%\n\nend\n"
    assert tee.isatty() is False


def test_console_log_gets_all_streams_and_loggers(tmp_path):
    code = """
import logging, sys
from pathlib import Path
handler = logging.StreamHandler(sys.stdout)
logging.getLogger("of a library").addHandler(handler)
from bevt_ds.runtime.console import keep_console
keep_console(Path(sys.argv[1])); keep_console(Path(sys.argv[1]))
print("printed"); print("warned", file=sys.stderr); logging.getLogger("of a library").warning("logged")
raise ValueError("of a bug")
"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path], env=environment(), capture_output=True, text=True)
    lines = (tmp_path / "console.log").read_text().splitlines()
    assert lines[:3] == ["printed", "warned", "logged"]
    assert lines[-1] == "ValueError: of a bug"
    assert done.stdout.splitlines() == ["printed", "logged"]
    assert done.stderr.splitlines()[-1] == lines[-1]


def test_tensorboard_gets_settings_and_images(tmp_path):
    Image.new("RGB", (8, 4), (255, 0, 0)).save(tmp_path / "samples.png")
    with RunLog(tmp_path, ALONE, 0) as log:
        log.write_settings(get_recipe("demo"))
        log.write(3, {"loss": 1.5, "mfu": None})
        log.write_image(3, tmp_path / "samples.png")
        log.write_image(3, tmp_path / "none.png")
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(image.step, image.width, image.height) for image in events.Images("samples")] == [(3, 8, 4)]
    assert events.Tags()["images"] == ["samples"]
    settings = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    assert b"optim.lr" in settings and b"demo" in settings
    (line,) = map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines())
    assert datetime.fromisoformat(line.pop("time")).tzinfo
    assert line == {"step": 3, "loss": 1.5, "mfu": None}


def test_peak_memory_grows_with_what_is_held():
    before = peak_bytes(torch.device("cpu"))
    held = torch.ones(before // 4 + (64 << 20))  # 4 bytes each: more than the process has ever had
    assert peak_bytes(torch.device("cpu")) > max(before, held.nbytes - 1)
