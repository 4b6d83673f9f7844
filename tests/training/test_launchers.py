"""What arrives through each launcher: exit codes of its ranks, signals to it or to a rank; the table of exit codes."""

from __future__ import annotations

import base64
import json
import os
import re
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType

import pytest

from bevt_ds import exit_codes
from bevt_ds.exit_codes import DISK, FINISHED, NON_FINITE, NOT_LEARNED, RANK_LOST, STOPPED, USER_ERROR
from tests.training.preloaded import Forked
from tests.training.processes import ROOT, SECONDS, environment, free_port, start_python, wait_for
from tests.training.short_ranks import DEADLINE
from tests.waiting import until

PROGRAM = "tests/training/short_ranks.py"
BIN = Path(sys.executable).parent
KILLED = -signal.SIGKILL


def through_deepspeed(code: int) -> int:
    """The part of it that watches the ranks; test_signals_through_each_launcher has the command."""
    world = base64.urlsafe_b64encode(json.dumps({"localhost": [0, 1]}).encode()).decode()
    launcher = ["-m", "deepspeed.launcher.launch", f"--world_info={world}", f"--master_port={free_port()}"]
    return ended([Forked([*launcher, "tests/training/ending.py", str(code)], environment())])[0]


def through_torchrun(code: int) -> int:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    return ended([Forked([*launcher, "tests/training/ending.py", str(code)], environment())])[0]


def by_themselves(code: int) -> int:
    """Plain `python`, and ranks that each have their own variables, as from `srun`: nothing is in between."""
    ((first, second),) = [ended(start_python(["tests/training/ending.py", str(code)], 2))]
    assert first == second
    return first


def ended(processes: list[Forked]) -> list[int]:
    wait_for(processes)
    return [process.returncode for process in processes]


def as_a_shell_sees_it(code: int) -> int:
    """A negative code that a launcher passes on to `sys.exit`."""
    return code % 256


@pytest.mark.dist
@pytest.mark.parametrize("code", [FINISHED, NOT_LEARNED, USER_ERROR, NON_FINITE, DISK, RANK_LOST, STOPPED, KILLED])
def test_exit_code_of_ranks_started_by_themselves(code):
    assert by_themselves(code) == code


@pytest.mark.dist
@pytest.mark.parametrize("code", [FINISHED, NOT_LEARNED, STOPPED, KILLED])  # each passes on any code as these
@pytest.mark.parametrize(
    ("through", "arrives"),
    [(through_deepspeed, as_a_shell_sees_it), (through_torchrun, bool)],
    ids=["deepspeed", "torchrun"],
)
def test_exit_code_through_each_launcher(through, arrives, code):
    assert through(code) == arrives(code)


