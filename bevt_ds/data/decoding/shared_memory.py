"""Memory that a decode worker fills and its parent reads, so that pixels do not go through a pipe. Linux only."""

from __future__ import annotations

import fcntl
import mmap
import os

import numpy as np


class SharedMemory:
    """Anonymous memory of two processes: one makes it, the other opens it by the number of its inherited file.

    It only ever grows. The kernel holds the writer to that too: were it to shrink, the reader would be killed.
    """

    def __init__(self, number: int | None = None) -> None:
        if number is None:
            number = os.memfd_create("pixels", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            fcntl.fcntl(number, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        self.number = number
        self._bytes = np.empty(0, np.uint8)

    def grown(self, size: int) -> np.ndarray:
        """The first `size` bytes, made if they are not there: uint8 (size,). For the process that writes."""
        if size > os.fstat(self.number).st_size:
            os.ftruncate(self.number, size)
        return self.first(size)

    def first(self, size: int) -> np.ndarray:
        """The first `size` bytes: uint8 (size,). ValueError: there are fewer."""
        if size > len(self._bytes):
            self._bytes = np.frombuffer(mmap.mmap(self.number, size), np.uint8)
        return self._bytes[:size]

    def close(self) -> None:
        """Give up the file. Arrays that are still in use keep their memory."""
        self._bytes = np.empty(0, np.uint8)
        os.close(self.number)
