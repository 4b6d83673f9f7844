"""From a file or a folder of DeepSpeed's to tensors by name, without running anything that a pickle asks for.

A pickle names classes and functions that unpickling would import and call. Here those that rebuild tensors are on a
list, and every other name stands for an inert object that only keeps what it is given: an `args` namespace, a
configuration or an optimizer costs nothing and does nothing.

Formats of DeepSpeed 0.19 (runtime/engine.py `_save_checkpoint`, `_save_zero_checkpoint`; utils/zero_to_fp32.py).
"""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from functools import partial
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from bevt_ds.errors import UserError

from .tensor_file import read_tensors, reason

State = dict[str, Tensor]

# Where a state dict lies in what a trainer saves; running averages first, as timm's loader has it.
CONTAINERS = (
    *("state_dict_ema", "model_ema", "ema_state_dict", "model", "module", "state_dict", "model_state"),
    *("teacher", "target_encoder", "student", "encoder"),
)
WRAPPERS = re.compile(r"\b(?:_orig_mod|_fsdp_wrapped_module|_fpw_module|_checkpoint_wrapped_module|_forward_module)\.")
PREFIXES = re.compile(r"^(?:(?:module|backbone|encoder|model|swin)\.)+")
PLAIN = {  # what a pickle may ask for: how tensors are rebuilt, and types that hold plain data
    ("torch._utils", "_rebuild_tensor"): torch._utils._rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
    ("torch._utils", "_rebuild_parameter_with_state"): lambda data, *_: data,
    ("torch._tensor", "_rebuild_from_type_v2"): lambda build, _type, arguments, _state: build(*arguments),
    ("torch", "Size"): torch.Size,
    ("torch", "device"): torch.device,
    ("builtins", "set"): set,
    ("__builtin__", "set"): set,
}
STATES = "*_model_states.pt"
OPTIMIZER = "*_optim_states.pt"
FROZEN = "frozen.safetensors"  # of this project's engine, next to them: what DeepSpeed has in the compute type only


class Inert(dict):
    """Stands for any object of a pickle: it takes all that unpickling does to it, and does nothing."""

    def __new__(cls, *_: Any, **__: Any) -> Inert:
        return super().__new__(cls)

    def __init__(self, *args: Any, **__: Any):
        super().__init__()
        self.args = args

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def append(self, _: Any) -> None:
        pass

    extend = add = append
    __hash__ = object.__hash__
    __eq__ = object.__eq__


class InertUnpickler(pickle._Unpickler):  # in Python: the one in C takes as much memory as a byte of the file says
    """Knows how tensors are rebuilt, through functions made for this file; all else is inert."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in PLAIN:
            return partial(PLAIN[module, name])  # of this file alone, whatever its pickle does to it
        if (module, name) == ("collections", "OrderedDict"):
            return type("OrderedDict", (dict,), {})
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        return type(name, (Inert,), {"__module__": "inert"})


def _load(file: BinaryIO, **options: Any) -> Any:
    return InertUnpickler(file, **options).load()


INERT = SimpleNamespace(__name__="inert", Unpickler=InertUnpickler, load=_load)  # what torch.load takes for pickle


def read_file(path: Path) -> Any:
    """What a .safetensors or PyTorch file holds, on the CPU. Raises UserError for any other file."""
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise UserError(f"is not a safetensors file: {reason(error)}") from error
    zipped = zipfile.is_zipfile(path)
    with path.open("rb") as file:
        if not zipped and file.read(1) != b"\x80":
            raise UserError("is not a checkpoint that torch.save or safetensors wrote")
    if zipped and any(name.endswith("/constants.pkl") for name in zipfile.ZipFile(path).namelist()):
        raise UserError("is a TorchScript program, which would have to run: save its state_dict() instead")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the older container: sources that it cannot compare
            return torch.load(path, map_location="cpu", weights_only=False, mmap=zipped, pickle_module=INERT)
    except Exception as error:  # a damaged or hostile pickle can fail in any way
        raise UserError(f"is not a checkpoint that can be read without running its code: {reason(error)}") from error


def unwrap(checkpoint: Any) -> State:
    """The state dict inside a checkpoint's container, tensors only, names without wrapper prefixes.

    Raises UserError where there is none.
    """
    return {strip(key): value for key, value in contained(checkpoint)[1].items()}


def contained(checkpoint: Any) -> tuple[str, State]:
    """The tensors of a checkpoint's state dict; and which one it is, where there are several (else empty).

    Raises UserError where there is none.
    """
    note, seen = "", set()
    while isinstance(checkpoint, dict) and id(checkpoint) not in seen:  # a pickle can make one that lies in itself
        seen.add(id(checkpoint))
        if found := [key for key in CONTAINERS if _is_filled(checkpoint.get(key))]:
            note = note or (f"{found[0]} is taken of {', '.join(found)}" if len(found) > 1 else "")
            checkpoint = checkpoint[found[0]]
    if not isinstance(checkpoint, dict) or not _tensors(checkpoint):
        raise UserError(f"holds no state dict: expected tensors by name, alone or under {', '.join(CONTAINERS)}")
    return note, _tensors(checkpoint)


def _is_filled(value: Any) -> bool:
    return isinstance(value, dict) and bool(value)


def _tensors(values: Mapping[Any, Any]) -> State:
    return {key: value for key, value in values.items() if isinstance(key, str) and isinstance(value, Tensor)}


def strip(key: str) -> str:
    """A name without the prefixes of what was wrapped around the network, on any level."""
    return PREFIXES.sub("", WRAPPERS.sub("", key))


# DeepSpeed's folders


def deepspeed_folder(folder: Path) -> Path | None:
    """The folder with DeepSpeed's files that `folder` means: itself, the tag that its `latest` or the last tag."""
    latest = folder / "latest"
    tag = latest.read_text(encoding="utf-8").strip() if latest.is_file() else ""
    inside = [folder / tag] if tag and Path(tag).name == tag else []
    inside += sorted(path for path in folder.glob("*/") if any(path.glob(STATES)))[-1:]
    return next((path for path in (folder, *inside) if any(path.glob(STATES))), None)


