"""The kernels' package needs torch and triton alone."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]

PROGRAM = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ABSENT:
            raise ModuleNotFoundError(name, name=name)

sys.meta_path.insert(0, Refuse())
import torch
from bevt_ds.kernels import Windows, accelerate, window_attention

windows = Windows((2, 4, 4), (2, 2, 2), (2, 2, 2), (0, 1, 1), (0, 1, 1))
qkv = torch.randn(1, 2, 4, 4, 3, 2, 16, requires_grad=True)
table = torch.randn(windows.table_rows, 2, requires_grad=True)
window_attention(qkv, table, windows).sum().backward()
import bevt_ds.kernels.attention_backward
print(qkv.grad.isfinite().all().item(), str(accelerate(torch.nn.Linear(2, 2))))
"""


def test_kernels_need_torch_and_triton_alone():
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    names = {line.split(";")[0].split("[")[0].split(">")[0].split("=")[0].split("<")[0].strip() for line in wanted}
    modules = {name.replace("-", "_") for name in names} - {"torch", "triton"} | {"yaml"}
    assert {"deepspeed", "timm", "einops", "webdataset"} <= modules
    absent = {m for m in modules if not m.startswith("nvidia")} | {"matplotlib", "torchvision", "transformers"}
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}  # the interpreter needs numpy
    program = PROGRAM.replace("ABSENT", repr(absent))
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, cwd=ROOT)
    assert done.stdout.strip() == "True 0 replaced, 0 left", done.stderr
