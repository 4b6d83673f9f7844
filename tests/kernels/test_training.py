"""Training a small two-stage model with the kernels and in plain PyTorch: the same losses."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bevt_ds import kernels

STEPS = 8
VOCABULARY = 24


class Block(nn.Module):
    """Pre-norm attention in windows, and an MLP."""

    def __init__(self, width, window, shift, mask_shift, provider):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.table = nn.Parameter(0.02 * torch.randn(7 * 7, width // 16))
        self.window, self.shift, self.mask_shift = window, shift, mask_shift
        self.provider = provider

    def forward(self, x):
        first, second = ((norm.weight, norm.bias, norm.eps, self.provider) for norm in self.norms)
        qkv = self.qkv(kernels.layer_norm(x, *first)).unflatten(-1, (3, -1, 16))
        windows = kernels.Windows(tuple(x.shape[1:4]), self.window, (1, 4, 4), self.shift, self.mask_shift)
        branch = self.proj(kernels.window_attention(qkv, self.table, windows, provider=self.provider))
        scale = torch.full((len(x),), 1.25, device=x.device)
        x, normed = kernels.add_norm(x, branch, scale, *second)
        hidden = kernels.linear_gelu(normed, self.fc1.weight, self.fc1.bias, self.provider)
        return kernels.add_scaled(x, self.fc2(hidden), scale, self.provider)


class TwoStages(nn.Module):
    """Mask tokens, two blocks, 2x2 merging, one block, the masked head: every op of the package."""

    def __init__(self, provider):
        super().__init__()
        self.embed, self.merge = nn.Linear(12, 16), nn.Linear(64, 32)
        self.mask_token = nn.Parameter(torch.zeros(16))
        self.first = nn.Sequential(
            Block(16, (1, 4, 4), (0, 0, 0), (0, 0, 2), provider),
            Block(16, (1, 4, 4), (0, 0, 2), (0, 0, 2), provider),
        )
        self.second = Block(32, (1, 2, 4), (0, 0, 0), (0, 0, 0), provider)
        self.head = nn.Linear(32, VOCABULARY)
        self.provider = provider

    def forward(self, tokens, mask, rows, target):
        x = kernels.insert_mask_tokens(self.embed(tokens), self.mask_token, mask, self.provider)
        x = self.first(x).unflatten(3, (4, 2)).unflatten(2, (2, 2))  # (B, T, 2, 2, 4, 2, C)
        x = self.second(self.merge(x.transpose(3, 4).flatten(-3)))
        h = kernels.gather_masked(x.flatten(0, 3), rows, self.provider)
        segments = (len(rows) // 2, len(rows) - len(rows) // 2)
        losses, _ = kernels.masked_cross_entropy(h, self.head.weight, self.head.bias, target, segments, self.provider)
        return losses.sum() / len(rows)


def sample(dtype, device):
    """Tokens, mask, masked rows with three of padding, targets."""
    tokens = torch.randn(1, 1, 4, 8, 12).to(device, dtype)
    mask = (torch.rand(1, 1, 2, 4) < 0.6).to(device)
    rows = F.pad(mask.flatten().cpu().nonzero()[:, 0], (0, 3), value=-1).to(device)
    target = torch.randint(VOCABULARY, (len(rows),)).to(device).masked_fill(rows < 0, -100)
    return tokens, mask, rows, target


def train(provider, dtype, device):
    """The loss of each step."""
    torch.manual_seed(1)
    model = TwoStages(provider).to(device, dtype)
    inputs = sample(dtype, device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(STEPS):
        loss = model(*inputs)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses, dtype=torch.float64)


def test_training_losses_with_and_without_kernels(device):
    """The kernels' curve is as close to the float64 curve as PyTorch's own, within a factor of three.

    The floor is what fp32 roundings of 6e-8 grow to in 8 steps of this model, times ten.
    """
    exact = train("torch", torch.float64, device)
    plain = train("torch", torch.float32, device)
    kernels.reset_launch_counts()
    ours = train("triton", torch.float32, device)
    assert kernels.launch_counts()["window_attention_fwd_small_kernel"] == 3 * STEPS
    assert exact[-1] < 0.5 * exact[0]
    error = ((ours - exact) / exact).abs().max()
    allowed = 3 * ((plain - exact) / exact).abs().max() + 1e-5
    assert error <= allowed, f"{error:.2e} > {allowed:.2e}"


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_kernels_under_zero_stages(stage):
    """DeepSpeed's partitioned gradients and parameters, gathered around modules, reach the kernels intact."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    rank = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    program = Path(__file__).with_name("zero_run.py")
    done = subprocess.run(
        [sys.executable, str(program), str(stage)], env=os.environ | rank, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    plain, ours = json.loads(done.stdout.splitlines()[-1])
    assert plain[-1] < plain[0]
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(plain), rtol=1e-5, atol=0)
