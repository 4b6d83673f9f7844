"""What bounds the attention kernels on an H200, by counting: `python -m benchmarks.kernels_model`.

Nothing is run. Of every shipped configuration for sm_90 it prints, from the table of compiled code, how many programs
share a multiprocessor; and of the kernels that make scores, how long the load unit, the exponentials and the
second-level cache take for Swin-B's blocks, of which the largest is a lower bound of the kernel's time. The clocks of a
gather are fitted to the forward kernel of 781b91b over its tiles; the other rates are those of the hardware.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import triton

from bevt_ds.kernels import configs
from bevt_ds.kernels.configs import Options

from .kernels_cases import HEAD_DIM, Case, default_cases

SMS, CLOCK = 132, 1.755e9  # of an H200; clocks a second
REGISTERS, SHARED, WARPS = 65536, 227 * 1024, 64  # of a multiprocessor
GATHER = 8.0  # clocks of the load unit for a bias each of 32 scores, wherever they lie
LINE = 128  # bytes that the load unit moves a clock
EXPS = 16  # a clock
CACHE = 5.5e12 / SMS / CLOCK  # bytes a clock and multiprocessor from the second-level cache
TABLE = Path(configs.__file__).with_name(f"compiled_{triton.__version__}.json")


def programs(registers: int, shared: int, warps: int) -> int:
    """How many programs share a multiprocessor: registers come in eights, and a program takes 1 KB of shared memory
    more."""
    return min(REGISTERS // (-(-registers // 8) * 8 * 32 * warps), SHARED // (shared + 1024), WARPS // warps)


def padded(tokens: int, tile: Options) -> int:
    """Scores that a window's tiles hold, those past its end too."""
    m, n, tail, last = tile["BLOCK_M"], tile["BLOCK_N"], tile["TAIL"], tile.get("LAST", 0)
    whole = -(-max(tokens - last, 0) // m) * m
    steps = tokens // n * n
    return (whole + last * (whole < tokens)) * (steps + -(-(tokens - steps) // tail) * tail)


@dataclass(frozen=True)
class Walls:
    """Microseconds of one pass over a case."""

    load: float
    exp: float
    cache: float

    @classmethod
    def of(cls, case: Case, tile: Options, tiled: bool, backward: bool) -> Walls:
        """backward: of the kernel of keys, which reads q and the output's gradient in place of k and v, and writes
        dS."""
        count = case.batch * case.heads * case.windows.whole * padded(case.windows.tokens, tile)
        rows = 2 * 2 * HEAD_DIM / tile["BLOCK_M"]  # bytes a score of the two operands that a step reads
        bytes_read, bytes_written = rows + 2 * tiled, 2 * backward
        load = (0 if tiled else GATHER / 32) + 2 * (bytes_read + bytes_written) / LINE  # in, and out of shared memory
        clocks = (load, 1 / EXPS, (bytes_read + bytes_written) / CACHE)
        return cls(*(1e6 * count * each / SMS / CLOCK for each in clocks))

    @property
    def largest(self) -> float:
        """The lower bound."""
        return max(self.load, self.exp, self.cache)


def occupancy() -> list[str]:
    """A line for each attention kernel of sm_90 in bf16 with a bf16 or fp32 table."""
    lines = []
    for key, row in json.loads(TABLE.read_text()).items():
        if key.startswith("sm_90 window_attention") and " bf16," in key:
            warps = int(key.partition("num_warps=")[2].split()[0]) if "num_warps=" in key else 4
            count = programs(row["registers"], row["shared"], warps)
            facts = f"{row['registers']} registers, {row['shared']} bytes, {row['products']}"
            lines.append(
                f"{key.removeprefix('sm_90 window_attention_')}: {facts}, {count} programs, {count * warps} warps"
            )
    return lines


def predictions() -> list[str]:
    """A line for each kernel that makes scores, way to its biases, and kind of block of clips."""
    lines = []
    for kernel in ("fwd", "bwd_kv"):
        for ending in ("", configs.TILED):
            tile = configs.MEASURED["sm_90"].get((kernel, "16 bit" + ending))
            for case in default_cases() if tile else ():
                if case.stream == "video" and not case.shifted:
                    walls = Walls.of(case, tile, bool(ending), kernel == "bwd_kv")
                    times = f"load unit {walls.load:.0f}, exp2 {walls.exp:.0f}, cache {walls.cache:.0f} us"
                    lines.append(f"{kernel}{ending} {case.name}: {times}")
    return lines


if __name__ == "__main__":
    print("\n".join([*occupancy(), "", *predictions()]))
