"""`bevt runs [FOLDER]`: every run below a folder, a line each: state, step, losses, speed."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

from bevt_ds.config.files import CONFIG
from bevt_ds.errors import UserError
from bevt_ds.folders import CHECKPOINTS, LOG
from bevt_ds.report.compare import aligned, number
from bevt_ds.report.run_files import Run, read_run

COLUMNS = ("run", "state", "recipe", "step", "loss", "clips/s", "images/s", "data wait", "last line")


def main(argv: Sequence[str]) -> int:
    """Print the table; returns the exit code."""
    parser = argparse.ArgumentParser(prog="bevt runs", description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("runs"), help="default: %(default)s")
    folder = parser.parse_args(argv).folder
    found = [read_run(path) for path in run_folders(folder)]
    if not found:
        raise UserError(f"{folder}: there is no run in it. Name the folder that holds them: bevt runs FOLDER.")
    print(aligned([COLUMNS, *(line(run, folder) for run in found)]))
    for problem in (problem for run in found for problem in run.damage):
        print(f"damaged: {problem}")
    return 0


def run_folders(folder: Path) -> Iterator[Path]:
    """Folders that a run has written to, in order of their paths; what lies inside one of them is not looked at."""
    if (folder / CONFIG).is_file() and ((folder / LOG).exists() or (folder / CHECKPOINTS).is_dir()):
        yield folder
    elif folder.is_dir():
        for inner in sorted(path for path in folder.iterdir() if path.is_dir() and not path.is_symlink()):
            yield from run_folders(inner)


def line(run: Run, below: Path) -> list[str]:
    """The cells of a run."""
    name = str(run.folder.relative_to(below)) if run.folder != below else run.name
    target = run.settings.get("train.steps") or "?"
    last = run.last
    values = [number(last.get(key)) for key in ("loss", "clips_per_s", "images_per_s", "data_wait", "time")]
    return [name, run.state, str(run.settings.get("recipe", "-")), f"{run.steps_done}/{target}", *values]
