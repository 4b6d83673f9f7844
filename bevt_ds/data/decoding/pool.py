"""Decode workers: started, given a deadline for each sample, and replaced when they hang, die or grow."""

from __future__ import annotations

import fcntl
import json
import math
import os
import queue
import select
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from bevt_ds.data.decoding import child
from bevt_ds.data.decoding.cut import Crop
from bevt_ds.data.decoding.shared_memory import SharedMemory
from bevt_ds.data.limits import BadSample, Limits

ATTEMPTS = 2  # a worker may hang or die for reasons that are not the sample's: memory, a stray signal
MOST_RESIDENT = 2 << 30  # bytes; a worker that holds more is replaced
READ_AHEAD = 2  # threads that may hold a file while all workers are busy
START_SECONDS = 120.0  # for a process to begin, with its imports: no fault of a sample, however slow the disk
_PIPE_BYTES = 1 << 20

Load = Callable[[], bytes]
Reply = dict[str, Any]
# What the receiver keeps of a video's pictures, uint8 (n,H,W,3), whose memory the worker will use again. Of each clip's
# frames the second array, (k,F), says which pictures they are.
Receive = Callable[[np.ndarray, np.ndarray], Any]


class WorkerDied(Exception):
    """The worker's pipe closed before its answer was whole. The message is the end of its stderr."""


class DecodeWorker:
    """One decoder process, its pipes, and the memory that it writes pixels to."""

    def __init__(self) -> None:
        self._memory = SharedMemory()
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        self._process = subprocess.Popen(
            child.command("bevt_ds.data.decoding.worker", str(self._memory.number)),
            env=child.environment(),
            pass_fds=[self._memory.number],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            bufsize=0,
        )
        self._started = False
        self._inlet, self._outlet = self._process.stdin.fileno(), self._process.stdout.fileno()
        self._writable, self._readable = select.poll(), select.poll()
        self._writable.register(self._inlet, select.POLLOUT)
        self._readable.register(self._outlet, select.POLLIN)
        os.set_blocking(self._inlet, False)  # a worker that is stopped must not stop its parent
        for pipe in (self._inlet, self._outlet):
            with suppress(OSError):  # the system may allow no more than its default
                fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def pictures(self, shape: tuple[int, ...]) -> np.ndarray:
        """The pixels of its last answer, until it is asked again: uint8, of the shape that the answer gave."""
        return self._memory.first(math.prod(shape)).reshape(shape)

    def ask(self, request: dict[str, Any], data: bytes, seconds: float) -> tuple[Reply, np.ndarray]:
        """The answer to a request about the file `data`, and the bytes that came with it: uint8 (n,).

        TimeoutError: once started, no answer within `seconds`. WorkerDied: there will be none. RuntimeError: no worker
        can start.
        """
        self._await_start(time.monotonic() + START_SECONDS)
        deadline = time.monotonic() + seconds
        line = json.dumps({**request, "size": len(data), "seconds": seconds}).encode() + b"\n"
        try:
            self._write(memoryview(line), deadline)
            self._write(memoryview(data), deadline)
        except BrokenPipeError as error:
            raise WorkerDied(self._stderr_tail()) from error
        reply = self._read_header(deadline)
        return reply, self._read(reply["size"], deadline)

    def kill(self) -> None:
        """End the process at once; it holds nothing that needs saving."""
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """End the process and release its pipes."""
        self.kill()
        self._process.stdin.close()
        self._process.stdout.close()
        self._stderr.close()
        self._memory.close()

    def _await_start(self, deadline: float) -> None:
        """Wait until the program runs. One that fails before it has seen a file is no fault of the file."""
        if self._started:
            return
        try:
            self._read(len(child.READY), deadline)
        except TimeoutError as error:
            raise RuntimeError(f"decode workers cannot start: not ready within {START_SECONDS:g} s") from error
        except WorkerDied as death:
            if self._process.wait() > 0:  # it exited by itself; a signal may have come from anywhere
                raise RuntimeError(f"decode workers cannot start: {death}") from death
            raise
        self._started = True

    def _stderr_tail(self) -> str:
        """The end of what the worker wrote to its standard error."""
        size = self._stderr.seek(0, os.SEEK_END)
        self._stderr.seek(max(size - 2000, 0))
        return self._stderr.read().decode(errors="replace").strip()

    def _write(self, buffer: memoryview, deadline: float) -> None:
        while len(buffer):
            _wait(self._writable, deadline)
            with suppress(BlockingIOError):
                buffer = buffer[os.write(self._inlet, buffer) :]

    def _read_header(self, deadline: float) -> Reply:
        """The JSON before which its length stands: a line's end would have to be looked for byte by byte."""
        (length,) = child.LENGTH.unpack(self._read(child.LENGTH.size, deadline))
        return json.loads(self._read(length, deadline).tobytes())

    def _read(self, size: int, deadline: float) -> np.ndarray:
        """The next bytes: uint8 (size,)."""
        data = np.empty(size, dtype=np.uint8)
        self._read_into(memoryview(data), deadline)
        return data

    def _read_into(self, buffer: memoryview, deadline: float) -> None:
        while len(buffer):
            _wait(self._readable, deadline)
            got = self._process.stdout.readinto(buffer)
            if not got:
                raise WorkerDied(self._stderr_tail())
            buffer = buffer[got:]


