"""Processes forked from one that has imported torch and DeepSpeed already: the imports take longer than a small run.

`python -m tests.training.preloaded` is that one. It reads JSON lines: {"start": ARGUMENTS, "env": {}, "output": FILE}
is answered with a pid, {"poll": PID} with an exit code or null. What is started runs as `python ARGUMENTS` would, but
for its imports.
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
IMPORTS = (
    "bevt_ds.train.pretraining",
    "bevt_ds.train.finetuning",
    "deepspeed.runtime.zero.muon.muon_optimizer",  # imports torch._inductor; every engine imports it
    "torch.utils.tensorboard",
    "matplotlib.backends.backend_agg",
)


class Template:
    """The process that has the imports. It ends when its standard input closes, with this process at the latest."""

    def __init__(self, env: Mapping[str, str]) -> None:
        command = [sys.executable, "-m", "tests.training.preloaded"]
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.outputs = tempfile.TemporaryDirectory()
        atexit.register(self.process.stdin.close)

    def ask(self, **request: Any) -> Any:
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


template = cache(lambda: Template(os.environ | {"OMP_NUM_THREADS": "1"}))


class Forked:
    """As much of `subprocess.Popen` as the tests use; standard output and error are one text."""

    def __init__(self, arguments: Sequence[str], env: Mapping[str, str]) -> None:
        handle, name = tempfile.mkstemp(dir=template().outputs.name)
        os.close(handle)
        self.output = Path(name)
        self.pid = template().ask(start=arguments, env=env, output=name)
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = template().ask(poll=self.pid)
        return self.returncode

    def communicate(self, timeout: float = 60) -> tuple[str, None]:
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("forked", timeout, self.output.read_text())
            time.sleep(0.02)
        return self.output.read_text(), None

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def become(arguments: Sequence[str], env: Mapping[str, str], output: str) -> None:
    """In a fork: the rest of the process is `python ARGUMENTS`."""
    for number, path, flags in ((0, os.devnull, os.O_RDONLY), (1, output, os.O_WRONLY), (2, output, os.O_WRONLY)):
        os.dup2(os.open(path, flags | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(env)
    try:
        if arguments[0] == "-m":
            sys.argv = list(arguments[1:])
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = list(arguments)
            sys.path[0] = str(Path(arguments[0]).parent.resolve())
            runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as end:
        leave(end.code)
    leave(0)


def leave(code: int | str | None) -> None:
    """Exit as Python does, but for taking all modules apart: of a fork that takes longer than a small run."""
    if isinstance(code, str):
        print(code, file=sys.stderr)
    threading._shutdown()  # waits for threads
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1 if isinstance(code, str) else code or 0)


def exit_code(pid: int) -> int | None:
    """As Popen gives it, minus the signal's number for a killed one; None while it runs."""
    ended, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if ended else None


def serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the imports print is no answer
    for name in IMPORTS:
        importlib.import_module(name)
    for line in sys.stdin:
        request = json.loads(line)
        if "poll" in request:
            answer = exit_code(request["poll"])
        elif not (answer := os.fork()):
            answers.close()
            return become(request["start"], request["env"], request["output"])
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    serve()
