"""DeepSpeed's own files of a checkpoint, which earlier versions of this project wrote: read, and never trusted."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from deepspeed import DeepSpeedEngine
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from bevt_ds.errors import UserError
from bevt_ds.model.tensor_file import reason
from bevt_ds.runtime.distributed import Ranks
from bevt_ds.runtime.flat_norms import own_shards

# All that DeepSpeed's shards of stages 0-3 need beyond tensors and plain containers.
SAFE_CLASSES = [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]


def load_shard(path: str, map_location: Any = None) -> Any:
    """What DeepSpeed's reader returns, except that a pickle in a shard cannot run code: an allow-list of classes."""
    with torch.serialization.safe_globals(SAFE_CLASSES):
        return torch.load(path, map_location=map_location, weights_only=True)


def require_readable(folder: Path, ranks: Ranks) -> None:
    """Read every file of DeepSpeed's in a folder, each on one rank, before one rank alone fails to. Collective.

    Raises:
        UserError: a file is damaged, or asks for code to be run. On all ranks.
    """
    found = ranks.gather([_shard_problem(path) for path in sorted(folder.glob("*.pt"))[ranks.rank :: ranks.world]])
    if problem := next((problem for own in found for problem in own if problem), None):
        raise UserError(f"{problem}. Begin a new run from its weights with init_from and another output_dir.")


def _shard_problem(path: Path) -> str | None:
    """What is wrong with a file of DeepSpeed's."""
    try:
        shard = load_shard(str(path))
    except Exception as error:  # a damaged or hostile pickle can fail in any way
        asked = re.search(r"GLOBAL (\S+)", str(error))
        return f"{path} asks for {asked[1]}, which is not run" if asked else f"{path} is damaged: {reason(error)}"
    known = isinstance(shard, dict) and shard.keys() & {"module", "optimizer_state_dict"}
    return None if known else f"{path} is not of DeepSpeed"


def take_up(engine: DeepSpeedEngine, folder: Path, tag: str, ranks: Ranks) -> None:
    """Load the shards below a folder into DeepSpeed's engine. Collective.

    Raises:
        UserError: nothing to load, a damaged file, or the state of another model, ZeRO stage or number of ranks.
    """
    require_readable(folder / tag, ranks)
    try:
        with own_shards(engine.optimizer):
            loaded, _ = engine.load_checkpoint(str(folder), tag=tag)
    except (LookupError, TypeError, ValueError, AttributeError, AssertionError, RuntimeError) as error:
        raise UserError(f"{folder}: DeepSpeed cannot take its state up: {reason(error)}.") from error
    if loaded is None:
        raise UserError(f"{folder}: DeepSpeed found no state to load there.")
