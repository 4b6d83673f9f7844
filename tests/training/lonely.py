"""A rank whose run has another one that never comes: `lonely.py`."""

from __future__ import annotations

from bevt_ds.config.command_line import run
from bevt_ds.runtime.joining import joined
from bevt_ds.runtime.signals import StopRequest

DEADLINE = 0.6  # seconds; of the meeting it is five times as much


def main(argv: list[str]) -> int:
    with joined(StopRequest(), DEADLINE):
        return 0


if __name__ == "__main__":
    run(main)
