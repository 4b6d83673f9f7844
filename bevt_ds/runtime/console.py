"""console.log: what a run prints, kept in its folder without the redraws of progress bars."""

from __future__ import annotations

import io
import logging
import sys
from pathlib import Path
from typing import Any, TextIO

from bevt_ds.disk import cannot_write, write_all

CONSOLE = "console.log"


class Tee:
    """A standard stream whose lines also go into a file, as a terminal shows them once they are complete."""

    def __init__(self, stream: TextIO, log: io.FileIO | None) -> None:
        self.stream, self._log, self._line = stream, log, ""

    def write(self, text: str) -> int:
        *complete, rest = (self._line + text).split("\n")
        for line in complete:
            shown = _on_screen(line)
            if shown or "\r" not in line:
                self._keep(f"{shown}\n")
        self._line = f"\r{_on_screen(rest)}" if "\r" in rest else rest  # a bar is drawn thousands of times
        return self.stream.write(text)

    def _keep(self, line: str) -> None:
        """Write a line to the file; the first that cannot be written ends it, and is said."""
        if self._log:
            try:
                write_all(self._log, line.encode())
            except OSError as error:
                self.stream.write(f"{cannot_write(Path(self._log.name), error)} The run goes on without it.\n")
                self._log = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def _on_screen(line: str) -> str:
    """What is seen of a line in the end: what follows its last carriage return."""
    return line.rstrip("\r").rpartition("\r")[2].rstrip()


def keep_console(folder: Path) -> None:
    """From now on, to the end of this process, put everything that it prints into console.log of a run's folder.

    So a message that ends the run is in there too. Only what Python writes is: a crash of C code speaks past it.
    """
    path, log = folder / CONSOLE, None
    try:
        log = path.open("ab", buffering=0)
    except OSError as error:
        print(f"{cannot_write(path, error)} The run goes on without it.", flush=True)
    before = sys.stdout, sys.stderr
    plain = [stream.stream if isinstance(stream, Tee) else stream for stream in before]
    sys.stdout, sys.stderr = (Tee(stream, log) for stream in plain)
    _follow(dict(zip(before, (sys.stdout, sys.stderr), strict=True)))


def _follow(streams: dict[Any, Tee]) -> None:
    """Point the handlers of loggers, which hold a stream from when they were made, to its successor."""
    loggers = [logging.root, *logging.root.manager.loggerDict.values()]
    for logger in loggers:
        for handler in getattr(logger, "handlers", ()):
            if isinstance(handler, logging.StreamHandler) and handler.stream in streams:
                handler.setStream(streams[handler.stream])
