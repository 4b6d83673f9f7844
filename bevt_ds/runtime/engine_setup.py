"""What comes before DeepSpeed's engine: ranks that have met, what a device can do, the optimizer, split parameters."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.ops.op_builder import AsyncIOBuilder
from torch import nn

from bevt_ds.config.engines import offload_folders
from bevt_ds.config.schema import AdamWConfig, TrainingConfig
from bevt_ds.config.validate import zero_stage
from bevt_ds.errors import UserError
from bevt_ds.runtime.distributed import Ranks, choose_rendezvous

# DeepSpeed calls collectives by names that newer torch wants replaced; no one who trains can do anything about it.
warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")


def start_ranks() -> Ranks:
    """Join the process group, under `deepspeed`, `torchrun` or plain `python` (which becomes rank 0 of 1).

    Raises:
        UserError: another program uses the port at which the ranks are to meet.
    """
    if not torch.distributed.is_initialized():  # a second run of the same processes meets where the first did
        choose_rendezvous(os.environ)
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        # Its shared-memory all-reduce compiles for over a minute at the first start; gloo needs no compiler.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    else:
        accelerator.set_device(int(os.environ["LOCAL_RANK"]))
    deepspeed.init_distributed(dist_backend=accelerator.communication_backend_name(), verbose=False)
    device = torch.device(accelerator.current_device_name())
    host = torch.distributed.new_group(backend="gloo")
    return Ranks(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), device, host)


def require_supported(config: TrainingConfig, device: torch.device, values: Mapping[str, Any]) -> None:
    """Check what a run with this DeepSpeed JSON asks of the device.

    Raises:
        UserError: a precision or messages that the device cannot do, compiled blocks under ZeRO-3, or a disk that
            DeepSpeed cannot offload to.
    """
    zero = values.get("zero_optimization") or {}
    if config.train.precision == "fp16" and device.type == "cpu":
        raise UserError("train.precision=fp16: DeepSpeed has no fp16 on a CPU. Use bf16 or fp32.")
    if config.model.compile and zero_stage(values) == 3:
        raise UserError(
            "model.compile=true: ZeRO-3 fetches parameters in hooks that torch.compile does not see."
            " Use ds_configs/zero2.json or model.compile=false."
        )
    if device.type == "cpu" and (zero.get("zero_quantized_weights") or zero.get("zero_quantized_gradients")):
        raise UserError(
            "ZeRO++'s quantised messages are CUDA code of DeepSpeed's: on a CPU use --deepspeed_config zero3."
        )
    if offload_folders(config, values) and not AsyncIOBuilder().is_compatible(verbose=False):
        raise UserError(
            "offloading to nvme: DeepSpeed's disk reader cannot be compiled here, it needs libaio (Debian: apt-get"
            " install libaio-dev). Or use --deepspeed_config zero3_offload_cpu."
        )


def splitter(settings: dict[str, Any], dtype: torch.dtype) -> Callable[[list[nn.Parameter]], None]:
    """What ZeRO-3 does with new parameters: rank 0's values, in the compute dtype, split over the ranks."""
    nodes = deepspeed.utils.groups._get_zero_param_intra_parallel_group()  # of an engine before this one
    init = deepspeed.zero.Init(nn.Module(), config_dict_or_path=settings, dtype=dtype, zero_param_parallel_group=nodes)

    def split(parameters: list[nn.Parameter]) -> None:
        for parameter in parameters:
            parameter.data = parameter.data.to(dtype)
        init._convert_to_zero_parameters(parameters)

    return split


def make_optimizer(groups: list[dict[str, Any]], optim: AdamWConfig, settings: dict[str, Any]) -> torch.optim.Optimizer:
    """AdamW over the groups; DeepSpeed's own, on the CPU, where the JSON offloads the optimizer."""
    options = {"lr": optim.lr, "betas": optim.betas, "eps": optim.eps}
    offload = settings.get("zero_optimization", {}).get("offload_optimizer", {}).get("device", "none")
    if offload != "none":
        optimizer = deepspeed.ops.adam.DeepSpeedCPUAdam(groups, adamw_mode=True, **options)
        optimizer.register_step_pre_hook(_forget_powers)
        return optimizer
    return torch.optim.AdamW(groups, fused=True, **options)


def _forget_powers(optimizer: Any, *_: Any) -> None:
    """Make DeepSpeed's CPU AdamW take the bias corrections of a step from the step's number alone.

    It multiplies beta^step up from the step before, rounding each time, but after a load takes the power at once: a
    resumed run then is not the one that was never stopped. A step 0 over no elements in between breaks the chain.
    """
    group, nothing = optimizer.param_groups[0], torch.empty(0)
    rates = (group["lr"], *group["betas"], group["eps"], group["weight_decay"], group["bias_correction"])
    optimizer.ds_opt_adam.adam_update(optimizer.opt_id, 0, *rates, nothing, nothing, nothing, nothing)
