"""The project's programs as users start them, under a launcher."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.training.processes import ROOT, SECONDS, environment


def run_program(entry: str, words: Sequence[str], launcher: Sequence[str] = ("python",)) -> tuple[int, str]:
    """Exit code and output of `entry`, a file of bevt_ds/."""
    program = str(Path(sys.executable).parent / launcher[0])
    command = [program, *launcher[1:], f"bevt_ds/{entry}", *words]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=SECONDS)
    return done.returncode, done.stdout + done.stderr
