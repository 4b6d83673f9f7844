"""Decode workers: started, given a deadline for each sample, and replaced when they hang, die or grow."""

from __future__ import annotations

import fcntl
import json
import math
import mmap
import os
import queue
import select
import struct
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bevt_ds.data.decoding import subprocess_env
from bevt_ds.data.decoding.geometry import Crop
from bevt_ds.data.limits import BadSample, DecoderFailed, Limits
from bevt_ds.errors import UserError

ATTEMPTS = 2  # a worker may hang or die for reasons that are not the sample's: memory, a stray signal
MOST_RESIDENT = 2 << 30  # bytes; a worker that holds more is replaced
START_SECONDS = 120.0  # in which a process that begins must get on, and of computing before it is ready
LENGTH = struct.Struct("<I")  # bytes of the JSON with which an answer begins
READY = LENGTH.pack(0)  # what a worker says when it has started
_PIPE_BYTES = 1 << 20

Reply = dict[str, Any]


class WorkerDied(Exception):
    """The worker's pipe closed before its answer was whole. The message is the end of its stderr."""


class CannotStart(UserError, RuntimeError):
    """No decode worker can start on this machine, whatever the sample."""


class SharedMemory:
    """Anonymous memory that a worker fills and its parent reads, so that pixels do not go through a pipe. Linux only.

    The parent makes it, the worker opens it by the number of its inherited file. It only ever grows. The kernel holds
    the writer to that too: were it to shrink, the reader would be killed.
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


class DecodeWorker:
    """One decoder process, its pipes, and the memory that it writes pixels to."""

    def __init__(self) -> None:
        self.memory = SharedMemory()
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        with subprocess_env.deaf_at_first():
            self.process = subprocess.Popen(
                subprocess_env.command("bevt_ds.data.decoding.worker", str(self.memory.number)),
                env=subprocess_env.environment(),
                pass_fds=[self.memory.number],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._stderr,
                bufsize=0,
            )
        self._started = False
        self._inlet, self._outlet = self.process.stdin.fileno(), self.process.stdout.fileno()
        self._writable, self._readable = select.poll(), select.poll()
        self._writable.register(self._inlet, select.POLLOUT)
        self._readable.register(self._outlet, select.POLLIN)
        os.set_blocking(self._inlet, False)  # a worker that is stopped must not stop its parent
        for pipe in (self._inlet, self._outlet):
            with suppress(OSError):  # the system may allow no more than its default
                fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)

    @property
    def pid(self) -> int:
        return self.process.pid

    def ask(self, request: dict[str, Any], data: bytes, seconds: float) -> tuple[Reply, np.ndarray]:
        """The answer to a request about the file `data`, and the bytes that came with it: uint8 (n,).

        TimeoutError: once started, no answer within `seconds`. WorkerDied: there will be none. CannotStart.
        """
        if not self._started:
            self._await_start()
        deadline = time.monotonic() + seconds
        line = json.dumps({**request, "size": len(data), "seconds": seconds}).encode() + b"\n"
        for part in (line, data):
            self._write(part, deadline)
        # A line's end would have to be looked for byte by byte: the JSON comes behind its length.
        (length,) = LENGTH.unpack(self._read(LENGTH.size, deadline))
        reply = json.loads(self._read(length, deadline).tobytes())
        return reply, self._read(reply["size"], deadline)

    def kill(self) -> None:
        """End the process at once; it holds nothing that needs saving."""
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        """End the process and release its pipes."""
        self.kill()
        self.process.stdin.close()
        self.process.stdout.close()
        self._stderr.close()
        self.memory.close()

    def _await_start(self) -> None:
        """Wait until the program runs. One that fails before it has seen a file is no fault of the file.

        On a machine that is overloaded its imports may take minutes: it is given up only where it computes no more.
        """
        try:
            while not self._is_ready():
                pass
        except WorkerDied as death:
            if self.process.wait() > 0:  # it exited by itself; a signal may have come from anywhere
                *_, last = str(death).splitlines() or ["no message"]
                raise CannotStart(
                    f"decode workers cannot start: {last}. `bevt doctor` looks at the machine."
                ) from death
            raise
        self._started = True

    def _is_ready(self) -> bool:
        """Whether it says so, before START_SECONDS are over. CannotStart: it has got no further, or not far enough."""
        before = cpu_seconds(self.pid)
        try:
            self._read(len(READY), time.monotonic() + START_SECONDS)
        except TimeoutError as error:
            now = cpu_seconds(self.pid)
            if before < now <= START_SECONDS:
                return False
            why = f"got no further for {START_SECONDS:g} s. Is the disk with the Python environment readable?"
            if now > START_SECONDS:
                why = (
                    f"computed for more than {START_SECONDS:g} s and is not ready."
                    " `python -X importtime -c 'import bevt_ds.data.decoding.worker'` shows which import takes so long."
                )
            raise CannotStart(f"decode workers cannot start: process {self.pid} {why}") from error
        return True

    def _death(self) -> WorkerDied:
        """The error of a pipe that has closed, with the end of what the worker wrote to its standard error."""
        size = self._stderr.seek(0, os.SEEK_END)
        self._stderr.seek(max(size - 2000, 0))
        return WorkerDied(self._stderr.read().decode(errors="replace").strip())

    def _write(self, data: bytes, deadline: float) -> None:
        rest = memoryview(data)
        while len(rest):
            _wait(self._writable, deadline)
            try:
                rest = rest[os.write(self._inlet, rest) :]
            except BlockingIOError:
                continue
            except BrokenPipeError as error:
                raise self._death() from error

    def _read(self, size: int, deadline: float) -> np.ndarray:
        """The next bytes: uint8 (size,)."""
        data = np.empty(size, dtype=np.uint8)
        rest = memoryview(data)
        while len(rest):
            _wait(self._readable, deadline)
            got = self.process.stdout.readinto(rest)
            if not got:
                raise self._death()
            rest = rest[got:]
        return data


def cpu_seconds(process: int) -> float:
    """What a process has computed so far, in seconds of one core; 0 where there is none."""
    with suppress(OSError):
        fields = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return 0.0


def _wait(poll: select.poll, deadline: float) -> None:
    if not poll.poll(max(deadline - time.monotonic(), 0) * 1000):
        raise TimeoutError


class Decoded(NamedTuple):
    """Clips of one video, in the memory of the worker that decoded them."""

    frames: np.ndarray  # uint8 (n,H,W,3)
    places: np.ndarray  # int64 (k,F): which of them are each clip's
    reply: Reply  # see worker.clips

    def copied(self) -> np.ndarray:
        """The frames of every clip, in memory of their own: uint8 (k,F,H,W,3)."""
        return self.frames[self.places]


class DecodePool:
    """`workers` decoder processes, each for one thread at a time; other threads wait for one.

    seconds: the deadline for one attempt at a sample. Once closed, every call raises CancelledError.
    """

    def __init__(self, workers: int, seconds: float, limits: Limits) -> None:
        self.seconds, self._limits, self._closed = seconds, asdict(limits), False
        self._count, self._workers = workers, {DecodeWorker() for _ in range(workers)}
        self._idle: queue.SimpleQueue[DecodeWorker | None] = queue.SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)

    @property
    def pids(self) -> list[int]:
        return [worker.pid for worker in self._workers]

    @contextmanager
    def clips(
        self,
        data: bytes,
        positions: Sequence[Sequence[float]],
        frames: int,
        stride: int,
        choice: str = "clip",
        crops: Sequence[Crop] | None = None,
    ) -> Iterator[Decoded]:
        """Clips of the video `data`, decoded together. Their memory is the worker's again when the block ends.

        positions: where each clip lies, as `choice` takes it: one of plan.CHOICES. crops: the part of each clip
        that a cubic resize needs; pixels elsewhere are arbitrary. BadSample: they cannot be decoded.
        """
        clip = {"choice": choice, "positions": positions, "frames": frames, "stride": stride, "crops": crops}
        with self._answered(data, {"work": "clips", **clip}) as (worker, reply, _):
            shape = reply["shape"]
            yield Decoded(worker.memory.first(math.prod(shape)).reshape(shape), np.asarray(reply["places"]), reply)

    def ask(self, data: bytes, request: dict[str, Any]) -> tuple[Reply, np.ndarray]:
        """Any other work of worker.py on the file `data`: the reply, and the bytes that came with it. BadSample."""
        with self._answered(data, request) as (_, reply, payload):
            return reply, payload

    def describe(self, data: bytes) -> Reply:
        """The fields of VideoInfo, from the packets' headers and the first frame. BadSample."""
        return self.ask(data, {"work": "describe", "kind": "video"})[0]

    def close(self) -> None:
        """End every worker. Threads that wait for one, or for its answer, wait no longer."""
        self._closed = True
        for worker in list(self._workers):
            worker.kill()
        for _ in range(self._count):
            self._idle.get().close()
        self._idle.put(None)

    @contextmanager
    def _answered(self, data: bytes, request: dict[str, Any]) -> Iterator[tuple[DecodeWorker, Reply, np.ndarray]]:
        """A worker that has answered, until the block ends. Where one hangs or dies, a fresh one is asked.

        One that has grown too large ends behind it; whoever comes next replaces it.
        """
        if (worker := self._idle.get()) is None:
            self._idle.put(None)
            raise CancelledError
        try:
            if worker.process.poll() is not None:  # it died between samples: not this one's doing
                worker = self._replaced(worker)
            for _ in range(ATTEMPTS):
                try:
                    reply, payload = worker.ask({**request, "limits": self._limits}, data, self.seconds)
                    break
                except TimeoutError:
                    why = f"not decoded within {self.seconds:g} s"
                except WorkerDied as death:
                    why = f"the decoder died: {death or 'no message'}"
                worker = self._replaced(worker)
            else:
                raise DecoderFailed(f"{why} ({ATTEMPTS} attempts)")
            if reply["resident"] > MOST_RESIDENT:
                worker.kill()  # its memory stays
            if "bad" in reply:
                raise BadSample(reply["bad"])
            yield worker, reply, payload
        finally:
            self._idle.put(worker)

    def _replaced(self, worker: DecodeWorker) -> DecodeWorker:
        if self._closed:
            raise CancelledError
        self._workers.remove(worker)
        worker.close()
        fresh = DecodeWorker()
        self._workers.add(fresh)
        if self._closed:  # meanwhile
            fresh.kill()
        return fresh
