"""What benchmarks.smoke compares: small pieces of the training step on a CPU, through the package's public functions.

A case is a function that sets up and returns what to run, a tenth of a second or more. Both sides run the cases of this
file; where an older commit lacks what a case needs, that case is not compared.
"""

from __future__ import annotations

import shutil
import tempfile
from itertools import islice
from pathlib import Path

import torch

import bevt_ds
from benchmarks.smoke_worker import Run, serve
from bevt_ds import kernels

SHARDS = Path(__file__).parents[1] / "tests" / "data" / "shards"
DRAW = torch.Generator().manual_seed(0)


def attention() -> Run:
    """Shifted video windows and image windows, forward and backward."""
    video = (torch.randn(1, 4, 16, 16, 3, 4, 32, generator=DRAW), (4, 4, 4), (0, 2, 2))
    image = (torch.randn(4, 1, 16, 16, 3, 4, 32, generator=DRAW), (1, 4, 4), (0, 2, 2))
    table = torch.randn(7**3, 4, generator=DRAW).requires_grad_()

    def run() -> None:
        for qkv, window, shift in (video, image):
            windows = kernels.Windows(tuple(qkv.shape[1:4]), window, (4, 4, 4), shift, shift)
            for _ in range(16):
                kernels.window_attention(qkv.requires_grad_(), table, windows).sum().backward()

    return run


def head() -> Run:
    """Rows, shared head and loss, forward and backward."""
    x, weight = (torch.randn(n, 256, generator=DRAW).requires_grad_() for n in (1024, 4096))
    bias, rows = torch.zeros(4096, requires_grad=True), torch.arange(0, 1024, 2)
    target = torch.randint(4096, (512,), generator=DRAW)

    def run() -> None:
        for _ in range(4):
            chosen = kernels.gather_masked(x, rows)
            loss, _ = kernels.masked_cross_entropy(chosen, weight, bias, target, (256, 256))
            loss.sum().backward()

    return run


def tokenizer() -> Run:
    """DALL-E's encoder with random weights, at a small width."""
    from bevt_ds.model.tokenizers.dalle import DalleTokenizer

    encoder = DalleTokenizer(n_hid=32, vocab_size=512)
    for parameter in encoder.parameters():
        parameter.normal_(std=0.05, generator=DRAW)
    images = torch.rand(48, 3, 64, 64, generator=DRAW)
    return lambda: encoder.encode(images)


def step() -> Run:
    """The training program's step: tokenizer, forward, backward, update under DeepSpeed, tiny model."""
    from benchmarks.scaling_worker import Job, set_up
    from bevt_ds.train.loop import train_step

    task, batch = set_up(Job(ranks=1, zero=2, micro_steps=1, model="tiny", micro_clips=1, micro_images=2, steps=1))
    return lambda: train_step(task, iter([batch]), 0)


def loader() -> Run:
    """A loader from its start to its end, over the committed shards."""
    from dataclasses import replace

    from bevt_ds.config.recipes import demo
    from bevt_ds.data.loader import Loader

    folder = tempfile.mkdtemp()  # copied, so that the index written next to them is not committed
    for tar in SHARDS.glob("*.tar"):
        shutil.copy(tar, folder)
    recipe = demo()
    shards = {"videos": f"{folder}/clips-000000.tar", "images": f"{folder}/images-000000.tar"}
    config = replace(recipe, data=replace(recipe.data, **shards))

    def run() -> None:
        with Loader(config) as batches:
            list(islice(batches, 6))

    return run


CASES = {case.__name__: case for case in (attention, head, tokenizer, step, loader)}

if __name__ == "__main__":
    serve(CASES, bevt_ds.__file__)