def _wait(poll: select.poll, deadline: float) -> None:
    if not poll.poll(max(deadline - time.monotonic(), 0) * 1000):
        raise TimeoutError


@dataclass
class _Place:
    """One of the pool's places, and who works there now."""

    worker: DecodeWorker


class DecodePool:
    """`workers` decoder processes behind a queue. Results are futures, so their order is the caller's.

    seconds: the deadline for one attempt at a sample, from the moment its bytes are there.
    """

    def __init__(self, workers: int, seconds: float, limits: Limits) -> None:
        self._seconds, self._limits, self._closed = seconds, asdict(limits), False
        self._idle: queue.SimpleQueue[DecodeWorker] = queue.SimpleQueue()
        self._workers = {DecodeWorker() for _ in range(workers)}
        for worker in self._workers:
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(workers + READ_AHEAD, thread_name_prefix="decode")

    @property
    def pids(self) -> list[int]:
        return [worker.pid for worker in self._workers]

    def clips(
        self,
        load: Load,
        positions: Sequence[Sequence[float]],
        frames: int,
        stride: int,
        choice: str = "clip",
        receive: Receive | None = None,
        crops: Sequence[Crop] | None = None,
    ) -> Future[tuple[Reply, Any]]:
        """Clips of one video, decoded together: what `receive` makes of them. The future raises BadSample.

        positions: where each clip lies, as `choice` takes it: one of frame_choice.CHOICES. receive: called in a thread
        of the pool; without it the frames are copied, uint8 (k,F,H,W,3). crops: the part of each clip that a cubic
        resize needs; pixels elsewhere are arbitrary.
        """
        clip = {"choice": choice, "positions": positions, "frames": frames, "stride": stride, "crops": crops}
        return self._threads.submit(self._answer, load, {"work": "clips", **clip}, receive or _copied)

    def describe(self, load: Load) -> Future[tuple[Reply, np.ndarray]]:
        """The fields of VideoInfo, from the packets' headers and the first frame."""
        return self.submit(load, {"work": "describe", "kind": "video"})

    def submit(self, load: Load, request: dict[str, Any]) -> Future[tuple[Reply, np.ndarray]]:
        """Any work of worker.py on the file that `load` returns."""
        return self._threads.submit(self._answer, load, request)

    def close(self) -> None:
        """End every worker. Samples not yet begun are dropped."""
        self._closed = True
        self._threads.shutdown(wait=False, cancel_futures=True)
        for worker in list(self._workers):
            worker.kill()
        self._threads.shutdown(wait=True)
        for worker in self._workers:
            worker.close()

    def _answer(self, load: Load, request: dict[str, Any], receive: Receive | None = None) -> tuple[Reply, Any]:
        """The reply, and what `receive` makes of the pictures; without it, the bytes that came with the reply.

        Where a worker hangs or dies, the same sample goes to a fresh one.
        """
        data, why = load(), ""
        with self._borrowed() as place:
            for _ in range(ATTEMPTS):
                try:
                    reply, payload = self._ask(place.worker, request, data, receive)
                except TimeoutError:
                    why = f"not decoded within {self._seconds:g} s"
                except WorkerDied as death:
                    if self._closed:
                        raise
                    why = f"the decoder died: {death or 'no message'}"
                else:
                    if "bad" in reply:
                        raise BadSample(reply["bad"])
                    return reply, payload
                place.worker = self._replaced(place.worker)
        raise BadSample(f"{why} ({ATTEMPTS} attempts)", transient=True)

    def _ask(
        self, worker: DecodeWorker, request: dict[str, Any], data: bytes, receive: Receive | None
    ) -> tuple[Reply, Any]:
        """One attempt. A worker that has grown too large ends behind it; whoever comes next replaces it."""
        reply, payload = worker.ask({**request, "limits": self._limits}, data, self._seconds)
        if receive and "bad" not in reply:
            payload = receive(worker.pictures(reply["shape"]), np.asarray(reply["places"]))
        if reply["resident"] > MOST_RESIDENT:
            worker.kill()
        return reply, payload

    @contextmanager
    def _borrowed(self) -> Iterator[_Place]:
        """The place of an idle worker, given back with whichever worker is in it then."""
        place = _Place(self._idle.get())
        try:
            if not place.worker.alive:  # it died between samples: not this one's doing
                place.worker = self._replaced(place.worker)
            yield place
        finally:
            self._idle.put(place.worker)

    def _replaced(self, worker: DecodeWorker) -> DecodeWorker:
        if self._closed:
            return worker
        self._workers.remove(worker)
        worker.close()
        fresh = DecodeWorker()
        self._workers.add(fresh)
        return fresh


def _copied(pictures: np.ndarray, places: np.ndarray) -> np.ndarray:
    """The frames of every clip, in memory of their own: uint8 (k,F,H,W,3)."""
    return pictures[places]
