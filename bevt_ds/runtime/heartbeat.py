"""Every rank shows each second that it lives; when one is lost, all the others say which, and end.

A thread of each rank, so that it goes on while the training thread is in a collective that will never return. Rank 0
listens; each other rank holds a connection to it, whose end shows a death at once, on any machine.
"""

from __future__ import annotations

import faulthandler
import json
import os
import secrets
import selectors
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from bevt_ds.exit_codes import RANK_LOST, STOPPED
from bevt_ds.launcher import Process, find
from bevt_ds.runtime.distributed import Ranks
from bevt_ds.runtime.place import PLACE, Place, moved_bytes
from bevt_ds.runtime.roll_call import Missing, RollCall
from bevt_ds.runtime.signals import end_process

BEAT = 1.0  # seconds
LOOK = 0.2  # seconds, for this rank's own end
SETTLE = 5.0  # seconds until it is known whether an error of this rank is another's death
OTHERS_END = 10.0  # seconds for this rank to find out by itself why another has ended
CONNECT = 60.0  # seconds
HELLO = 5.0  # seconds for a rank's name, once it is connected
LONGEST = 1 << 16  # bytes
FLUSH = 1.0  # seconds for the other end to take what was sent last


class Member(NamedTuple):
    """The process of a rank. `machine`: where its number means something, which in containers is not the host."""

    machine: str
    host: str
    process: Process

    @classmethod
    def here(cls) -> Member:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return cls(f"{os.readlink('/proc/self/ns/pid')} {boot}", socket.gethostname(), find(os.getpid()))


class Link:
    """JSON messages over a connection, neither end of which waits for the other."""

    def __init__(self, connection: socket.socket, rank: int) -> None:
        connection.setblocking(False)
        self.connection, self.is_open, self.rank = connection, True, rank
        self._rest = b""

    def send(self, **message: Any) -> None:
        """What cannot be sent is lost: the other end reads nothing any more, or is gone."""
        with suppress(OSError):
            self.connection.send(json.dumps(message).encode() + b"\n")

    def read(self) -> list[dict[str, Any]]:
        """The messages that have come. `is_open` tells whether more may."""
        try:
            data = self.connection.recv(LONGEST)
        except BlockingIOError:
            return []
        except OSError:
            data = b""
        *lines, self._rest = (self._rest + data).split(b"\n")
        self.is_open = bool(data)
        return [json.loads(line) for line in lines]


