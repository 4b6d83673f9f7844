"""Tile sizes of the kernels: tables by architecture, no autotuning at run time.

An autotuner would make the first step slow, the results depend on timing noise, and the interpreter
unusable. `python -m benchmarks.kernels --sweep` times the candidates on a GPU and prints the entry of its architecture.
Change one only with a measurement, and run `python -m bevt_ds.kernels.check` after it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

PROGRAMS = 4 * 132  # enough to fill the largest GPU we know several times over; fixed, so results are too
# Of kernels whose programs walk over small windows: as many as run at one time, by their registers on sm_90. A second
# wave would find most of the GPU idle.
SMALL_PROGRAMS = {"fwd_small": 3 * 132, "bwd_small": 2 * 132}

PREPARE = 512  # table rows or codes of a program of prepare_kernel
STATS = 128  # tokens of a program that makes delta; codes are padded to a multiple
SMALL_WINDOW = 64  # tokens up to which one tile holds a window
WIDE = 64  # heads from this width on need smaller tiles or more warps, or they spill
BIAS_TILE = {"BLOCK": 64, "num_warps": 4}  # rows and columns of a program of bias_tile_kernel
BIAS_TILE_BYTES = 64 * 2**20  # up to which a call makes a tile of biases: more would not stay in the cache
FOLD = {"BLOCK": 128, "ROWS": 16, "num_warps": 4}  # queries and neighbouring offsets of a step of fold_pairs
SUM_SCORES = {"BLOCK": 1024, "num_warps": 4}  # elements of dS of a step of sum_scores
SCORES_BYTES = 128 * 2**20  # of dS in memory at one time: a batch that needs more goes through in parts

Options = dict[str, int]  # of a launch: its tile's sizes, num_warps, num_stages
Key = tuple[str, str]  # kernel, kind of its numbers
TILED = ", bias tile"  # added to the kind where the kernel reads its biases from a tile


def tiles(m: int, n: int, tail: int, warps: int, stages: int) -> Options:
    """A kernel's outer tile of m, walked over in steps of n, what is left of the window in steps of `tail`."""
    return {"BLOCK_M": m, "BLOCK_N": n, "TAIL": tail, "num_warps": warps, "num_stages": stages}


def scores(
    m: int, n: int, tail: int, warps: int, stages: int, *, last: int = 0, registers: int | None = None
) -> Options:
    """`tiles` of a kernel that makes scores, whose outer tile may be of `last` where no more than that is left.

    registers: the most that a thread may have, so that as many programs share a multiprocessor as are meant to.
    """
    return {**tiles(m, n, tail, warps, stages), "LAST": last} | ({} if registers is None else {"maxnreg": registers})


def warps(count: int, stages: int) -> Options:
    """Of a kernel whose one tile holds a window."""
    return {"num_warps": count, "num_stages": stages}


# Architectures that were not measured. No larger tiles, and no pipelining but of bwd_q, which is one plain product:
# Triton 3.6 was seen to miscompile 64x128 tiles of 32-wide heads with two stages in a backward pass
# (triton-lang/triton#10573).
DEFAULT: dict[Key, Options] = {
    ("fwd", "16 bit"): scores(64, 64, 16, 4, 1),
    ("fwd", "16 bit, wide"): scores(64, 64, 16, 4, 1),
    ("fwd", "fp32"): scores(32, 32, 16, 4, 1),
    ("fwd", "fp32, wide"): scores(32, 32, 16, 4, 1),
    ("fwd_small", "16 bit"): warps(4, 1),
    ("fwd_small", "16 bit, wide"): warps(4, 1),
    ("fwd_small", "fp32"): warps(8, 1),
    ("fwd_small", "fp32, wide"): warps(8, 1),
    ("bwd_kv", "16 bit"): scores(64, 32, 16, 4, 1),
    ("bwd_kv", "16 bit, wide"): scores(64, 32, 16, 4, 1),
    ("bwd_kv", "fp32"): scores(32, 32, 16, 8, 1),
    ("bwd_kv", "fp32, wide"): scores(32, 16, 16, 8, 1),
    ("bwd_q", "16 bit"): tiles(64, 64, 16, 4, 2),
    ("bwd_q", "16 bit, wide"): tiles(64, 64, 16, 4, 2),
    ("bwd_q", "fp32"): tiles(32, 32, 16, 4, 1),
    ("bwd_q", "fp32, wide"): tiles(32, 32, 16, 4, 1),
    ("bwd_small", "16 bit"): warps(4, 1),
    ("bwd_small", "16 bit, wide"): warps(4, 1),
    ("bwd_small", "fp32"): warps(8, 1),
    ("bwd_small", "fp32, wide"): warps(4, 1),
}

