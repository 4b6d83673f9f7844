"""Progress bars: redrawn on a terminal; in a file or a pipe, a line now and then."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any, TextIO, TypeVar

from tqdm import tqdm

BETWEEN_LINES = 30.0  # seconds

T = TypeVar("T")


def progress_bar(items: Iterable[T], **options: Any) -> tqdm[T]:
    """tqdm over `items`, with tqdm's options."""
    if not sys.stderr.isatty():
        options |= {
            "file": Lines(sys.stderr),
            "mininterval": BETWEEN_LINES,
            "maxinterval": BETWEEN_LINES,
            "leave": True,
        }
    return tqdm(items, **options)


class Lines:
    """What tqdm takes for a terminal; every state of the bar becomes a line of its own."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        """tqdm overwrites with carriage returns and blanks."""
        if state := text.strip():
            self._stream.write(f"{state}\n")

    def flush(self) -> None:
        self._stream.flush()
