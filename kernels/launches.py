"""The one place where kernels start: it counts them, or records them instead for `check`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .configs import Options, options, small_block, splits
from .geometry import Windows


class Launch(NamedTuple):
    """A launch that was recorded."""

    kernel: Any  # the function behind @triton.jit, or its interpreted form
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    options: dict[str, Any]  # constexpr arguments by name, num_warps, num_stages

    def again(self) -> None:
        """Makes it, uncounted. Triton starts kernels on the current device: that of the tensors becomes it."""
        device = next((x.device for x in self.args if isinstance(x, Tensor) and x.is_cuda), None)
        if device is None or device.index == torch.cuda.current_device():
            self.kernel[self.grid](*self.args, **self.options)
        else:
            with torch.cuda.device(device):
                self.kernel[self.grid](*self.args, **self.options)


class Recording(NamedTuple):
    """What `record` notes down."""

    architecture: str
    runs: bool  # whether the launches are made too
    launches: list[Launch]


_counts: Counter[str] = Counter()
_recording: list[Recording] = []


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """kernel[grid](*args, **options), counted under the kernel's name; an empty grid starts nothing."""
    made = Launch(kernel, grid, args, options)
    if _recording:
        _recording[-1].launches.append(made)
    if all(grid) and (not _recording or _recording[-1].runs):
        _counts[kernel.fn.__name__] += 1
        made.again()


@cache
def _capability(device: torch.device) -> str:
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


def architecture(device: torch.device) -> str:
    """Which rows of the table of tiles are for a device; that of `record` where nothing is launched."""
    if _recording:
        return _recording[-1].architecture
    return _capability(device) if device.type == "cuda" else "interpreter"


def options_of(kernel: str, qkv: Tensor) -> Options:
    """The launch options of an attention kernel, heads' width among them; qkv (B, T, H, W, 3, h, d)."""
    d = qkv.shape[-1]
    return {"D": d, **options(architecture(qkv.device), kernel, qkv.dtype, d)}


def launch_regions(kernel: Any, tile: Options, tensors: tuple[Tensor, ...], windows: Windows, scale: float) -> None:
    """Start an attention kernel that has a program, or a few, for every region and head; tensors[0] is qkv."""
    batch, heads = tensors[0].shape[0], tensors[0].shape[5]
    programs = batch * windows.regions * heads
    parts = splits(programs, windows.tokens, tile["BLOCK_M"])
    launch(
        kernel, (programs * parts,), *tensors, scale, heads, parts, *windows.scalars, WRAP=windows.wraps, **tile
    )  # fmt: skip


def launch_windows(
    kernel: Any, tile: Options, tensors: tuple[Tensor, ...], windows: Windows, scale: float, first: int, count: int
) -> None:
    """Start an attention kernel that has a program, or a few, for every head of `count` windows from `first` on."""
    heads = tensors[0].shape[5]
    parts = splits(count * heads, windows.tokens, tile["BLOCK_M"])
    sizes = (scale, heads, parts, first, *windows.scalars)
    launch(kernel, (count * heads * parts,), *tensors, *sizes, WRAP=any(windows.shift), **tile)


def launch_small_windows(
    kernel: Any, name: str, tensors: tuple[Tensor, ...], windows: Windows, scale: float, groups: int
) -> None:
    """Start an attention kernel whose programs, `groups` for each head, walk over windows, one tile each."""
    batch, heads = tensors[0].shape[0], tensors[0].shape[5]
    sizes = (scale, heads, batch, groups, *windows.scalars)
    tile = options_of(name, tensors[0]) | {"BLOCK": small_block(windows.tokens)}
    launch(kernel, (groups * heads,), *tensors, *sizes, **tile)


@contextmanager
def record(architecture: str, runs: bool = False) -> Iterator[list[Launch]]:
    """Collects launches while it lasts, with the tiles of the architecture. Unless it `runs` them too, none is made:
    launchers then work on tensors of the meta device."""
    _recording.append(Recording(architecture, runs, []))
    try:
        yield _recording[-1].launches
    finally:
        _recording.pop()


def launch_counts() -> dict[str, int]:
    """Kernels started, by name, since the process began or since `reset_launch_counts`."""
    return dict(_counts)


def reset_launch_counts() -> None:
    """Count from zero."""
    _counts.clear()
