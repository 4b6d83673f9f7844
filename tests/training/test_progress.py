"""Progress in a file is lines; on a terminal a bar that is drawn over itself."""

from __future__ import annotations

import io
import sys

import pytest

from bevt_ds import progress


class Stream(io.StringIO):
    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_bar_on_a_terminal(monkeypatch, terminal):
    monkeypatch.setattr(sys, "stderr", Stream(terminal))
    monkeypatch.setattr(progress, "BETWEEN_LINES", 0.0)
    with progress.progress_bar(range(3), unit="step") as bar:
        for i in bar:
            bar.set_postfix_str(f"loss {i}", refresh=False)
    text = sys.stderr.getvalue()
    assert ("\r" in text) is terminal
    lines = text.splitlines()
    assert all(line.strip() for line in lines[1:])
    assert "3/3" in lines[-1] and "loss 2" in lines[-1]


def test_progress_in_a_file_is_few_lines(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Stream(False))
    assert sum(progress.progress_bar(range(10_000), total=10_000)) == sum(range(10_000))
    assert [line.split("|")[0] for line in sys.stderr.getvalue().splitlines()] == ["0%", "100%"]
