"""run.json: how a run was made. One entry for each time that it was started: command, code, machines, dates."""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from bevt_ds.data.reading.index import write_atomic
from bevt_ds.disk import DiskError, writing
from bevt_ds.errors import UserError
from bevt_ds.folders import file_hash
from bevt_ds.runtime.distributed import Ranks

RECORD = "run.json"


class RunRecord:
    """A start of a run, from `with` to its end, as the last entry of run.json. Rank 0 writes. Collective.

    An entry without "ended" is of a run that goes on, or that was killed.
    """

    def __init__(self, folder: Path, ranks: Ranks, first_step: int, files: Mapping[str, str] | None = None) -> None:
        """files: of frozen weights that the run reads, by what they are; "": there is none.

        UserError: run.json is damaged.
        """
        machines = ranks.gather((socket.gethostname(), device_name(ranks.device)))
        self._path = folder / RECORD if ranks.is_main else None
        if self._path is None:
            return
        self._entries = read_record(self._path)
        self._entries.append(
            {
                "started": now(),
                "first_step": first_step,
                "command": shlex.join(sys.argv),
                "working_folder": os.getcwd(),
                "commit": commit_of(Path(__file__).resolve().parents[2]),
                "versions": versions(),
                "ranks": ranks.world,
                "hosts": sorted({host for host, _ in machines}),
                "devices": [device for _, device in machines],
            }
        )
        for name, file in (files or {}).items():
            if file:
                self._entries[-1][name] = {"file": file, "sha256": file_hash(Path(file))}

    def __enter__(self) -> RunRecord:
        self._write()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._path:
            outcome = "finished" if error is None else f"{type(error).__name__}: {error}".rstrip(": ")
            self._entries[-1] |= {"ended": now(), "outcome": outcome}
            with suppress(DiskError) if error else nullcontext():  # what ended the run is what is said
                self._write()

    def _write(self) -> None:
        if self._path:
            with writing(self._path):
                write_atomic(self._path, (json.dumps({"starts": self._entries}, indent=1) + "\n").encode())


def read_record(path: Path) -> list[dict[str, Any]]:
    """The starts in a run.json; none where there is no such file. UserError: it is damaged."""
    try:
        return list(json.loads(path.read_text(encoding="utf-8"))["starts"])
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}): move it away.") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): move it away.") from error


def other_versions(path: Path, step: int) -> list[str]:
    """What is of another version now than when `step` was committed, each as `torch 2.12.0 -> 2.13.0`.

    path: run.json of the run that committed it. A record that is missing or damaged says nothing.
    """
    with suppress(UserError, KeyError, TypeError, AttributeError):
        *_, then = ({}, *(entry["versions"] for entry in read_record(path) if entry["first_step"] < step))
        here = versions()
        both = sorted((then.keys() & here.keys()) - {"system"})
        return [f"{name} {then[name]} -> {here[name]}" for name in both if then[name] != here[name]]
    return []


def now() -> str:
    """The time in UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def commit_of(checkout: Path) -> str | None:
    """The commit of a checkout, with -dirty if files differ from it; None: it is none, or there is no git."""
    if not (checkout / ".git").exists():
        return None
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    with suppress(OSError, subprocess.CalledProcessError):
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return None


def versions() -> dict[str, str]:
    """Python, the system, this package and what it needs, CUDA."""
    names = [
        "bevt_ds",
        *(re.split(r"[^\w.-]", need)[0] for need in requires("bevt_ds") or () if "extra ==" not in need),
    ]
    found = {"python": platform.python_version(), "system": platform.platform()}
    for name in names:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found | ({"cuda": torch.version.cuda} if torch.version.cuda else {})


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's architecture."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({platform.machine()})"
