"""Which implementation runs an op, decided per call from the provider's name and the tensor's device."""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
from functools import lru_cache

import torch

PROVIDERS = ("auto", "triton", "torch")
TRITON_INSTALLED = importlib.util.find_spec("triton") is not None

_log = logging.getLogger(__name__)


def interpreting() -> bool:
    """Whether Triton kernels run in Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _compiles() -> bool:
    """Whether triton was imported as a compiler; it looks at TRITON_INTERPRET at that moment."""
    triton = sys.modules.get("triton")
    return triton is not None and isinstance(triton.language.cdiv, triton.runtime.JITFunction)


def why_not_triton(device: torch.device) -> str | None:
    """The reason for which the kernels cannot run on tensors of `device`, or None where they can."""
    if not TRITON_INSTALLED:
        return "the package triton is not installed"
    if device.type == "meta":  # nothing runs: the operators give the shapes that a GPU would
        return None
    if device.type == "cpu" and not interpreting():
        return "the tensors are on a CPU and TRITON_INTERPRET=1 is not set"
    if device.type == "cpu":
        return "TRITON_INTERPRET=1 was set after triton had been imported" if _compiles() else None
    if device.type != "cuda" or torch.version.hip:
        return "there are kernels for NVIDIA GPUs only"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "the GPU is older than compute capability 8.0"
    return None


def _decide(provider: str, device: torch.device) -> tuple[str, str | None]:
    """The provider, and why it is not triton."""
    if provider not in PROVIDERS:
        raise ValueError(f"kernels={provider!r}: choose one of {', '.join(PROVIDERS)}")
    if provider == "torch":
        return "torch", None
    reason = why_not_triton(device)
    if provider == "triton" and reason:
        raise RuntimeError(f"kernels='triton' cannot run: {reason}; use kernels='auto' or 'torch'")
    if provider == "auto" and device.type == "cpu":
        return "torch", "the tensors are on a CPU"
    return "torch" if reason else "triton", reason


@lru_cache(maxsize=32)
def _decide_and_say(provider: str, device: torch.device) -> str:
    decision, reason = _decide(provider, device)
    if reason:
        level = logging.INFO if device.type == "cpu" else logging.WARNING
        _log.log(level, "kernels: torch instead of triton, because %s", reason)
    return decision


def resolve(provider: str, device: torch.device) -> str:
    """'triton' or 'torch' for a request of `auto`, `triton` or `torch`; logs once what `auto` became.

    `auto` never interprets: a CPU gets `torch`. Raises ValueError for an unknown name and RuntimeError, with the
    reason, where `triton` was asked for and cannot run.
    """
    if torch.compiler.is_compiling():  # the tracer takes neither caches nor logging
        return _decide(provider, device)[0]
    return _decide_and_say(provider, device)
