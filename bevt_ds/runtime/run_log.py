"""log.jsonl, and the same numbers for what else `log.to` names (loggers.py).

A line of log.jsonl that cannot be written ends the run; the others may fail, their numbers are in log.jsonl too.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm

from bevt_ds.config.parse import config_fields, get_value
from bevt_ds.config.schema import TrainingConfig
from bevt_ds.data.reading.index import write_atomic
from bevt_ds.disk import write_all
from bevt_ds.runtime.distributed import Ranks
from bevt_ds.runtime.loggers import BOARD, Logger, Outlet
from bevt_ds.runtime.run_dir import LOG
from bevt_ds.runtime.run_record import now


class RunLog:
    """log.jsonl of one run, and its other loggers. Rank 0 writes. Collective.

    to: names of loggers.

    Raises:
        DiskError: log.jsonl cannot be written, or someone has removed it; on all ranks.
    """

    def __init__(self, folder: Path, ranks: Ranks, first_step: int, to: Sequence[str] = (BOARD,)):
        self._path, self._ranks, self._file = folder / LOG, ranks, None
        self._outlets: list[Outlet] = []
        with ranks.writing(self._path):
            if ranks.is_main:
                keep_before(self._path, first_step)
                self._file = self._path.open("ab", buffering=0)
        if ranks.is_main:
            self._outlets = [Outlet(name, folder, first_step) for name in to]

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """One line for update number `step`, with the time in UTC (ISO 8601)."""
        line = json.dumps({"step": step, "time": now(), **values}).encode() + b"\n"
        with self._ranks.writing(self._path, len(line)):
            if self._file:
                write_all(self._file, line)
                require_there(self._path, self._file.fileno())
        numbers = {name: value for name, value in values.items() if isinstance(value, int | float)}
        self._give(lambda logger: logger.write(step, numbers))

    def has(self, step: int, name: str) -> bool:
        """Whether log.jsonl has such a field of that step. Collective."""
        found = False
        with self._ranks.writing(self._path):
            if self._ranks.is_main:
                lines = map(json.loads, self._path.read_bytes().splitlines())
                found = any(line["step"] == step and name in line for line in lines)
        return bool(self._ranks.broadcast(found))

    def write_settings(self, config: TrainingConfig) -> None:
        """The configuration, to the loggers next to log.jsonl."""
        settings = {leaf.key: get_value(config, leaf.key) for leaf in config_fields(type(config))}
        self._give(lambda logger: logger.write_settings(settings))

    def write_image(self, step: int, path: Path) -> None:
        """An image file, if it is there, under the name of the file."""
        if path.exists():
            self._give(lambda logger: logger.write_image(step, path))

    def _give(self, work: Callable[[Logger], None]) -> None:
        for outlet in self._outlets:
            outlet.give(work)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._give(lambda logger: logger.close(failed=error is not None))
        if self._file:
            self._file.close()


def require_there(path: Path, handle: int) -> None:
    """FileNotFoundError: an open file has lost its name, so that what is written into it is lost."""
    if os.fstat(handle).st_nlink == 0:
        raise FileNotFoundError(2, "it has been removed", str(path))


def keep_before(path: Path, step: int) -> None:
    """Drop the lines of steps that a resumed run is about to repeat, and damaged ones, which are named.

    A line that a kill has cut, at the end, goes without a word.
    """
    if not path.exists():
        return
    kept = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        if not line.endswith(b"\n"):
            continue
        if (found := _step_of(line)) is None:
            tqdm.write(f"{path}: line {number} is damaged and is dropped: {line[:60]!r}")
        elif found < step:
            kept.append(line)
    write_atomic(path, b"".join(kept))


def _step_of(line: bytes) -> int | None:
    """The step of a line of log.jsonl; None: it is no such line."""
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return None
    step = values.get("step") if isinstance(values, dict) else None
    return step if type(step) is int else None
