"""The GPUs that are known: what their makers state of them. One table for MFU, plans and the scaling page."""

from __future__ import annotations

from dataclasses import dataclass

from bevt_ds.errors import UserError

GB = 1e9


@dataclass(frozen=True)
class Gpu:
    """One GPU. Rates are of one direction; `network` is the usual share of a node's network cards for each GPU."""

    name: str  # as `--gpu` takes it
    device: str  # part of the name that CUDA gives it
    memory: float  # bytes
    flops: float  # dense bf16, FLOP/s
    hbm: float  # bytes/s
    link: float  # bytes/s to the other GPUs of the node
    network: float  # bytes/s to other nodes
    decoders: int  # NVDEC engines


# Memory, bf16 (dense), HBM, NVLink or PCIe, NVDEC: NVIDIA's data sheets and product briefs "A100 Tensor Core GPU",
# "H100 Tensor Core GPU", "H200 Tensor Core GPU", "HGX B200", "L40S". Network: DGX A100 (200 Gb/s a GPU), DGX H100,
# H200 and B200 (400 Gb/s a GPU); PCIe servers: one 400 Gb/s card for two GPUs. A name that is part of another's comes
# after it.
GPUS = (
    Gpu("a100-40", "A100-SXM4-40GB", 40 * GB, 312e12, 1555 * GB, 300 * GB, 25 * GB, 5),
    Gpu("a100-80", "A100", 80 * GB, 312e12, 2039 * GB, 300 * GB, 25 * GB, 5),
    Gpu("h100-pcie", "H100 PCIe", 80 * GB, 756e12, 2000 * GB, 64 * GB, 25 * GB, 7),
    Gpu("h100", "H100", 80 * GB, 989e12, 3350 * GB, 450 * GB, 50 * GB, 7),
    Gpu("h200", "H200", 141 * GB, 989e12, 4800 * GB, 450 * GB, 50 * GB, 7),
    Gpu("b200", "B200", 180 * GB, 2250e12, 7700 * GB, 900 * GB, 50 * GB, 7),
    Gpu("l40s", "L40S", 48 * GB, 362e12, 864 * GB, 32 * GB, 25 * GB, 3),
)


def gpu_named(name: str) -> Gpu:
    """A GPU by its short name. Raises UserError for another, with those that there are."""
    for gpu in GPUS:
        if gpu.name == name.lower():
            return gpu
    raise UserError(f"--gpu {name}: not known; there are {', '.join(gpu.name for gpu in GPUS)}.")


def gpu_of(device: str) -> Gpu | None:
    """The GPU whose device name CUDA gives, or None where it is not known."""
    return next((gpu for gpu in GPUS if gpu.device in device), None)
