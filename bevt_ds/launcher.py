"""The processes that started this one, and whether a process still runs. Linux only: /proc."""

from __future__ import annotations

import os
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple

DEEPSPEED = "deepspeed.launcher.launch"  # the program that the `deepspeed` command starts on each machine


class Process(NamedTuple):
    """A process of this machine; its number may be another's once it has ended, but not with the same start."""

    pid: int
    start: int  # clock ticks since the machine started

    def is_alive(self) -> bool:
        """Whether it runs or is stopped. One that has ended and waits for its parent to ask is not alive."""
        with suppress(OSError):
            state, _, start = _stat(self.pid)
            return start == self.start and state not in ("Z", "X")
        return False


def find(pid: int) -> Process | None:
    """The process with this number, if there is one."""
    with suppress(OSError):
        return Process(pid, _stat(pid)[2])
    return None


@cache
def launchers() -> tuple[Process, ...]:
    """Whose end is this process's end too: its parent, where that is a launcher; and the `deepspeed` command.

    A launcher gives its ranks a number in RANK; plain `python` has no launcher, and may outlive its terminal. Call it
    early: the answer is of the first call, and a launcher that has ended by then cannot be found.
    """
    if "RANK" not in os.environ or (parent := find(os.getppid())) is None:
        return ()
    found = [parent]
    with suppress(OSError):
        if DEEPSPEED in _command(parent.pid):
            above = _stat(parent.pid)[1]
            adopted = above == 1 and "deepspeed" not in _command(above)  # the command has ended already
            found += [Process(above, -1) if adopted else find(above) or Process(above, -1)]
    return tuple(found)


def signals_twice() -> bool:
    """Whether one signal may reach this process twice: itself, and once more from a launcher that passes it on."""
    with suppress(OSError):
        return "TORCHELASTIC_RUN_ID" in os.environ or DEEPSPEED in _command(os.getppid())
    return False


def _stat(pid: int) -> tuple[str, int, int]:
    """State, parent and start of a process. OSError: there is none."""
    text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    fields = text.rpartition(")")[2].split()  # what is before may be any text: the program's name
    return fields[0], int(fields[1]), int(fields[19])


def _command(pid: int) -> str:
    """The command line of a process. OSError: there is none."""
    return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
