"""Choice of the kernels' provider (torch or triton), and its messages."""

import logging
import os
import subprocess
import sys

import pytest
import torch

from bevt_ds import kernels
from bevt_ds.kernels import providers

CPU = torch.device("cpu")


@pytest.fixture
def fresh(monkeypatch):
    """Nothing resolved yet, TRITON_INTERPRET as a test sets it; undone afterwards."""
    providers._decide_and_say.cache_clear()
    yield monkeypatch
    providers._decide_and_say.cache_clear()


def test_provider_auto_on_a_cpu_is_torch_without_a_warning(fresh, caplog):
    """The expected path: said once, quietly."""
    with caplog.at_level(logging.INFO):
        assert [kernels.resolve("auto", CPU) for _ in range(3)] == ["torch"] * 3
    assert [record.levelname for record in caplog.records] == ["INFO"]


def test_provider_auto_warns_once_on_a_gpu_without_kernels(fresh, caplog):
    """One warning, with the reason."""
    fresh.setattr(providers, "why_not_triton", lambda device: "the package triton is not installed")
    for _ in range(3):
        assert kernels.resolve("auto", torch.device("cuda", 0)) == "torch"
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "triton is not installed" in caplog.text


def test_provider_triton_raises_where_it_cannot_run(fresh):
    """On a CPU without the interpreter, and without the package."""
    fresh.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1 is not set"):
        kernels.gather_masked(torch.zeros(2, 16), torch.tensor([0]), "triton")
    fresh.setattr(providers, "TRITON_INSTALLED", False)
    with pytest.raises(RuntimeError, match="not installed"):
        kernels.resolve("triton", CPU)


def test_triton_interpret_set_too_late_is_explained():
    """TRITON_INTERPRET set after `import triton` is too late, and says so."""
    code = (
        "import triton, os, torch; os.environ['TRITON_INTERPRET'] = '1'; from bevt_ds import kernels; "
        "kernels.resolve('triton', torch.device('cpu'))"
    )
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "after triton had been imported" in done.stderr


def test_unknown_provider_lists_the_known():
    """A misspelt name."""
    with pytest.raises(ValueError, match="auto, triton, torch"):
        kernels.resolve("cuda", CPU)


def test_torch_provider_launches_nothing():
    """And does not load the kernels."""
    kernels.gather_masked(torch.zeros(2, 16), torch.tensor([0]), "torch")
    assert kernels.launch_counts() == {}


@pytest.mark.skipif(torch.cuda.is_available(), reason="about the interpreter")
def test_dtypes_the_interpreter_gets_wrong_are_refused():
    """bfloat16, and float64, which no kernel computes."""
    for dtype, message in ((torch.bfloat16, "interpreter"), (torch.float64, "float64")):
        with pytest.raises(TypeError, match=message):
            kernels.gather_masked(torch.zeros(2, 16, dtype=dtype), torch.tensor([0]), "triton")


def test_importing_kernels_does_not_import_triton():
    """`bevt_ds.kernels` needs torch alone until a kernel runs."""
    code = "import sys, bevt_ds.kernels; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    roots = {name.partition(".")[0] for name in done.stdout.split()}
    assert "torch" in roots
    assert not roots & {"triton", "deepspeed", "timm", "einops"}
    assert "bevt_ds.model" not in done.stdout
