"""Tile sizes of the kernels: an explicit table, no autotuning at run time.

An autotuner would make the first step slow, the results depend on timing noise, and the interpreter
unusable. Change an entry only with a measurement, and run `python -m bevt_ds.kernels.check` after it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

PROGRAMS = 4 * 132  # enough to fill the largest GPU we know several times over; fixed, so results are too

PREPARE = 512  # table rows or codes of a program of prepare_kernel
SMALL_WINDOW = 64  # tokens up to which one tile holds a window
WIDE = 64  # heads from this width on need smaller tiles or more warps, or they spill
FOLD = {"BLOCK": 64, "ROWS": 16, "num_warps": 4}  # queries and neighbouring offsets of a step of fold_pairs


@dataclass(frozen=True)
class Tiles:
    """Launch configuration of one attention kernel."""

    block_m: int  # queries
    block_n: int  # keys
    tail: int  # width of the steps over what is left of the keys (or queries) after whole blocks
    warps: int
    stages: int

    def options(self) -> dict[str, int]:
        """Keyword arguments of the launch."""
        return {
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "TAIL": self.tail,
            "num_warps": self.warps,
            "num_stages": self.stages,
        }

    def splits(self, programs: int, tokens: int) -> int:
        """Over how many programs to spread the outer tiles of a window, so that small maps fill a GPU."""
        return max(1, min(-(-tokens // self.block_m), -(-PROGRAMS // max(programs, 1))))


def forward_tiles(tokens: int, dtype: torch.dtype) -> Tiles:
    """Tiles of the forward kernel; images, 49 tokens, take one step over their keys."""
    if dtype == torch.float32:
        return Tiles(32, 32, 16, 4, 1)
    return Tiles(64, 64, 64 if tokens <= SMALL_WINDOW else 16, 4, 1)


def query_tiles(dtype: torch.dtype, width: int) -> Tiles:
    """Tiles of the backward kernel for dq, of heads `width` wide.

    Here and below no larger and without pipelining: Triton 3.6 was seen to miscompile 64x128 tiles of
    32-wide heads with two stages (triton-lang/triton#10573).
    """
    if dtype == torch.float32:
        return Tiles(32, 32, 16, 4 if width < WIDE else 8, 1)
    return Tiles(64, 64, 16, 4, 1)


def key_tiles(dtype: torch.dtype, width: int) -> Tiles:
    """Tiles of the backward kernel for dk and dv: `block_m` keys, `block_n` queries."""
    if dtype == torch.float32:
        return Tiles(32, 32, 16, 4 if width < WIDE else 8, 1)
    return Tiles(64, 32, 16, 4, 1)


def pair_tiles(dtype: torch.dtype, width: int) -> dict[str, int]:
    """Tile of the kernel that sums dS over windows."""
    if dtype == torch.float32:
        return {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 4, "num_stages": 1}
    return {"BLOCK_M": 64, "BLOCK_N": 64 if width < WIDE else 32, "num_warps": 4, "num_stages": 1}


def is_small(tokens: int, width: int) -> bool:
    """Whether one kernel does all of the backward pass. Tiles of wide heads fit the registers up to 32 tokens."""
    return tokens <= (SMALL_WINDOW if width < WIDE else 32)


def small_tiles(tokens: int, dtype: torch.dtype) -> dict[str, int]:
    """Tile of the backward kernel for small windows."""
    side = next(side for side in (16, 32, SMALL_WINDOW) if tokens <= side)
    warps = 8 if side == SMALL_WINDOW and dtype == torch.float32 else 4
    return {"BLOCK": side, "num_warps": warps, "num_stages": 1}


def pair_groups(windows: int, programs: int) -> int:
    """Over how many groups of windows to spread a sum that has `programs` independent parts."""
    return max(1, min(windows, PROGRAMS // programs))


def cross_entropy_tiles(vocabulary: int) -> dict[str, int]:
    """Columns of the logits that a program takes at a time; BEVT's 8192 are one block of 16 KB."""
    block = min(8192, 1 << (vocabulary - 1).bit_length())
    return {"BLOCK": block, "num_warps": 8 if block >= 4096 else 4, "num_stages": 1}


SUM = {"ROWS": 64, "COLUMNS": 32, "num_warps": 4}  # of a step of sum_partials_kernel
NORM_CHANNELS = 16384  # up to which a program's registers hold a row
ROWS_LEAST = 16  # of a program that sums over rows: fewer, and the partial sums move as much memory as the rows


def norm_tiles(channels: int) -> dict[str, int]:
    """Rows and channels of a step of the norm's kernels: 16 values a thread, 32 of the widest rows."""
    block = max(16, 1 << (channels - 1).bit_length())
    return {"ROWS": max(1, min(32, 2048 // block)), "BLOCK_C": block, "num_warps": max(4, min(16, block // 512))}


def norm_programs(rows: int, step: int) -> int:
    """Programs of the norm's backward kernel, `step` rows at a time."""
    return min(PROGRAMS, -(-rows // max(step, ROWS_LEAST)))


def gelu_tiles(channels: int) -> dict[str, int]:
    """Rows and channels of a step of the GELU's kernels: 16 values a thread."""
    block = max(16, min(512, 1 << (channels - 1).bit_length()))
    return {"ROWS": min(32, 2048 // block), "BLOCK_C": block, "num_warps": 4}


def gelu_programs(rows: int, across: int, step: int) -> int:
    """Programs along the rows of the GELU's backward kernel, next to `across` along the channels."""
    return min(max(1, PROGRAMS // across), -(-rows // max(step, ROWS_LEAST)))


EPILOGUE_PIXELS = 256  # of a program of scale_pixels_kernel


def epilogue_tiles(channels: int) -> dict[str, int]:
    """Rows and channels of a program around a convolution: 16 values a thread, which move at most 4 maps."""
    block = max(16, min(256, 1 << (channels - 1).bit_length()))
    return {"ROWS": 2048 // block, "BLOCK_C": block, "num_warps": 4}