class Heartbeat:
    """Watches over the ranks of a run from `with` to its end. Entering is collective. A rank alone watches no one.

    Args:
        deadline: seconds without a sign after which a rank is lost.
        waits: seconds in which a section (place.py) may go without getting on, where that is longer than usual.
        end: ends the process with a code, after a function that says why.
    """

    def __init__(
        self,
        ranks: Ranks,
        deadline: float,
        waits: Mapping[str, float] | None = None,
        place: Place = PLACE,
        end: Callable[[int, Callable[[], None]], None] = end_process,
    ) -> None:
        self._ranks, self._deadline, self._waits, self._place, self._end = ranks, deadline, waits or {}, place, end
        self._links: list[Link] = []
        self._leaving, self._failed = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Heartbeat:
        if self._ranks.world > 1:
            self._members = self._ranks.gather(Member.here())
            self._connect()
            self._place.enter("start", 0)  # this module may have been imported long before
            heard = range(self._ranks.world) if self._ranks.is_main else [0]
            self._roll = RollCall(heard, self._deadline, time.monotonic())
            self._thread = threading.Thread(target=self._watch, name="heartbeat", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._thread is None:
            return
        if isinstance(error, RuntimeError):  # torch's, of a collective with a rank that is gone
            self._failed.set()
            self._thread.join(SETTLE)
        self.leave(0 if error is None else getattr(error, "exit_code", 1))

    def leave(self, code: int) -> None:
        """Tell the others that this rank ends, and with which code: 0 unless they are to end too. From any thread."""
        if self._thread is None:
            return
        if not self._leaving.is_set():
            self._leaving.set()
            self._failed.set()
            self._tell(left=[self._ranks.rank, code])
        self._thread.join()
        self._close()

    def _close(self) -> None:
        """Close the connections once the others have what was sent: to close with bytes unread would take it back."""
        until = time.monotonic() + FLUSH
        links, self._links = self._links, []
        for link in links:
            with suppress(OSError):
                link.connection.shutdown(socket.SHUT_WR)
        for link in links:
            with suppress(OSError):
                while (left := until - time.monotonic()) > 0:
                    link.connection.settimeout(left)
                    if not link.connection.recv(LONGEST):
                        break
            link.connection.close()

    def _connect(self) -> None:
        """Connect every other rank with rank 0. Collective."""
        together = len({member.machine for member in self._members}) == 1
        token, listener, place = secrets.token_hex(16), None, None
        if self._ranks.is_main:
            listener = socket.create_server(("127.0.0.1" if together else "", 0), backlog=self._ranks.world)
            place = ("127.0.0.1" if together else os.environ["MASTER_ADDR"], listener.getsockname()[1], token)
        address, port, token = self._ranks.broadcast(place)
        if listener is None:
            connection = socket.create_connection((address, port), CONNECT)
            connection.sendall(f"{token} {self._ranks.rank}\n".encode())
            self._links.append(Link(connection, 0))
            return
        with listener:
            listener.settimeout(CONNECT)
            while len(self._links) < self._ranks.world - 1:
                if link := _accept(listener, token):
                    self._links.append(link)

    def _watch(self) -> None:
        """The thread: listen, and once a second show that this rank lives and look who does not."""
        selector = selectors.DefaultSelector()
        for link in self._links:
            selector.register(link.connection, selectors.EVENT_READ, link)
        due = time.monotonic()
        with selector:
            while not self._leaving.is_set():
                for key, _ in selector.select(LOOK):
                    self._listen(key.data)
                    if not key.data.is_open:
                        selector.unregister(key.fileobj)
                        self._lose(key.data)
                if (now := time.monotonic()) >= due:
                    due = now + BEAT
                    self._beat(now)

    def _listen(self, link: Link) -> None:
        for message in link.read():
            self._take(link.rank, message)

    def _lose(self, link: Link) -> None:
        """A connection has ended: so has the other rank, unless it has said that it would."""
        if link in self._links:
            self._links.remove(link)
        link.connection.close()
        self._roll.closed(link.rank)
        self._judge(time.monotonic())

    def _take(self, rank: int, message: dict[str, Any]) -> None:
        if sign := message.get("sign"):  # whether a rank gets on, rank 0 judges, who knows of all
            told = sign if self._ranks.is_main else {name: sign[name] for name in ("section", "step")}
            self._roll.heard(rank, time.monotonic(), **told)
        if lost := message.get("lost"):
            self._end_without([Missing(**missing) for missing in lost])
        if left := message.get("left"):
            self._roll.left(left[0])
            if left[1]:
                self._follow(*left)

    def _beat(self, now: float) -> None:
        pause = self._roll.look(now)
        place = self._place
        place.forgive(pause)
        place.look(moved_bytes())
        sign = {"section": place.section, "step": place.step, "entered": place.entered, "still": now - place.since}
        sign["limit"] = place.limit(self._deadline, self._waits)
        if self._ranks.is_main:
            self._roll.heard(0, now, **sign)
        self._tell(sign=sign)
        self._judge(now)

    def _tell(self, **message: Any) -> None:
        for link in list(self._links):
            link.send(**message)

    def _judge(self, now: float) -> None:
        if (missing := self._roll.missing(now)) and not self._leaving.is_set():
            self._tell(lost=[one.as_json() for one in missing])
            self._end_without(missing)

    def _end_without(self, missing: list[Missing]) -> None:
        """Say which ranks are lost and what this one was at; end, and see to it that they do too."""
        self._leaving.set()
        lost = [(one, self._members[one.rank]) for one in missing]
        lines = [f"error: {one} (process {member.process.pid} on {member.host})" for one, member in lost]

        def speak() -> None:
            for one, member in lost:
                if one.silent and member.machine == self._members[self._ranks.rank].machine:
                    kill(member.process)
            print("\n", "\n".join(lines), "\n", stacks(), sep="", file=sys.stderr, flush=True)
            self._close()

        self._end(RANK_LOST, speak)

    def _follow(self, rank: int, code: int) -> None:
        """Another rank ends with an error, or was told to stop at once. This one may have found the same by itself."""
        if self._ranks.is_main:
            self._tell(left=[rank, code])
        self._failed.wait(0 if code == STOPPED else OTHERS_END)
        if self._leaving.is_set():
            return
        self._leaving.set()

        def speak() -> None:
            line = f"rank {rank} has ended with exit code {code}: so does rank {self._ranks.rank}"
            print(f"\n{line}", file=sys.stderr, flush=True)
            self._close()

        self._end(code, speak)


def _accept(listener: socket.socket, token: str) -> Link | None:
    """A rank's connection; None: another program has found the port. TimeoutError: no one comes."""
    connection, _ = listener.accept()
    connection.settimeout(HELLO)
    with suppress(OSError, ValueError):
        said, rank = connection.makefile("rb", 0).readline(100).split()
        if secrets.compare_digest(said, token.encode()):
            return Link(connection, int(rank))
    connection.close()
    return None


def kill(process: Process) -> None:
    """End a process that is frozen. One that has ended meanwhile is not there to be ended."""
    if process.is_alive():
        with suppress(ProcessLookupError):  # it may end right now
            os.kill(process.pid, signal.SIGKILL)


def stacks() -> str:
    """What every thread of this process is at."""
    with open(os.memfd_create("stacks"), "w+b") as file:
        faulthandler.dump_traceback(file)
        file.seek(0)
        return file.read().decode(errors="replace")
