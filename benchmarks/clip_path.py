"""How much of the project's code one clip crosses, from its shard to the hands of the training step.

`python -m benchmarks.clip_path` draws a few videos, starts the loader on them and, once it runs steadily, notes each
function of this project that any thread of the trainer's process or its decode worker enters while batches are taken.
It prints the functions by file and the kinds of thread that ran them; with `--functions`, `--files` or `--threads` it
fails where there are more. `--shards` reads other videos, with the clip of the recipe.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any
from unittest.mock import patch

ROOT = Path(__file__).parents[1]
PROJECT = tuple(f"{ROOT / folder}{os.sep}" for folder in ("bevt_ds", "kernels"))
WORKER = "decode worker"  # a process of its own: its threads are not the trainer's
VIDEOS, WARM_UP, RECORDED = 64, 4, 4  # micro-batches of four clips: all within one epoch, with those prepared ahead


@dataclass(frozen=True, order=True)
class Call:
    """A function of the project, and one kind of thread that entered it."""

    file: str  # from the root of the repository
    function: str  # qualified name
    thread: str  # kind of thread, or WORKER


class Recorder:
    """A profile hook that writes each call once to a file of its process, while `folder/recording` exists."""

    def __init__(self, folder: Path) -> None:
        self._flag, self._seen = str(folder / "recording"), set()
        self._file = (folder / f"calls-{os.getpid()}").open("a", buffering=1, encoding="utf-8")

    def install(self) -> None:
        """In this thread and those that start later."""
        threading.setprofile(self)
        sys.setprofile(self)

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event != "call" or not code.co_filename.startswith(PROJECT):
            return
        key = code, threading.get_ident()
        if key not in self._seen and os.path.exists(self._flag):
            self._seen.add(key)
            self._file.write(f"{code.co_filename}\t{code.co_qualname}\t{threading.current_thread().name}\n")


def calls(folder: Path) -> set[Call]:
    """What all processes have written. Comprehensions and generator expressions are no functions of their own."""
    found = set()
    for path in folder.glob("calls-*"):
        is_worker = path.name != f"calls-{os.getpid()}"
        for line in path.read_text(encoding="utf-8").splitlines():
            file, function, thread = line.split("\t")
            if not function.endswith(("comp>", "genexpr>", "module>")):
                kind = WORKER if is_worker else _kind(thread)
                found.add(Call(str(Path(file).relative_to(ROOT)), function, kind))
    return found


def _kind(thread: str) -> str:
    """A thread's name without its number and its pool's."""
    return re.sub(r"[-_ ]?\d+(_\d+)?( \(\w+\))?$", "", thread)


@contextmanager
def _hooked(folder: Path) -> Iterator[None]:
    """Processes and threads that start in this block are recorded."""
    hook = f"from benchmarks.clip_path import Path, Recorder\nRecorder(Path({str(folder)!r})).install()\n"
    (folder / "sitecustomize.py").write_text(hook)  # which the decode worker imports at its start
    paths = [str(folder), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    with patch.dict(os.environ, {"PYTHONPATH": os.pathsep.join(paths)}):
        Recorder(folder).install()
        try:
            yield
        finally:
            sys.setprofile(None)
            threading.setprofile(None)


def clip_path(videos: str) -> set[Call]:
    """The calls of a few micro-batches in steady state. videos: a pattern of shards with 64 videos or more."""
    from bevt_ds.config.recipes import get_recipe
    from bevt_ds.data.loader import Loader

    config = get_recipe("demo")
    config = replace(
        config,
        data=replace(config.data, videos=videos, images=""),
        train=replace(config.train, global_images=0, micro_images=0),
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with _hooked(folder), Loader(config) as loader:
            batches = iter(loader)
            for number in range(WARM_UP + RECORDED):
                if number == WARM_UP:
                    (folder / "recording").touch()
                next(batches)
            (folder / "recording").unlink()
        return calls(folder)


def drawn_shards(folder: Path) -> str:
    """The pattern of shards of drawn videos, made in `folder`."""
    from bevt_ds.shards.pack import pack
    from bevt_ds.shards.synthetic.draw import draw

    draw(folder / "media", VIDEOS, 0)
    pack(folder / "media", folder, "video", "drawn")
    return str(folder / "drawn-*.tar")


def report(found: set[Call]) -> str:
    """Functions by file, kinds of thread and the three counts, as text."""
    files, threads = defaultdict(set), defaultdict(set)
    for call in found:
        files[call.file].add(call.function)
        threads[call.thread].add((call.file, call.function))
    lines = [f"{file} ({len(functions)}): {', '.join(sorted(functions))}" for file, functions in sorted(files.items())]
    lines += [f"{name}: {len(functions)} functions" for name, functions in sorted(threads.items())]
    return "\n".join([*lines, ", ".join(f"{number} {what}" for what, number in counts(found).items())])


def counts(found: set[Call]) -> dict[str, int]:
    """Functions and files of both processes, and kinds of thread in the trainer's."""
    return {
        "functions": len({(call.file, call.function) for call in found}),
        "files": len({call.file for call in found}),
        "threads": len({call.thread for call in found} - {WORKER}),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", help="pattern of shards with 64 videos or more; default: drawn ones")
    for what in ("functions", "files", "threads"):
        parser.add_argument(f"--{what}", type=int, help=f"the most {what} allowed")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = clip_path(arguments.shards or drawn_shards(Path(folder)))
    print(report(found))
    limits = {what: getattr(arguments, what) for what in counts(found)}
    return int(any(limit is not None and counts(found)[what] > limit for what, limit in limits.items()))


if __name__ == "__main__":
    sys.exit(main())
