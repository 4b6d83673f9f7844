"""Runs cases on request and answers with what they cost: one side of benchmarks.smoke.

The first answer names the package that was imported, the cases, and why one could not be made. Then a line on standard
input names a case, and a JSON line on standard output answers with its CPU seconds, of this process and of the children
that it has ended.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

Run = Callable[[], object]


def cpu_seconds() -> float:
    """Of this process, all its threads, and the children that it has waited for."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def serve(cases: dict[str, Callable[[], Run]], package: str | None) -> None:
    """Make every case and run it once, unmeasured; then answer until standard input ends."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print must not be taken for an answer
    made: dict[str, Run] = {}
    answers = {name: _attempt(partial(_warm, make, name, made)) for name, make in cases.items()}
    errors = {name: answer["error"] for name, answer in answers.items() if "error" in answer}
    print(json.dumps({"package": package, "cases": list(cases), "errors": errors}), file=replies)
    for name in map(str.strip, sys.stdin):
        print(json.dumps(_attempt(made[name])), file=replies)


def _warm(make: Callable[[], Run], name: str, made: dict[str, Run]) -> None:
    made[name] = make()
    made[name]()


def _attempt(run: Run) -> dict[str, Any]:
    before = cpu_seconds()
    try:
        run()
    except Exception as error:  # the other side decides what it means: an older commit may lack what a case needs
        return {"error": f"{type(error).__name__}: {error}"}
    return {"cpu_s": cpu_seconds() - before}
