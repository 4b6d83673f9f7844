"""Making GPU batches on a CUDA side stream, as far as a machine without a GPU can tell."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from bevt_ds.data.loader import SideStream


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What happens, in order; streams do nothing but write it down."""
    log: list[str] = []

    @contextmanager
    def entered(stream: SimpleNamespace):
        log.append("enter")
        yield
        log.append("leave")

    stream = SimpleNamespace(synchronize=lambda: log.append("wait"))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: log.append(f"stream of {device}") or stream)
    monkeypatch.setattr(torch.cuda, "stream", entered)
    return log


def test_gpu_batch_is_made_on_a_side_stream_and_waited_for(log: list[str]) -> None:
    side = SideStream(torch.device("cuda", 1))
    for _ in range(2):
        with side.context():
            log.append("work")
    assert log == ["stream of cuda:1", *["enter", "work", "wait", "leave"] * 2]
