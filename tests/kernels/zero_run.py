"""Trains the model of test_training.py by the kernels and in plain PyTorch under a DeepSpeed ZeRO stage; prints both.

    python tests/kernels/zero_run.py STAGE

A program and not a test, because an engine takes over its process.
"""

import json
import os
import sys

import torch

if not torch.cuda.is_available():  # before anything imports triton
    os.environ.setdefault("TRITON_INTERPRET", "1")

import deepspeed
from test_training import TwoStages, sample

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STEPS = 3


def losses(provider: str, stage: int) -> list[float]:
    """The loss of each step."""
    torch.manual_seed(1)
    model = TwoStages(provider)
    inputs = sample(torch.float32, DEVICE)
    config = {
        "train_batch_size": 1,
        "zero_optimization": {"stage": stage},
        "optimizer": {"type": "SGD", "params": {"lr": 0.15}},
        "zero_allow_untested_optimizer": True,
    }
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    found = []
    for _ in range(STEPS):
        loss = engine(*inputs)
        engine.backward(loss)
        engine.step()
        found.append(loss.item())
    return found


if __name__ == "__main__":
    stage = int(sys.argv[1])
    print(json.dumps([losses(provider, stage) for provider in ("torch", "triton")]))
