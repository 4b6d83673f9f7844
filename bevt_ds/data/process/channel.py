"""Messages between the trainer and its loader's process: small ones through a socket, arrays in memory that both have.

What is sent may be any value that pickle takes. Its arrays and tensors lie in a block of shared memory, and those that
arrive lie in that very block: nothing is copied. When none of them is left, the block is used again.
"""

from __future__ import annotations

import io
import mmap
import pickle
import socket
import struct
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
import torch

from bevt_ds.data.decoding.pool import SharedMemory

ALIGNED = 64  # bytes: at a multiple of them an array begins
_LENGTH = struct.Struct("<Q")  # of the pickled message that follows
_PART = 1 << 18  # bytes that are received at a time


class Channel:
    """One end of a socket. Threads may share it to send; one receives."""

    def __init__(self, end: socket.socket, seconds: float | None = None) -> None:
        """seconds: for which the other end may be silent while this one waits for it."""
        self._end, self._sending, self._receiving = end, threading.Lock(), threading.Lock()
        self._come, self._files = bytearray(), []  # of a message that is not whole
        end.settimeout(seconds)

    def send(self, message: Any, file: int | None = None) -> None:
        """Send a message, and a file with it, by its number. If the other end is gone, it is lost."""
        data = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
        data = _LENGTH.pack(len(data)) + data
        with suppress(OSError), self._sending:
            sent = socket.send_fds(self._end, [data], [] if file is None else [file])
            if sent < len(data):
                self._end.sendall(memoryview(data)[sent:])

    def receive(self) -> tuple[Any, int | None]:
        """The next message, and the number of the file that came with it.

        EOFError: the other end is gone, or this one is closed. TimeoutError: it is silent; another call goes on there.
        """
        with self._receiving:
            try:
                self._await(_LENGTH.size)
                (length,) = _LENGTH.unpack_from(self._come)
                self._await(_LENGTH.size + length)
            except TimeoutError:
                raise
            except OSError as error:
                raise EOFError from error
            data, files = self._come, self._files
            self._come, self._files = bytearray(), []
        return pickle.loads(memoryview(data)[_LENGTH.size :]), next(iter(files), None)

    def close(self) -> None:
        """Whoever receives, at either end, gets no more and waits no longer. Twice is harmless."""
        with suppress(OSError):
            self._end.shutdown(socket.SHUT_RDWR)
        with self._receiving:
            self._end.close()

    def _await(self, size: int) -> None:
        """Wait until so many bytes of a message have come."""
        while (rest := size - len(self._come)) > 0:
            data, files, *_ = socket.recv_fds(self._end, min(rest, _PART), 1)
            if not data:
                raise EOFError
            self._come += data
            self._files += files


class Placed(NamedTuple):
    """A message whose arrays lie in a block of shared memory."""

    data: bytes  # the message, pickled without them
    block: int  # its number
    capacity: int  # bytes of the block
    places: list[tuple[int, int]]  # where in it each array begins and ends
    dropped: list[int]  # blocks that will not be used any more


class _Pickler(pickle.Pickler):
    """Tensors as arrays, whose bytes pickle leaves where they are."""

    def reducer_override(self, value: Any) -> Any:
        return (torch.from_numpy, (value.numpy(),)) if isinstance(value, torch.Tensor) else NotImplemented


class Outbox:
    """Blocks of shared memory that messages are placed in."""

    def __init__(self) -> None:
        self._blocks: dict[int, SharedMemory] = {}
        self._capacities: dict[int, int] = {}  # of those that are free
        self._used: dict[int, int] = {}  # of those that are not
        self._made = 0

    def free(self, blocks: Sequence[int]) -> None:
        """The other end has no more use for what lies in these."""
        for block in blocks:
            self._capacities[block] = self._used.pop(block)

    def place(self, message: Any) -> tuple[Placed, int | None]:
        """Put a message's arrays into a block; the number of the block's file, if it is a new one."""
        stream, buffers, places, end = io.BytesIO(), [], [], 0
        _Pickler(stream, 5, buffer_callback=buffers.append).dump(message)
        arrays = [buffer.raw() for buffer in buffers]
        for array in arrays:
            begin = -(-end // ALIGNED) * ALIGNED
            end = begin + array.nbytes
            places.append((begin, end))
        block, file, dropped = self._block(end)
        room = memoryview(self._blocks[block].first(self._used[block]))
        for array, (begin, stop) in zip(arrays, places, strict=True):
            room[begin:stop] = array
        return Placed(stream.getvalue(), block, self._used[block], places, dropped), file

    def _block(self, size: int) -> tuple[int, int | None, list[int]]:
        """The smallest free block that is large enough, or a new one in the place of one that is not."""
        if enough := [block for block, capacity in self._capacities.items() if capacity >= size]:
            block = min(enough, key=self._capacities.__getitem__)
            self._used[block] = self._capacities.pop(block)
            return block, None, []
        dropped = list(self._capacities)[:1]
        for block in dropped:
            del self._capacities[block]
            self._blocks.pop(block).close()
        block, memory = self._made, SharedMemory()
        self._made += 1
        capacity = 1 << max(size - 1, mmap.PAGESIZE - 1).bit_length()  # sizes vary: few blocks fit all
        memory.grown(capacity)
        self._blocks[block], self._used[block] = memory, capacity
        return block, memory.number, dropped


class Inbox:
    """The same blocks at the other end.

    pin, unpin: called with the address and bytes of a block that comes, and with the address of one that goes, once
    nothing refers to it.
    """

    def __init__(self, pin: Callable[[int, int], object] = max, unpin: Callable[[int], object] = id) -> None:
        self._pin, self._unpin = pin, unpin
        self._blocks: dict[int, np.ndarray] = {}
        self._free: deque[int] = deque()  # no message is left in them

    def freed(self) -> list[int]:
        """The blocks that became free since the last call."""
        return [self._free.popleft() for _ in range(len(self._free))]

    def message(self, placed: Placed, file: int | None) -> Any:
        """What was sent. Its arrays keep the block from being used again for as long as one of them is there."""
        for block in placed.dropped:
            del self._blocks[block]
        if file is not None:
            memory = SharedMemory(file)
            self._blocks[placed.block] = block = memory.first(placed.capacity)
            memory.close()  # the file, not what is mapped of it
            self._pin(block.ctypes.data, block.nbytes)
            weakref.finalize(block.base, self._unpin, block.ctypes.data).atexit = False
        held = self._blocks[placed.block][:]  # for this message alone
        weakref.finalize(held, self._free.append, placed.block).atexit = False
        room = memoryview(held)
        return pickle.loads(placed.data, buffers=[room[begin:end] for begin, end in placed.places])
