"""A sum over the ranks that the doctor is started with: whether it is right, and how fast it goes."""

from __future__ import annotations

import os
import time

import torch
import torch.distributed as dist

from bevt_ds.doctor.lines import Line
from bevt_ds.runtime.distributed import Ranks

ROUNDS = 5  # after one that is not counted
REMEDY = "start again with NCCL_DEBUG=INFO (or GLOO_SOCKET_IFNAME=the network's interface) to see which link fails"


def check_sum(ranks: Ranks) -> Line:
    """All-reduce 256 MiB on GPUs, 16 MiB on CPUs. Collective; every rank has the line.

    The bandwidth is the bus's, as nccl-tests counts it: each rank sends 2 (n-1)/n of the bytes.
    """
    size = (256 if ranks.device.type == "cuda" else 16) << 20
    values = torch.empty(size // 4, device=ranks.device)
    seconds = sorted([_round(values, ranks) for _ in range(1 + ROUNDS)][1:])[ROUNDS // 2]
    right = bool((values == ranks.world * (ranks.world + 1) / 2).all())
    if not right:
        return Line("collective", "mend", "a sum over the ranks is wrong", REMEDY)
    nodes = ranks.world // int(os.environ.get("LOCAL_WORLD_SIZE", ranks.world))
    places = f"{ranks.world} ranks on {nodes} node{'s' * (nodes > 1)} by {dist.get_backend()}"
    rate = size * 2 * (ranks.world - 1) / ranks.world / seconds / 1e9
    return Line("collective", "ok", f"{size >> 20} MiB over {places}: {rate:,.2f} GB/s")


def _round(values: torch.Tensor, ranks: Ranks) -> float:
    """Seconds of one sum."""
    values.fill_(ranks.rank + 1)
    ranks.barrier()
    began = time.perf_counter()
    ranks.sum(values)
    if values.is_cuda:
        torch.cuda.synchronize(values.device)
    return time.perf_counter() - began
