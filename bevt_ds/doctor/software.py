"""Python, the packages against their ranges and the lock, and a compiler that works."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement

from bevt_ds.doctor.lines import Line, attempt

TESTED = ("3.11", "3.12")
LOCK = Path(__file__).resolve().parents[2] / "requirements.lock"  # of a checkout; an installed package has none
DALI = ("nvidia-dali-cuda130", "nvidia-dali-cuda120")  # one of them, as the driver is
PROGRAM = "#include <Python.h>\n#include <vector>\nint main() { return (int)std::vector<int>(1).size() - 1; }\n"


def check_python() -> Line:
    """Whether this Python is one that the tests run on."""
    ours = platform.python_version()
    if ours.rpartition(".")[0] in TESTED:
        return Line("python", "ok", ours)
    return Line("python", "mend", f"{ours} is not tested", f"use Python {' or '.join(TESTED)}")


def check_packages(lock: Mapping[str, str] | None = None) -> list[Line]:
    """A line for each package that is missing or out of its range, and one that sums up.

    lock: version by name, as tested; None: those of the checkout's requirements.lock, if there is one.
    """
    locked = _locked() if lock is None else lock
    needs = [Requirement(text) for text in requires("bevt_ds") or ()]
    needs = [need for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]
    found = {need.name: _installed(need.name) for need in needs}
    faults = [line for need in needs if (line := _fault(need, found[need.name], locked.get(need.name)))]
    others = [
        f"{name} {own} ({locked[name]})"
        for name, own in found.items()
        if own and name in locked and own.partition("+")[0] != locked[name]
    ]
    text = f"{len(needs) - len(faults)} of {len(needs)} in the ranges that bevt_ds names"
    if locked:
        text += f"; not as in requirements.lock: {', '.join(others)}" if others else ", all as in requirements.lock"
    return [*faults, Line("packages", "ok", text)] if len(faults) < len(needs) else faults


def _locked() -> dict[str, str]:
    text = LOCK.read_text(encoding="utf-8") if LOCK.is_file() else ""
    pins = re.findall(r"^([\w.-]+)==(\S+)(?: ; (.*))?", text, re.MULTILINE)
    here = [(name, pin) for name, pin, marker in pins if not marker or Requirement(f"a; {marker}").marker.evaluate()]
    return dict(here)


def _installed(name: str) -> str | None:
    for one in DALI if name in DALI else (name,):
        try:
            return version(one)
        except PackageNotFoundError:
            continue
    return None


def _fault(need: Requirement, own: str | None, pin: str | None) -> Line | None:
    """The line of a package that is missing or out of its range."""
    if own and need.specifier.contains(own, prereleases=True):
        return None
    text = f"{own} is outside {need.specifier}" if own else "is not installed"
    return Line(need.name, "mend", text, f"pip install '{need.name}{f'=={pin}' if pin else need.specifier}'")


def check_compiler() -> Line:
    """Whether a C++ program that includes Python's header compiles, as the kernels' launchers need it."""
    compiler = os.environ.get("CXX") or next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), "")
    if not compiler:
        remedy = "install one (Debian: apt-get install g++ python3-dev)"
        return Line("compiler", "mend", "no C++ compiler: Triton's kernels and DeepSpeed's CPU AdamW need one", remedy)
    remedy = "install the C++ library and Python's headers (Debian: apt-get install g++ python3-dev)"
    return attempt("compiler", lambda: _compile(compiler), remedy)


def _compile(compiler: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        source, include = Path(folder, "a.cpp"), sysconfig.get_paths()["include"]
        source.write_text(PROGRAM)
        command = [compiler, "-c", f"-I{include}", str(source), "-o", f"{folder}/a.o"]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        faults = [line for line in done.stderr.splitlines() if "error" in line]
        raise RuntimeError(f"{compiler} does not compile a program with Python.h: {(faults or ['no reason given'])[0]}")
    return f"{compiler} compiles a program with Python's headers"


def check_extras(gpu: bool) -> list[Line]:
    """What only some engine configurations need; its absence is no fault."""
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path=f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin")
    aio = any(Path(folder, "libaio.h").is_file() for folder in ("/usr/include", "/usr/local/include"))
    lines = [_extra("libaio", aio, "zero3_offload_nvme: DeepSpeed compiles its disk reader with it (libaio-dev)")]
    if gpu:
        lines.append(_extra("nvcc", bool(nvcc), "zeropp, and offloading: DeepSpeed compiles their CUDA code with it"))
    return lines


def _extra(name: str, there: bool, use: str) -> Line:
    return Line(name, "ok", "is there") if there else Line(name, "absent", f"only needed for {use}")
