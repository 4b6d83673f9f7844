"""The engine without a run: hostile checkpoint shards, compile switch, memory."""

import json
from dataclasses import replace

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from torch import nn

from bevt_ds.config.deepspeed import shipped_jsons
from bevt_ds.config.recipes import demo
from bevt_ds.errors import UserError
from bevt_ds.runtime.distributed import Ranks
from bevt_ds.runtime.engine import Engine
from bevt_ds.runtime.engine_shards import load_shard
from bevt_ds.train.targets import open_targets
from tests.hostile import Canary


@pytest.mark.parametrize("zipped", [True, False])
def test_hostile_checkpoint_shard_is_refused(tmp_path, zipped):
    canary, shard = tmp_path / "canary", tmp_path / "mp_rank_00_model_states.pt"
    torch.save({"module": torch.zeros(2), "extra": Canary(canary)}, shard, _use_new_zipfile_serialization=zipped)
    with pytest.raises(Exception, match="mkdir|weights_only|Unsupported"):
        load_shard(str(shard))
    assert not canary.exists()
    torch.load(shard, weights_only=False)
    assert canary.exists(), "the payload must be live, or this test shows nothing"


def test_compiled_blocks_are_refused_under_zero_3():
    config = replace(demo(), model=replace(demo().model, compile=True))
    values = json.loads(shipped_jsons()["zero3"].read_text())
    with pytest.raises(UserError, match="zero2.json"):
        Engine(nn.Linear(2, 2), config, values, Ranks(0, 1, torch.device("cpu")), 8, [], lambda _: 0.0)


@pytest.mark.parametrize("compile", [True, False])
def test_compile_switch_compiles_the_tokenizer(compile):
    config = replace(demo(), model=replace(demo().model, compile=compile))
    tokenizer = open_targets(config, torch.device("cpu"), torch.float32).tokenizer
    assert (tokenizer._compiled_call_impl is not None) == compile


def test_deepspeed_checkpoint_objects_are_read(tmp_path):
    state = {
        "loss_scaler": LossScaler(1),
        "stage": ZeroStageEnum.weights,
        "slice": fragment_address(start=1, numel=2),
        "tensor": torch.arange(3),
    }
    torch.save(state, tmp_path / "shard.pt")
    loaded = load_shard(str(tmp_path / "shard.pt"))
    assert loaded["tensor"].tolist() == [0, 1, 2]
    assert loaded["stage"] == ZeroStageEnum.weights
