"""log.jsonl and the same numbers for TensorBoard.

A line of log.jsonl that cannot be written ends the run; TensorBoard may fail, its numbers are in log.jsonl too.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from tqdm import tqdm

from bevt_ds.config.parse import config_fields, get_value
from bevt_ds.config.schema import TrainingConfig
from bevt_ds.data.reading.index import write_atomic
from bevt_ds.disk import cannot_write, write_all
from bevt_ds.runtime.distributed import Ranks
from bevt_ds.runtime.run_dir import LOG
from bevt_ds.runtime.run_record import now

BOARD = "tensorboard"


class RunLog:
    """log.jsonl and TensorBoard events of one run. Rank 0 writes. Collective.

    Raises:
        DiskError: log.jsonl cannot be written, or someone has removed it; on all ranks.
    """

    def __init__(self, folder: Path, ranks: Ranks, first_step: int):
        self._path, self._ranks, self._file, self._board = folder / LOG, ranks, None, None
        with ranks.writing(self._path):
            if ranks.is_main:
                keep_before(self._path, first_step)
                self._file = self._path.open("ab", buffering=0)
        if ranks.is_main:
            self._board = Board(folder / BOARD, first_step)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """One line for update number `step`, with the time in UTC (ISO 8601)."""
        with self._ranks.writing(self._path):
            if self._file:
                write_all(self._file, json.dumps({"step": step, "time": now(), **values}).encode() + b"\n")
                require_there(self._path, self._file.fileno())
        if self._board:
            self._board.write(step, values)

    def has(self, step: int, name: str) -> bool:
        """Whether log.jsonl has such a field of that step. Collective."""
        lines = map(json.loads, self._path.read_bytes().splitlines() if self._ranks.is_main else [])
        return bool(self._ranks.broadcast(any(line["step"] == step and name in line for line in lines)))

    def write_settings(self, config: TrainingConfig) -> None:
        """The configuration as TensorBoard's hyperparameters, next to the loss."""
        if self._board:
            self._board.write_settings(config)

    def write_image(self, step: int, path: Path) -> None:
        """An image file, if it is there, under the name of the file."""
        if self._board and path.exists():
            self._board.write_image(step, path)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._board:
            self._board.close()
        if self._file:
            self._file.close()


def require_there(path: Path, handle: int) -> None:
    """FileNotFoundError: an open file has lost its name, so that what is written into it is lost."""
    if os.fstat(handle).st_nlink == 0:
        raise FileNotFoundError(2, "it has been removed", str(path))


class Board:
    """TensorBoard's events. The first that cannot be written is the last, and is said in one line."""

    def __init__(self, folder: Path, first_step: int) -> None:
        self._folder, self._writer = folder, None
        _be_quiet()
        try:
            self._writer = SummaryWriter(str(folder), purge_step=first_step)
        except OSError as error:
            self._give_up(error)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """The numbers among the values of a log line."""
        for name, value in values.items():
            if isinstance(value, int | float):
                self._attempt(lambda w, name=name, value=value: w.add_scalar(name, value, step))

    def write_settings(self, config: TrainingConfig) -> None:
        """The configuration as hyperparameters, next to the loss."""
        values = {leaf.key: get_value(config, leaf.key) for leaf in config_fields(type(config))}
        plain = {key: str(value) if isinstance(value, tuple) else value for key, value in values.items()}
        for summary in hparams(plain, {"loss": 0.0}):  # add_hparams would begin a second run for them
            self._attempt(lambda w, summary=summary: w.file_writer.add_summary(summary))

    def write_image(self, step: int, path: Path) -> None:
        """An image file, under the name of the file."""
        pixels = np.asarray(Image.open(path).convert("RGB"))
        self._attempt(lambda w: w.add_image(path.stem, pixels, step, dataformats="HWC"))

    def close(self) -> None:
        """Write what is still in memory."""
        self._attempt(lambda w: w.close())

    def _attempt(self, work: Callable[[SummaryWriter], object]) -> None:
        """Give the writer to `work`, unless it has failed before."""
        if self._writer:
            try:
                work(self._writer)
            except OSError as error:
                self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        tqdm.write(f"{cannot_write(self._folder, error)} The run goes on without TensorBoard.")
        self._writer = None


def _be_quiet() -> None:
    """Keep the traceback of TensorBoard's own thread from the terminal: it raises again where it is called."""
    usual = threading.excepthook

    def hook(what: threading.ExceptHookArgs) -> None:
        ours = type(what.thread).__name__ == "_AsyncWriterThread" and isinstance(what.exc_value, OSError)
        if not ours:
            usual(what)

    threading.excepthook = hook


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
