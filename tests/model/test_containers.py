"""What a checkpoint's file and DeepSpeed's folders hold, and that nothing in them runs."""

from __future__ import annotations

import argparse
from math import prod
from pathlib import Path

import pytest
import torch
from torch import nn

from bevt_ds import UserError
from bevt_ds.model.containers import contained, deepspeed_folder, read_deepspeed, read_file, strip, unwrap
from tests.hostile import Canary


class Typed(torch.Tensor):
    """A subclass of the user's; its numbers are read."""


class Listed(list):
    """Pickles with items that unpickling appends, and a state that it sets."""


@pytest.mark.parametrize("zipped", [True, False])
def test_objects_in_a_pickle_are_inert(zipped, tmp_path):
    canary, listed = tmp_path / "canary", Listed([1, 2])
    listed.name = "x"
    checkpoint = {
        "args": argparse.Namespace(lr=1.0, path=tmp_path),
        "listed": listed,
        "evil": Canary(canary),
        "optimizer": {Canary(canary): 1, "set": {1, 2}, "dtype": torch.bfloat16},
        "model": nn.Linear(2, 3).state_dict(),
    }
    torch.save(checkpoint, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    note, state = contained(read_file(tmp_path / "a.pth"))
    assert not canary.exists() and not note
    assert state.keys() == {"weight", "bias"} and state["weight"].equal(checkpoint["model"]["weight"])


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_module_holds_no_state_dict(zipped, tmp_path):
    torch.save(nn.Linear(2, 3), tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match="holds no state dict"):
        contained(read_file(tmp_path / "a.pth"))


def test_pickled_tensors_keep_dtype_and_values(tmp_path):
    base = torch.arange(12.0).view(3, 4)
    marked = nn.Parameter(base)
    marked.note = "what torch rebuilds with another function"
    typed = base.as_subclass(Typed)
    values = {
        "marked": marked,
        "typed": typed,
        "view": base.T[1:],
        "half": base.bfloat16(),
        "parameter": nn.Parameter(base),
        "ids": torch.arange(3),
    }
    torch.save(values, tmp_path / "a.pth")
    read = read_file(tmp_path / "a.pth")
    assert all(read[name].equal(value) and read[name].dtype == value.dtype for name, value in values.items())


def test_running_averages_go_first_and_are_noted():
    one, other = {"w": torch.ones(1)}, {"w": torch.zeros(1)}
    note, state = contained({"state_dict": one, "state_dict_ema": other, "epoch": 3})
    assert state is not one and state["w"].item() == 0
    assert note == "state_dict_ema is taken of state_dict_ema, state_dict"
    assert contained({"state_dict": one, "state_dict_ema": None})[0] == ""
    assert unwrap({"ema": 1, "model": {"module": {"module.w": torch.ones(1)}}}).keys() == {"w"}


@pytest.mark.parametrize(
    "wrapped",
    [
        "module.{}",
        "_orig_mod.{}",
        "backbone.{}",
        "encoder.{}",
        "model.{}",
        "module._orig_mod.model.backbone.{}",
        "_fsdp_wrapped_module.{}",
        "_fsdp_wrapped_module._fpw_module.{}",
        "layers.0._fsdp_wrapped_module.blocks.0._checkpoint_wrapped_module.attn.qkv.weight",
        "layers.0._orig_mod.blocks.0._fsdp_wrapped_module._checkpoint_wrapped_module.attn.qkv.weight",
    ],
)
def test_names_are_read_without_what_was_wrapped_around_the_network(wrapped):
    name = "layers.0.blocks.0.attn.qkv.weight"
    assert strip(wrapped.format(name)) == name


def test_torchscript_program_is_refused(tmp_path):
    torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)).save(tmp_path / "a.pt")
    with pytest.raises(UserError, match="TorchScript program"):
        read_file(tmp_path / "a.pt")


@pytest.mark.parametrize("cut", [10, 200])
def test_damaged_checkpoint_file_is_named(cut, tmp_path):
    torch.save({"model": nn.Linear(2, 3).state_dict()}, tmp_path / "a.pth", _use_new_zipfile_serialization=False)
    (tmp_path / "a.pth").write_bytes((tmp_path / "a.pth").read_bytes()[:cut])
    with pytest.raises(UserError, match="cannot|can be read without"):
        read_file(tmp_path / "a.pth")


# DeepSpeed

SHAPES = [{"a": torch.Size([3, 5]), "b": torch.Size([7])}, {"c": torch.Size([2, 2])}]  # two optimizer groups


def weights() -> dict[str, torch.Tensor]:
    return {name: torch.randn(shape) for group in SHAPES for name, shape in group.items()}


def write_deepspeed(folder: Path, stage: int, world: int, state: dict[str, torch.Tensor]) -> None:
    """As DeepSpeed lays it out: half precision in `module`, fp32 in the ranks' partitions, and objects of its own."""
    folder.mkdir()
    half = {name: value.half() if stage < 3 else torch.empty(0) for name, value in state.items()}
    frozen = torch.arange(3.0)
    states = {"module": half | {"buffer": torch.ones(2)}, "param_shapes": SHAPES, "buffer_names": ["buffer"]}
    states |= {"shared_params": {"tied": "a"}, "frozen_param_shapes": {"frozen": torch.Size([3])}}
    part = lambda value, rank: nn.functional.pad(value.flatten(), (0, -value.numel() % world)).chunk(world)[rank]  # noqa: E731
    for rank in range(world if stage == 3 else 1):
        name = f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" if stage == 3 else "mp_rank_00_model_states.pt"
        fragment = part(frozen, rank) if stage == 3 else frozen
        torch.save(states | {"frozen_param_fragments": {"frozen": fragment}}, folder / name)
    for rank in range(world if stage else 0):
        if stage == 3:
            flat = torch.cat([part(state[name], rank) for group in SHAPES for name in group])
            groups = {"fp32_flat_groups": [flat[:4], flat[4:]]}  # sub-groups end anywhere
        else:
            joined = [torch.cat([state[name].flatten() for name in group]) for group in SHAPES]
            groups = {"single_partition_of_fp32_groups": [part(value, rank) for value in joined]}
        optimizer = groups | {"zero_stage": stage, "partition_count": world, "loss_scaler": argparse.Namespace(x=1)}
        torch.save({"optimizer_state_dict": optimizer}, folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")


@pytest.mark.parametrize(("stage", "world"), [(0, 1), (1, 3), (2, 2), (2, 11), (3, 1), (3, 2), (3, 11)])
def test_deepspeed_folder_of_any_stage_and_world(stage, world, tmp_path):
    state = weights()
    write_deepspeed(tmp_path / "global_step7", stage, world, state)
    (tmp_path / "latest").write_text("global_step7")
    folder = deepspeed_folder(tmp_path)
    assert folder == tmp_path / "global_step7" == deepspeed_folder(folder)
    read = read_deepspeed(folder)
    for name, value in state.items():
        assert read[name].equal(value if stage else value.half())
    if stage:
        assert read["tied"].equal(state["a"]) and read["frozen"].equal(torch.arange(3.0))
    assert read["buffer"].equal(torch.ones(2)) and prod(read["a"].shape) == 15


def test_deepspeed_folder_without_a_ranks_file_is_refused(tmp_path):
    write_deepspeed(tmp_path / "tag", 3, 3, weights())
    (tmp_path / "tag" / "zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    with pytest.raises(UserError, match="holds 2 of the 3"):
        read_deepspeed(tmp_path / "tag")
