"""A validation that a signal ends: after the batch that it is at, and made up for when the run goes on. No engine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from bevt_ds.config.parse import set_value
from bevt_ds.config.recipes import get_recipe
from bevt_ds.config.schema import FinetuneConfig
from bevt_ds.runtime.run_log import RunLog
from bevt_ds.runtime.signals import Stopped, StopRequest
from bevt_ds.train import finetuning
from bevt_ds.train.finetuning import Finetuning, validate
from tests.downstream.worlds import ALONE

EPOCH, STEPS = 5, 12


@pytest.fixture
def task(tmp_path) -> Iterator[Finetuning]:
    """A task that validates after each epoch and the last step; a stop is asked for while its classifier works."""
    config = set_value(get_recipe("finetune_k400", FinetuneConfig), "data.val", "val.tar")
    config = set_value(config, "train.val_every", 1)
    stop = StopRequest(watched=(), end=lambda code, speak: None)
    setup = SimpleNamespace(config=config, ranks=ALONE, folder=tmp_path, stop=stop)
    loader = SimpleNamespace(steps_an_epoch=EPOCH, val_shards=[], classes=range(2))

    def forward(clips, keys):
        stop.ask("SIGTERM")
        return torch.zeros(len(clips), 2)

    engine = SimpleNamespace(evaluating=nullcontext, forward=forward)
    with stop.training():
        yield Finetuning(setup, loader, engine, STEPS, 0.0, None, None)


def test_a_validation_ends_after_the_batch_in_which_the_signal_came(task, monkeypatch):
    served = []

    def each_video(*_):
        for number in range(3):
            served.append(number)
            yield SimpleNamespace(pixels=torch.zeros(1, 1, 3, 1, 1, 1), labels=torch.tensor([0]))

    monkeypatch.setattr(finetuning, "each_video", each_video)
    with pytest.raises(Stopped, match="by SIGTERM"):
        validate(task)
    assert served == [0, 1]


def test_only_a_validation_that_is_not_in_the_log_is_made_up_for(task, monkeypatch, tmp_path):
    validated = []
    monkeypatch.setattr(finetuning, "record_validation", lambda task, log, step: validated.append(step))
    with RunLog(tmp_path, ALONE, 0) as log:
        task.make_up(EPOCH - 2, log)
        assert validated == []
        log.write(EPOCH - 1, {"loss": 1.0})
        task.make_up(EPOCH - 1, log)
        assert validated == [EPOCH - 1]
        log.write(EPOCH - 1, {"val_top1": 0.5})
        task.make_up(EPOCH - 1, log)
        task.make_up(STEPS - 1, log)
    assert validated == [EPOCH - 1, STEPS - 1]
