"""Comparing batches."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any

import torch


def assert_same(a: Any, b: Any, place: str = "") -> None:
    """Lists, dataclasses, tensors and plain values are equal to the last bit; the message has the place in them."""
    if isinstance(a, list):
        assert len(a) == len(b), place
        for i, pair in enumerate(zip(a, b, strict=True)):
            assert_same(*pair, f"{place}[{i}]")
    elif is_dataclass(a):
        for field in fields(a):
            assert_same(getattr(a, field.name), getattr(b, field.name), f"{place}.{field.name}")
    else:
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, place
