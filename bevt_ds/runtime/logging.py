"""What a run reports: sums kept on the device until a log line needs them (run_log.py), and the speed."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from bevt_ds.config.schema import Config, LoopConfig
from bevt_ds.errors import UserError
from bevt_ds.model.arch import SwinArch
from bevt_ds.runtime.distributed import Ranks
from bevt_ds.runtime.flops import clip_parts, image_parts, peak_flops, training_flops

KIBIBYTE = 1024
STREAMS = ("video", "image")
FAULTS = ("unknown_targets",)  # metrics that are 0 unless something is wrong


class StepSums:
    """Metrics of one step, added over its micro-steps without a host sync.

    `earlier` are those of the step before, if it had no log line: its counts of FAULTS are carried on, so that the next
    line reports them.
    """

    def __init__(self, earlier: StepSums | None = None) -> None:
        carried = earlier.sums if earlier else {}
        self.sums: dict[str, Tensor] = {name: carried[name] for name in FAULTS if name in carried}

    def add(self, metrics: Mapping[str, Tensor]) -> None:
        """Add a micro-step's device scalars: sums over its masked cells, or clips, such as BEVTOutput's metrics."""
        for name, value in metrics.items():
            value = value.detach().double()
            self.sums[name] = self.sums[name] + value if name in self.sums else value

    def totals(self, ranks: Ranks) -> dict[str, float]:
        """The sums over the whole global batch, as floats. Collective; the one host sync of a log line."""
        names = sorted(self.sums)
        totals = ranks.sum(torch.stack([self.sums[n] for n in names])).tolist()
        return dict(zip(names, totals, strict=True))


def step_metrics(totals: Mapping[str, float]) -> dict[str, float]:
    """loss, and per stream its loss and, of ids, masked accuracy, from sums over the global batch.

    A stream without a masked position adds nothing to the loss and has no metrics.
    """
    result = {"loss": 0.0}
    for stream in (s for s in STREAMS if totals.get(f"rows_{s}")):
        result[f"loss_{stream}"] = totals[f"loss_{stream}"] / totals[f"rows_{stream}"]
        if f"hits_{stream}" in totals:
            result[f"acc_{stream}"] = totals[f"hits_{stream}"] / totals[f"rows_{stream}"]
        result["loss"] += result[f"loss_{stream}"]
    return result


def require_known_targets(metrics: Mapping[str, float | Tensor], vocabulary: int, where: str) -> None:
    """Stop a run whose tokenizer gives ids that the head does not have.

    Raises:
        UserError: there were such ids, `where` says where.
    """
    if unknown := int(metrics["unknown_targets"]):
        raise UserError(
            f"{unknown:,} targets {where} are outside the head's vocabulary of {vocabulary:,} ids: the tokenizer gives"
            " ids that are negative or not below its vocab_size. Their rows have no gradient."
        )


class SpeedMeter:
    """Clock of the training loop of a run whose batch and precision are in `train`."""

    def __init__(self, train: LoopConfig, step_flops: float, world: int, device: torch.device):
        self.streams, self.step_flops = train.streams, step_flops
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        peak = peak_flops(name)
        self.peak = peak * world if peak and train.precision != "fp32" else None
        self.started, self.steps = time.perf_counter(), 0

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The time that the block takes does not count."""
        began = time.perf_counter()
        yield
        self.started += time.perf_counter() - began

    def read(self, waited: float) -> dict[str, float | None]:
        """The throughput since the last reading, in which the loop `waited` so many seconds for data.

        clips_per_s and the like; data_wait, the share of the time that went into waiting; mfu, the model FLOPs
        utilisation of the bf16 peak, None where the peak is not known.
        """
        now = time.perf_counter()
        seconds = max(now - self.started, 1e-9)
        rate, wait = self.steps / seconds, waited / seconds
        self.started, self.steps = now, 0
        rates = {f"{name}_per_s": rate * total for name, (total, _) in self.streams.items()}
        return {**rates, "data_wait": wait, "mfu": rate * self.step_flops / self.peak if self.peak else None}


def expected_step_flops(config: Config, arch: Mapping[str, Any]) -> float:
    """Training FLOPs of one step with the expected number of masked cells (means of the mask generators).

    arch: that of the BEVT.
    """
    data, train, swin, width = (
        config.data,
        config.train,
        SwinArch.of(arch),
        arch.get("target_dim") or arch["vocab_size"],
    )
    cells = (data.size // 16) ** 2 * data.mask.ratio
    tube = sum(data.mask.tube) / 2
    macs = train.global_clips * clip_parts(swin, width, data.frames, data.size, cells * data.frames * tube).total()
    macs += train.global_images * image_parts(swin, width, data.size, cells).total()
    return float(training_flops(macs))


def peak_bytes(device: torch.device) -> int:
    """The most memory that this rank has had in use since it started: tensors on its GPU, or else the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KIBIBYTE