def read_deepspeed(folder: Path) -> State:
    """The weights in DeepSpeed's files, of any ZeRO stage and number of ranks: fp32 where the files hold that.

    Raises UserError where a rank's file is missing, or the model itself was split.
    """
    states = [read_file(path) for path in _by_rank(folder, STATES)]
    shards = [read_file(path) for path in _by_rank(folder, OPTIMIZER)]
    shards = [shard["optimizer_state_dict"] for shard in shards if "optimizer_state_dict" in shard]
    if any("mp_rank_00" not in path.name for path in folder.glob(STATES)):
        raise UserError("holds a model that is split over ranks (mp_rank_01, ...): only data parallel ones are read")
    first = states[0]
    state = {name: value for name, value in _tensors(first["module"]).items() if value.numel()}
    whole = read_tensors(folder / FROZEN) if (folder / FROZEN).is_file() else {}
    if not shards:
        return state | whole
    count = shards[0].get("partition_count", len(shards))
    if (ranks := max(count) if isinstance(count, list) else count) != len(shards):
        raise UserError(f"holds {len(shards)} of the {ranks} *_optim_states.pt that were written")
    frozen = first.get("frozen_param_shapes") or {}
    if "fp32_flat_groups" in shards[0]:
        if len(states) != len(shards):
            raise UserError(f"holds {len(states)} of the {len(shards)} {STATES} that were written")
        state |= _gathered([shard["fp32_flat_groups"] for shard in shards], _joined(first["param_shapes"]))
        state |= {
            name: _fitting([s["frozen_param_fragments"][name] for s in states], shape) for name, shape in frozen.items()
        }
    else:
        groups = zip(*(shard["single_partition_of_fp32_groups"] for shard in shards), strict=True)
        paddings = shards[0].get("param_alignment_paddings") or [None] * len(first["param_shapes"])
        for shapes, parts, padding in zip(first["param_shapes"], groups, paddings, strict=True):
            state |= _cut(torch.cat(parts), shapes, padding)
        state |= {name: first["frozen_param_fragments"][name] for name in frozen}
    state |= whole
    return state | {name: state[same] for name, same in first.get("shared_params", {}).items() if same in state}


def _by_rank(folder: Path, pattern: str) -> list[Path]:
    rank = re.compile(r"zero_pp_rank_(\d+)_")
    return sorted(folder.glob(pattern), key=lambda path: int(found[1]) if (found := rank.search(path.name)) else 0)


def _joined(groups: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, Sequence[int]]:
    return {name: shape for group in groups for name, shape in group.items()}


def _cut(flat: Tensor, shapes: Mapping[str, Sequence[int]], paddings: Sequence[int] | None) -> State:
    """ZeRO-1 and 2: parameters one after another in the vector that all ranks' parts make, each with its padding."""
    out, at = {}, 0
    for (name, shape), padding in zip(shapes.items(), paddings or [0] * len(shapes), strict=True):
        out[name] = flat[at : at + prod(shape)].view(*shape)
        at += prod(shape) + padding
    return out


def _gathered(ranks: Sequence[Sequence[Tensor]], shapes: Mapping[str, Sequence[int]]) -> State:
    """ZeRO-3: every rank has an equal part of each parameter, the last one padded."""
    flat, out, at = [torch.cat(list(groups)) for groups in ranks], {}, 0
    for name, shape in shapes.items():
        size = -(-prod(shape) // len(flat))
        out[name] = _fitting([part[at : at + size] for part in flat], shape)
        at += size
    return out


def _fitting(parts: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    return torch.cat([part.flatten() for part in parts])[: prod(shape)].view(*shape)