# What differs from DEFAULT for an architecture. sm_90 comes from one sweep: one H200, Triton 3.6.0, Swin-B in bf16,
# 2026-11-26, each tile compared with that of DEFAULT, with the kernels of commit 781b91b
# (benchmarks/results/h200/attention-tiles-sweep.jsonl). No entry was measured with a later kernel or a later Triton.
# fwd: first in the sum by depth. Measured on the one before, whose table carried a factor log2(e); else it is the same.
# bwd_kv: first of those that spill nothing now. Measured on the one before, which walked over regions and kept no dS.
# bwd_small: 20 to 25 % less time. Measured on the one before, which read `out` and had the bias without its mask.
# fwd, bwd_kv with a bias tile: chosen by counted traffic (benchmarks/kernels_model.py), never measured. An architecture
# without such entries gathers its biases.
# fwd_small: chosen as bwd_small. The kernel is newer than the sweep: never measured.
MEASURED: dict[str, dict[Key, Options]] = {
    "sm_90": {
        ("fwd", "16 bit"): scores(128, 64, 16, 4, 3),
        ("fwd", "16 bit, bias tile"): scores(128, 64, 16, 4, 3, last=16),
        ("bwd_kv", "16 bit, bias tile"): scores(128, 32, 16, 4, 1, last=16),
        ("bwd_kv", "16 bit"): scores(128, 32, 16, 4, 1),
        ("bwd_small", "16 bit"): warps(4, 2),
        ("fwd_small", "16 bit"): warps(4, 2),
    },
}


def kind(dtype: torch.dtype, width: int) -> str:
    """Which entries are for heads `width` wide of that type."""
    return ("fp32" if dtype == torch.float32 else "16 bit") + (", wide" if width >= WIDE else "")


def options(architecture: str, kernel: str, dtype: torch.dtype, width: int) -> Options:
    """The launch options of an attention kernel; architecture: sm_90 for compute capability 9.0."""
    key = (kernel, kind(dtype, width))
    found = MEASURED.get(architecture, {}).get(key) or DEFAULT[key]
    return found | {"TILED": False} if "LAST" in found else found


def bias_tile_options(architecture: str, kernel: str, dtype: torch.dtype, width: int) -> Options | None:
    """The launch options of an attention kernel that reads its biases from a tile, or None where the architecture's
    gathers them."""
    found = MEASURED.get(architecture, {}).get((kernel, kind(dtype, width) + TILED))
    return None if found is None else found | {"TILED": True}


@contextmanager
def replaced(architecture: str, key: Key, candidate: Options | None) -> Iterator[None]:
    """While it lasts, `candidate` is what the table holds; None: nothing."""
    rows = MEASURED.setdefault(architecture, {})

    def put(found: Options | None) -> None:
        rows.pop(key, None)
        if found is not None:
            rows[key] = found

    before = rows.get(key)
    put(candidate)
    try:
        yield
    finally:
        put(before)


def splits(programs: int, tokens: int, block: int) -> int:
    """Over how many programs to spread the outer tiles of a window, so that small maps fill a GPU."""
    return max(1, min(-(-tokens // block), -(-PROGRAMS // max(programs, 1))))


def forward_is_small(tokens: int, width: int, dtype: torch.dtype) -> bool:
    """Whether a window fits one tile in the forward pass."""
    return tokens <= (32 if kind(dtype, width) == "fp32, wide" else SMALL_WINDOW)


def backward_is_small(tokens: int, width: int) -> bool:
    """Whether one kernel does all of the backward pass. Tiles of wide heads fit the registers up to 32 tokens."""
    return tokens <= (SMALL_WINDOW if width < WIDE else 32)


def small_block(tokens: int) -> int:
    """Side of the tile that holds a small window."""
    return next(side for side in (16, 32, SMALL_WINDOW) if tokens <= side)


def small_groups(kernel: str, windows: int, heads: int) -> int:
    """Over how many programs a head's windows are spread, where a program walks over windows."""
    return max(1, min(windows, SMALL_PROGRAMS[kernel] // heads))


def cross_entropy_tiles(vocabulary: int) -> Options:
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
