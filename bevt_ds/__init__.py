"""BEVT pretraining on DeepSpeed. Public names load lazily: a decode worker must not import torch."""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "BEVT": "bevt_ds.model.bevt",
    "VideoSwin": "bevt_ds.model.video_swin",
    "create_model": "bevt_ds.model.presets",
    "load_tokenizer": "bevt_ds.model.tokenizers",
    "Batch": "bevt_ds.batch",
    "Stream": "bevt_ds.batch",
    "UserError": "bevt_ds.errors",
}
__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'bevt_ds' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)
