"""Compiles every shipped kernel configuration for sm_80, sm_90 and sm_100, with no GPU, and compares with a table.

    python -m bevt_ds.kernels.check            # fails where a kernel got worse
    python -m bevt_ds.kernels.check --update   # writes compiled_<triton version>.json
    python -m bevt_ds.kernels.check --only "sm_90 window_attention_fwd"

The launchers themselves say what is shipped: they run on tensors without memory at the shapes of the
models, and each distinct launch is compiled as it would be on a GPU. Triton's own ptxas and nvdisasm do the rest.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import attention, attention_backward, bias_gelu, conv_epilogues, head_loss, mask_tokens, norms
from .geometry import Windows
from .launches import Launch, record

TARGETS = (80, 90, 100)
TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.uint8: "u8",
}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
WIDTHS = (
    96,
    128,
    192,
)  # channels of stage 1 of the tiny and small, base, and large models; features have 8 times as many
VOCABULARY = 8192
PRE_NORM = (96, 128, 256, 512, 1024)  # channels of blocks of the tiny and base models
POST_NORM = (512, 4096)  # of the giant one
NORMS = (*PRE_NORM, 2048, 4096, 8192)  # and what their mergings normalise
WORSE = {"registers": 16, "spills": 0, "shared": 2048}  # growth that the check lets pass


def shipped_windows() -> Iterator[Windows]:
    """A geometry for each window that the models use: clips of 16 frames, long clips, half clips, images, and the
    demo's clips and images."""
    table, still = (8, 7, 7), (0, 0, 0)
    yield Windows((8, 56, 56), (8, 7, 7), table, (0, 3, 3), (0, 3, 3))
    yield Windows((16, 56, 56), (16, 7, 7), (16, 7, 7), still, still)
    yield Windows((4, 56, 56), (4, 7, 7), table, still, still)
    yield Windows((1, 56, 56), (1, 7, 7), table, still, (0, 3, 3))
    yield Windows((4, 32, 32), (4, 4, 4), (4, 4, 4), (0, 2, 2), (0, 2, 2))
    yield Windows((1, 32, 32), (1, 4, 4), (4, 4, 4), (0, 2, 2), (0, 2, 2))