class Launched:
    """Walking ranks under a launcher; all processes that descend from it can be found."""

    def __init__(self, folder: Path, launcher: list[str], world: int, extra: Mapping[str, str]) -> None:
        self.folder, self.world, self.mark = folder, world, uuid.uuid4().hex
        self.output = folder / "output"
        with self.output.open("w") as output:
            self.process = subprocess.Popen(
                [*launcher, PROGRAM, "walk", str(folder)],
                cwd=ROOT,
                env=environment(MARK=self.mark, **extra),
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def descendants(self) -> list[int]:
        """The processes that there are, all but those that have ended and that no one has asked yet."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if self.mark.encode() in (process / "environ").read_bytes():
                    found.append(int(process.name))
        return found

    def pid(self, rank: int) -> int:
        return int(json.loads((self.folder / f"{rank}.json").read_text())["pid"])

    def wait_for_steps(self) -> None:
        """Until every rank has done one."""
        self.until(lambda: all((self.folder / f"{rank}.json").exists() for rank in range(self.world)))

    def until(self, holds: Callable[[], object]) -> None:
        until(holds, told=self.output.read_text)

    def stopped(self) -> set[str]:
        """What the ranks say has stopped them, each after its commit."""
        return {(self.folder / f"{rank}.committed").read_text() for rank in range(self.world)}

    def kill(self) -> None:
        for pid in self.descendants():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def launched(tmp_path) -> Iterator[Callable[[list[str], int], Launched]]:
    made = []

    def launch(launcher: list[str], world: int, extra: Mapping[str, str] = MappingProxyType({})) -> Launched:
        made.append(Launched(tmp_path, launcher, world, extra))
        return made[-1]

    yield launch
    for one in made:
        one.kill()


PYTHON = [sys.executable]
DEEPSPEED = [str(BIN / "deepspeed"), "--num_gpus", "2"]
TORCHRUN = [str(BIN / "torchrun"), "--standalone", "--nproc_per_node=2"]
TERM, INT, USR1, HUP = signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP


@pytest.mark.dist
@pytest.mark.parametrize(
    ("launcher", "number", "to", "arrives"),
    [
        (PYTHON, INT, "command", STOPPED),
        (DEEPSPEED, TERM, "command", -TERM),
        (DEEPSPEED, INT, "all", -INT),
        (DEEPSPEED, USR1, "rank 1", STOPPED),
        (DEEPSPEED, signal.SIGKILL, "launch.py", 0),
        (TORCHRUN, TERM, "command", 1),
        (TORCHRUN, USR1, "command", -USR1),
        (TORCHRUN, HUP, "rank 1", 1),
    ],
    ids=lambda value: Path(value[0]).name if isinstance(value, list) else getattr(value, "name", str(value)),
)
def test_signals_through_each_launcher(launched, launcher, number, to, arrives):
    """All ranks commit and end, and nothing is left running."""
    port = ["--master_port", str(free_port())] if launcher is DEEPSPEED else []
    run = launched([*launcher, *port], 1 if launcher is PYTHON else 2)
    run.wait_for_steps()
    send(run, number, to)
    assert run.process.wait(SECONDS) == arrives, run.output.read_text()
    run.until(lambda: not run.descendants())
    assert len(run.stopped()) == 1


FROZEN_SECONDS = 15


@pytest.mark.dist
@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("launcher", "arrives"),
    [(DEEPSPEED, {RANK_LOST, 256 - signal.SIGKILL}), (TORCHRUN, {1})],  # deepspeed: of the rank that it sees first
    ids=["deepspeed", "torchrun"],
)
def test_lost_rank_under_each_launcher(launched, launcher, arrives, number):
    """The other one ends and names a frozen one, which is gone too, as is all else of the launcher's.

    That a killed one is named does not show here: its launcher may end the other one first.
    """
    port = ["--master_port", str(free_port())] if launcher is DEEPSPEED else []
    run = launched([*launcher, *port], 2, {DEADLINE: str(FROZEN_SECONDS)})
    run.wait_for_steps()
    os.kill(run.pid(1), number)
    assert run.process.wait(SECONDS) in arrives, run.output.read_text()
    run.until(lambda: not run.descendants())
    if number == signal.SIGSTOP:
        assert "error: rank 1 has not answered" in run.output.read_text()


def send(run: Launched, number: int, to: str) -> None:
    if to == "all":  # as Ctrl-C in a terminal
        os.killpg(run.process.pid, number)
    elif to == "launch.py":
        os.kill(parent_of(run.pid(0)), number)
    else:
        os.kill(run.pid(1) if to == "rank 1" else run.process.pid, number)


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


@pytest.mark.parametrize("rank", [0, 1])
def test_rank_that_no_other_meets_ends(rank):
    """One is killed before the ranks have met: the others end, with the code for it and one line."""
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    lonely = Forked([PROGRAM, "meet"], environment(**place, RANK=str(rank), LOCAL_RANK=str(rank)))
    said = lonely.communicate(240)[0]
    assert lonely.returncode == RANK_LOST, said
    where = f"127.0.0.1:{place['MASTER_PORT']}"
    assert f"error: rank {rank} has waited 3 s for all of 2 ranks to meet at {where}: one has ended" in said
    assert "Traceback" not in said


# The codes


def test_documented_exit_codes_equal_the_table():
    text = (ROOT / "docs" / "reliability.md").read_text()
    rows = text.partition("\n| 0 | ")[1:]  # the page's first table
    table = dict(re.findall(r"^\| (\d+) \| (.*) \|$", "".join(rows).partition("\n\n")[0], re.MULTILINE))
    assert table == {str(code): meaning for code, meaning in exit_codes.MEANINGS.items()}


def test_every_code_has_one_meaning():
    codes = {value for name, value in vars(exit_codes).items() if name.isupper() and isinstance(value, int)}
    assert codes == set(exit_codes.MEANINGS)
