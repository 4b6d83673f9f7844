"""Which implementation runs an op, decided per call from the provider's name and the tensor's device."""

from __future__ import annotations

import importlib.util
import logging
import os
from functools import lru_cache

import torch

PROVIDERS = ("auto", "triton", "torch")

_log = logging.getLogger(__name__)


def interpreting() -> bool:
    """Whether Triton kernels run in Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def why_not_triton(device: torch.device) -> str | None:
    """The reason for which Triton kernels cannot run on tensors of `device`, or None where they can."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if device.type == "cpu":
        return None if interpreting() else "the tensors are on a CPU and TRITON_INTERPRET=1 is not set"
    if device.type != "cuda":
        return f"there are no kernels for {device.type} tensors"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return "the GPU is older than compute capability 8.0"
    return None


@lru_cache(maxsize=32)
def resolve(provider: str, device: torch.device) -> str:
    """'triton' or 'torch' for a request of `auto`, `triton` or `torch`; says once what `auto` became.

    `auto` never interprets: a CPU gets `torch`. Raises ValueError for an unknown name and RuntimeError, with the
    reason, where `triton` was asked for and cannot run.
    """
    if provider not in PROVIDERS:
        raise ValueError(f"kernels={provider!r}: choose one of {', '.join(PROVIDERS)}")
    if provider == "torch":
        return "torch"
    reason = why_not_triton(device)
    if provider == "triton":
        if reason:
            raise RuntimeError(f"kernels='triton' cannot run: {reason}; use kernels='auto' or 'torch'")
        return "triton"
    if device.type == "cpu":
        _log.info("kernels: torch (CPU tensors)")
        return "torch"
    if reason:
        _log.warning("kernels: torch instead of triton, because %s", reason)
    return "torch" if reason else "triton"
