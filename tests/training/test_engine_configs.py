"""The shipped DeepSpeed JSONs, and what they ask of ranks, nodes and disks."""

from __future__ import annotations

import shutil
from collections import namedtuple
from dataclasses import replace

import pytest
import torch
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from bevt_ds import pretrain
from bevt_ds.config import engines
from bevt_ds.config.deepspeed import read_json, resolve, shipped_jsons
from bevt_ds.config.engines import launch_problems, ranks_a_node, room_problems
from bevt_ds.config.recipes import demo
from bevt_ds.config.validate import micro_steps
from bevt_ds.errors import UserError
from bevt_ds.runtime import engine_setup
from bevt_ds.runtime.engine_setup import require_supported

NAMES = ("zero1", "zero2", "zero3", "zero3_offload_cpu", "zero3_offload_nvme", "zeropp")
CPU, GPU = torch.device("cpu"), torch.device("cuda")


def offloading(folder: object) -> tuple:
    train = replace(demo().train, offload_dir=str(folder), global_clips=64, global_images=0)
    return replace(demo(), train=train), read_json("zero3_offload_nvme")


def test_the_list_is_whole():
    assert tuple(sorted(NAMES)) == tuple(shipped_jsons())


@pytest.mark.parametrize("name", NAMES)
def test_deepspeed_accepts_what_is_resolved(name):
    """Its model forbids fields that it does not know."""
    config, _ = offloading("/local")
    zero = resolve(read_json(name), config, world=16, largest=100, total=1000, width=64, local=8)["zero_optimization"]
    known = DeepSpeedZeroConfig(**zero)
    assert known.stage == (int(name[4]) if name != "zeropp" else 3) and known.overlap_comm
    if name == "zeropp":
        assert (known.zero_hpz_partition_size, known.zero_quantized_weights, known.zero_quantized_gradients) == (
            8,
            True,
            True,
        )
    if name == "zero3_offload_nvme":
        assert str(known.offload_optimizer.nvme_path) == "/local" and known.offload_param.device == "cpu"
    if known.stage == 3:
        assert known.max_live_parameters == known.max_reuse_distance == 500


def test_gradients_are_sent_in_several_buckets():
    zero = resolve(read_json("zero2"), demo(), world=1, largest=10, total=1000, width=64)["zero_optimization"]
    assert (zero["reduce_bucket_size"], zero["allgather_bucket_size"]) == (126, 1000)  # even, of 1000 // 8 = 125
    huge = resolve(read_json("zero2"), demo(), world=1, largest=10, total=3 * 10**9, width=64)["zero_optimization"]
    assert huge["reduce_bucket_size"] == 50_000_000


@pytest.mark.parametrize(("environment", "ranks"), [({"LOCAL_WORLD_SIZE": "8"}, 8), ({"LOCAL_SIZE": "4"}, 4), ({}, 16)])
def test_ranks_of_a_node(environment, ranks):
    assert ranks_a_node(environment, 16) == ranks


def test_zeropp_needs_nodes_and_a_size_that_divides():
    values = read_json("zeropp")
    assert list(launch_problems(demo(), values, 16, 8)) == []
    (problem,) = launch_problems(demo(), values, 8, 8)
    assert "8 ranks are on one node: use --deepspeed_config zero3" in problem
    values["zero_optimization"]["zero_hpz_partition_size"] = 3
    (problem,) = launch_problems(demo(), values, 8, 4)
    assert 'write 2, 4, 8, or "auto"' in problem


def test_zeropp_on_one_node_is_one_line_before_anything_is_made(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    words = [
        "--deepspeed_config",
        "zeropp",
        "train.micro_clips=2",
        "train.micro_images=6",
        f"output_dir={tmp_path / 'run'}",
    ]
    with pytest.raises(UserError, match="on one node"):
        pretrain.main(words)
    assert not (tmp_path / "run").exists()
    assert pretrain.main([*words, "dry_run=true"]) == 2
    assert "would stop     zero_quantized_weights" in capsys.readouterr().out


def test_offload_folders_that_are_missing(tmp_path):
    (tmp_path / "file").write_text("")
    for folder, part in (
        ("", "train.offload_dir=FOLDER"),
        (tmp_path / "none", "no folder"),
        (tmp_path / "file", "no folder"),
    ):
        (problem,) = launch_problems(*offloading(folder), 1, 1)
        assert part in problem
    assert list(launch_problems(*offloading(tmp_path), 1, 1)) == []


def test_an_offload_folder_that_is_too_small(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")(0, 0, 15 << 30)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    config, values = offloading(tmp_path)
    assert list(room_problems(config, values, 1 << 30, world=16, local=8)) == [], "half of it is another node's"
    (problem,) = room_problems(config, values, 1 << 30, world=8, local=8)
    assert "15.0 GiB free" in problem and "offload 16.0 GiB" in problem
    assert engines.offload_folders(config, read_json("zero3_offload_cpu")) == {}


def test_devices_that_cannot_do_it(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="on a CPU use --deepspeed_config zero3"):
        require_supported(demo(), CPU, read_json("zeropp"))
    require_supported(demo(), GPU, read_json("zeropp"))
    monkeypatch.setattr(engine_setup.AsyncIOBuilder, "is_compatible", lambda self, verbose: False)
    with pytest.raises(UserError, match="libaio-dev"):
        require_supported(*(offloading(tmp_path)[0], CPU, offloading(tmp_path)[1]))


def test_a_world_that_does_not_divide_the_batch_is_told_which_do():
    train = replace(demo().train, global_clips=12, micro_clips=2, global_images=24, micro_images=4)
    with pytest.raises(UserError, match=r"train.micro_clips can be 1, 3; or start it on 1, 2, 3, 6 ranks\."):
        micro_steps(replace(demo(), train=train), 4)
    other = replace(demo(), train=replace(train, micro_images=24))  # another number of passes than the clips
    with pytest.raises(UserError, match=r"can be 1, 3\.$"):
        micro_steps(other, 4)
