"""The one place where kernels start: it counts them, or records them instead for `check`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor

from .configs import Tiles
from .geometry import Windows


class Launch(NamedTuple):
    """A launch that was recorded and not made."""

    kernel: Any  # the function behind @triton.jit, or its interpreted form
    args: tuple[Any, ...]
    options: dict[str, Any]  # constexpr arguments by name, num_warps, num_stages


_counts: Counter[str] = Counter()
_recording: list[list[Launch]] = []


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """kernel[grid](*args, **options), counted under the kernel's name; an empty grid starts nothing."""
    if _recording:
        _recording[-1].append(Launch(kernel, args, options))
    elif all(grid):
        _counts[kernel.fn.__name__] += 1
        kernel[grid](*args, **options)


def launch_regions(kernel: Any, tensors: tuple[Tensor, ...], tiles: Tiles, windows: Windows, scale: float) -> None:
    """Start an attention kernel that has a program, or a few, for every region and head; tensors[0] is qkv."""
    batch, heads, d = tensors[0].shape[0], *tensors[0].shape[5:]
    programs = batch * windows.regions * heads
    splits = tiles.splits(programs, windows.tokens)
    sizes = (scale, heads, splits, *windows.scalars)
    options = {"D": d, "WRAP": windows.wraps, **tiles.options()}
    launch(kernel, (programs * splits,), *tensors, *sizes, **options)


@contextmanager
def record() -> Iterator[list[Launch]]:
    """Collects launches while it lasts and makes none: launchers then run on tensors of the meta device."""
    _recording.append([])
    try:
        yield _recording[-1]
    finally:
        _recording.pop()


def launch_counts() -> dict[str, int]:
    """Kernels started, by name, since the process began or since `reset_launch_counts`."""
    return dict(_counts)


def reset_launch_counts() -> None:
    """Count from zero."""
    _counts.clear()
