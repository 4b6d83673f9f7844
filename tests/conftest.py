"""Triton's interpreter where there is no GPU; what was not run, and why, in the last lines of every test run."""

from __future__ import annotations

import os
import signal
from collections import Counter

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton

# Signals are heard here and in what the tests start, though `nohup` or a shell's `&` had them ignored.
for number, handler in ((signal.SIGHUP, signal.SIG_DFL), (signal.SIGINT, signal.default_int_handler)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)

REASONS = {
    "gpu": "need a CUDA device (make test-gpu)",
    "slow": "take longer than CI allows (make test-all)",
}
# Files of minutes, which start many processes: begun first, so that of several pytest processes none ends late.
LONGEST = ("test_kills", "test_own_videos", "test_runs", "test_launchers", "test_stopping", "test_engine_matrix")
_deselected: Counter[str] = Counter()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.stem not in LONGEST)


def pytest_deselected(items: list[pytest.Item]) -> None:
    for item in items:
        mark = next((name for name in REASONS if item.get_closest_marker(name)), None)
        _deselected[REASONS[mark] if mark else "were deselected on the command line"] += 1


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):  # one of several processes: each deselects the same
        session.config.workeroutput["deselected"] = dict(_deselected)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: object) -> None:
    """One of several processes has ended."""
    global _deselected
    _deselected |= Counter(getattr(node, "workeroutput", {}).get("deselected"))  # none if it crashed


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reasons = Counter(_deselected)
    for report in terminalreporter.stats.get("skipped", []):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        reasons[reason.removeprefix("Skipped: ")] += 1
    if reasons:
        terminalreporter.section(f"{sum(reasons.values())} tests not run")
        for reason, number in reasons.most_common():
            terminalreporter.write_line(f"{number:4d}  {reason}")