def wide_windows() -> Iterator[Windows]:
    """A large window, one of 49 tokens, and one that the fused backward kernel takes."""
    for side in (16, 7, 4):
        yield Windows((1, 4 * side, 4 * side), *[(1, side, side)] * 2, *[(0, side // 2, side // 2)] * 2)


def record_attention(windows: Windows, dtype: torch.dtype, width: int) -> None:
    """Forward and backward of one geometry and width of heads; the kernels do not depend on batch or heads."""
    qkv = torch.empty((1, *windows.grid, 3, 4, width), dtype=dtype, device="meta")
    table = torch.empty((windows.table_rows, 4), dtype=torch.float32, device="meta")
    for table_dtype in DTYPES:
        bias_table = table.to(table_dtype)
        out, lse, *tables = attention.launch_forward(qkv, bias_table, windows, width**-0.5)
        tensors = (out, qkv, *tables, out, lse)
        _, pairs = attention_backward.launch_backward(*tensors, windows, width**-0.5, table_dtype)
        attention_backward.launch_fold(pairs, bias_table, windows)


def record_masked(width: int, dtype: torch.dtype) -> None:
    """Mask tokens, gather and loss of one model size."""

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x, mask = empty(1, 8, 56, 56, width), empty(1, 8, 14, 14, dtype=torch.bool)
    mask_tokens.launch_insert(x, empty(width), mask)
    mask_tokens.launch_insert_backward(x, mask)
    features, index = empty(3136, 8 * width), empty(1568, dtype=torch.int64)
    mask_tokens.launch_gather(features, index)
    mask_tokens.launch_scatter(empty(1568, 8 * width), index, 3136)
    for write_grad in (False, True):
        head_loss.launch_cross_entropy(empty(1568, VOCABULARY), index, write_grad)


def record_norms(channels: int, dtype: torch.dtype) -> None:
    """Sums and norms of rows of one width; the widest are only normalised, in front of a merging."""
    x, weight = (torch.empty(*n, channels, dtype=dtype, device="meta") for n in ((2, 8), ()))
    scale, stats = torch.empty(2, device="meta"), torch.empty(2, 16, device="meta")
    cases = [(None, None, False)]
    cases += [(x, None, False), (x, scale, False)] if channels in PRE_NORM else []
    cases += [(x, scale, True)] if channels in POST_NORM else []
    for branch, factors, post in cases:
        norms.launch_add_norm(x, branch, factors, weight, weight, 1e-5, post)
        norms.launch_add_norm_backward(branch, None if post else x, x, factors, weight, stats)


def record_elementwise(width: int, dtype: torch.dtype) -> None:
    """The scaled sum at the end of a stage, and the GELU of its MLPs."""
    x, hidden = (torch.empty(2, 8, channels, dtype=dtype, device="meta") for channels in (width, 4 * width))
    scale, bias = torch.empty(2, device="meta"), hidden.new_empty(4 * width)
    norms.launch_add_scaled(None, norms.launch_add_scaled(x, x, scale), scale)
    bias_gelu.launch_bias_gelu(hidden, bias)
    bias_gelu.launch_bias_gelu_backward(hidden, hidden, bias)


def record_epilogues() -> None:
    """What lies between the convolutions of DALL-E's encoder."""
    conv_epilogues.launch_scale_pixels(torch.empty(1, 3, 16, 16, device="meta"), 0.8, 0.1, 8, True)
    for channels in (64, 256, 2048):
        x, bias = (torch.empty(*n, dtype=torch.float16, device="meta") for n in ((1, channels, 4, 4), (channels,)))
        conv_epilogues.launch_bias_relu(x, bias)
        for x_bias, pool in ((None, 1), (bias, 1), (None, 2)) if channels > 64 else ():
            conv_epilogues.launch_residual_relu(x, x_bias, x, bias, 1 / 64, pool)


def shipped_launches(capability: int) -> list[Launch]:
    """Every launch that the models make, and those of wide heads, which only other models have, with the tiles of an
    architecture."""
    with record(f"sm_{capability}") as launches:
        record_epilogues()
        for dtype in DTYPES:
            for windows in shipped_windows():
                record_attention(windows, dtype, 32)
            for windows in wide_windows():
                record_attention(windows, dtype, 64)
            for width in WIDTHS:
                record_masked(width, dtype)
            for channels in NORMS if dtype == torch.bfloat16 else (PRE_NORM[1], POST_NORM[1]):
                record_norms(channels, dtype)
            record_elementwise(PRE_NORM[-1], dtype)
    return launches


def source_of(launch: Launch) -> tuple[str, ASTSource, dict[str, int]]:
    """A launch's readable key, its source for the compiler, and the compiler's options."""
    options = {
        k: v for k, v in launch.options.items() if k in ("num_warps", "num_stages", "maxnreg", "enable_fp_fusion")
    }
    constants = {k: v for k, v in launch.options.items() if k not in options}
    values = dict(zip(launch.kernel.arg_names, launch.args, strict=False)) | constants
    signature, attributes = {}, {}
    for i, name in enumerate(launch.kernel.arg_names):
        value = values[name]
        if name in constants:
            signature[name] = "constexpr"
        elif isinstance(value, Tensor):
            signature[name] = "*" + TYPES[value.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
    types = [kind[1:] for kind in signature.values() if kind.startswith("*")]
    settings = [f"{k}={v}" for k, v in (constants | options).items()]
    key = " ".join([launch.kernel.fn.__name__, ",".join(types), *settings])
    return key, ASTSource(launch.kernel, signature, constants, attributes), options


def tool(name: str, *args: str) -> str:
    """Output of a program of Triton's package."""
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *args], check=True, capture_output=True, text=True).stdout


def measure(source: ASTSource, options: dict[str, int], capability: int) -> dict[str, int | str]:
    """Registers a thread, spill instructions, bytes of shared memory, and the class of the matrix products."""
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, assembly = tool("cuobjdump", "-res-usage", file.name), tool("nvdisasm", file.name)
    products = [kind for kind in ("UTCHMMA", "HGMMA", "HMMA") if re.search(rf"\b{kind}\b", assembly)]
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "spills": len(re.findall(r"\b(?:STL|LDL)\b", assembly)),
        "shared": compiled.metadata.shared,
        "products": "+".join(products) or "none",
    }


def shipped_sources(only: str) -> dict[str, tuple[ASTSource, dict[str, int], int]]:
    """Every distinct launch whose key, 'sm_XX kernel types settings', contains `only`: `measure`'s arguments."""
    found = {}
    for capability in TARGETS:
        for launch in shipped_launches(capability):
            key, source, options = source_of(launch)
            if only in (name := f"sm_{capability} {key}"):
                found[name] = (source, options, capability)
    return dict(sorted(found.items()))


_queue: list[tuple[ASTSource, dict[str, int], int]] = []  # what the forks of `compile_all` work on


def _measure_queued(i: int) -> dict[str, int | str]:
    return measure(*_queue[i])


def compile_all(only: str) -> dict[str, dict[str, int | str]]:
    """The measurements of `shipped_sources`, by a process for each core: forks, as sources cannot be sent to others."""
    sources = shipped_sources(only)
    _queue[:] = sources.values()
    with multiprocessing.get_context("fork").Pool(max(1, min(len(sources), len(os.sched_getaffinity(0))))) as processes:
        return dict(zip(sources, processes.map(_measure_queued, range(len(sources)), chunksize=1), strict=True))


def regressions(old: dict, new: dict) -> list[str]:
    """What got worse, or appeared, or went away."""
    found = [f"not in the table: {key}" for key in new.keys() - old.keys()]
    found += [f"no longer shipped: {key}" for key in old.keys() - new.keys()]
    for key in old.keys() & new.keys():
        for what, slack in WORSE.items():
            if new[key][what] > old[key][what] + slack:
                found.append(f"{what} {old[key][what]} -> {new[key][what]}: {key}")
        if new[key]["products"] != old[key]["products"]:
            found.append(f"products {old[key]['products']} -> {new[key]['products']}: {key}")
    return sorted(found)


def main() -> int:
    """The command; 0 where nothing got worse."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--update", action="store_true", help="write the table instead of comparing")
    parser.add_argument("--only", default="", help="compare only the lines of the table that contain this text")
    arguments = parser.parse_args()
    if triton.knobs.runtime.interpret:
        sys.exit("unset TRITON_INTERPRET: the interpreter compiles nothing")
    path = Path(__file__).with_name(f"compiled_{triton.__version__}.json")
    if arguments.update:
        table = compile_all("")
        path.write_text(json.dumps(table, indent=1) + "\n")
        print(f"{len(table)} configurations -> {path.name}")
        return 0
    if not path.exists():
        sys.exit(f"there is no table for triton {triton.__version__}: make one with --update")
    expected = {key: row for key, row in json.loads(path.read_text()).items() if arguments.only in key}
    found = regressions(expected, compile_all(arguments.only))
    print("\n".join(found) or f"{len(expected)} configurations, none worse than {path.name}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
