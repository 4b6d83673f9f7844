"""Runs of test_custom_task.py on a disk that refuses some of what they write: `python -m tests.training.disk_runs DIR`.

What each came to is in DIR/ends.json: exit code, error, and what it printed.
"""

from __future__ import annotations

import builtins
import errno
import io
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.training.nonfinite_runs import run, with_train
from tests.training.test_custom_task import Regression, toy

# What cannot be written, by the run's name: a part of its path.
REFUSED = {
    "settings": "/config.json",
    "record": "/run.json",
    "console": "/console.log",
    "board": "/tensorboard",
    "bundle": "/nonfinite",
    "commit": "/checkpoints/.tmp-step-00000024",
    "export": "/.tmp-weights",
    "last": "/updates.json",  # of the task's `finish`, which foresees nothing
}
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


@contextmanager
def refusing(part: str, code: int = errno.ENOSPC) -> Iterator[None]:
    """Paths with this part in them cannot be opened for writing, made or renamed to inside the block."""
    real = {"open": builtins.open, "os_open": os.open, "mkdir": os.mkdir, "replace": os.replace}

    def check(path: Any) -> None:
        if isinstance(path, str | bytes | os.PathLike) and part in os.fsdecode(path):
            raise OSError(code, os.strerror(code), os.fsdecode(path))

    def opened(file: Any, mode: str = "r", *rest: Any, **more: Any) -> Any:
        if set(mode) & set("wax+"):
            check(file)
        return real["open"](file, mode, *rest, **more)

    def os_opened(path: Any, flags: int, *rest: Any, **more: Any) -> int:
        if flags & WRITES:
            check(path)
        return real["os_open"](path, flags, *rest, **more)

    def made(path: Any, *rest: Any, **more: Any) -> None:
        check(path)
        real["mkdir"](path, *rest, **more)

    def replaced(source: Any, target: Any, **more: Any) -> None:
        check(target)
        real["replace"](source, target, **more)

    builtins.open = io.open = opened
    os.open, os.mkdir, os.replace = os_opened, made, replaced
    try:
        yield
    finally:
        builtins.open = io.open = real["open"]
        os.open, os.mkdir, os.replace = real["os_open"], real["mkdir"], real["replace"]


@contextmanager
def removed_after(folder: Path, step: int) -> Iterator[None]:
    """The run's folder vanishes after that step."""
    usual = Regression.after_step

    def after_step(task: Regression) -> None:
        usual(task)
        if task.updates == step:
            task.setup.commits.wait()
            shutil.rmtree(folder)

    Regression.after_step = after_step
    try:
        yield
    finally:
        Regression.after_step = usual


def ended(work: Callable[[], tuple[int, str]]) -> list[Any]:
    """Exit code, error and output of a run; the code of one that ends in a traceback is its exception."""
    said = io.StringIO()
    before = sys.stdout, sys.stderr
    try:
        with redirect_stdout(said), redirect_stderr(said):
            code, error = work()
    except Exception as unforeseen:
        code, error = repr(unforeseen), ""
    finally:
        sys.stdout, sys.stderr = before
    return [code, error, said.getvalue()]


def main(folder: Path) -> None:
    ends = {}
    for name, part in REFUSED.items():
        config = with_train(toy(folder / name), steps=48, checkpoint_every=24)
        with refusing(f"{name}{part}"):
            ends[name] = ended(lambda config=config, name=name: run(config, (3,) if name == "bundle" else ()))
    again = replace(with_train(toy(folder / "export"), steps=48, checkpoint_every=24), resume="auto")
    ends["export again"] = ended(lambda: run(again))
    with removed_after(folder / "vanished", 20):
        ends["vanished"] = ended(lambda: run(with_train(toy(folder / "vanished"), checkpoint_every=8)))
    (folder / "ends.json").write_text(json.dumps(ends))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
