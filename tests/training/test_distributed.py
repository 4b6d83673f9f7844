"""Ranks and ports on a shared machine; messages about drivers and GPUs."""

from __future__ import annotations

import socket

import pytest
import torch

from bevt_ds import UserError
from bevt_ds.runtime import distributed
from bevt_ds.runtime.distributed import choose_rendezvous, describe_device


@pytest.fixture
def taken():
    """A port that another program listens at."""
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        yield str(other.getsockname()[1])


def rank(number, world, port):
    return {"RANK": str(number), "WORLD_SIZE": str(world), "LOCAL_RANK": str(number), "MASTER_PORT": port}


def test_process_without_a_launcher_is_rank_0_of_1():
    environment = {}
    choose_rendezvous(environment)
    assert environment["RANK"] == "0" and environment["WORLD_SIZE"] == "1"
    assert int(environment["MASTER_PORT"]) > 0


def test_single_rank_moves_away_from_a_used_port(taken):
    environment = rank(0, 1, taken)
    choose_rendezvous(environment)
    assert environment["MASTER_PORT"] != taken


def test_several_ranks_at_a_used_port_get_the_remedy(taken):
    with pytest.raises(UserError, match=f"port {taken} .* --master_port"):
        choose_rendezvous(rank(0, 2, taken))


def test_other_ranks_and_torchrun_keep_the_port(taken):
    for environment in (rank(1, 2, taken), {**rank(0, 1, taken), "TORCHELASTIC_USE_AGENT_STORE": "True"}):
        choose_rendezvous(environment)
        assert environment["MASTER_PORT"] == taken


def test_free_port_is_kept(taken):
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = str(probe.getsockname()[1])
    environment = rank(0, 2, port)
    choose_rendezvous(environment)
    assert environment["MASTER_PORT"] == port


@pytest.fixture
def driver(tmp_path, monkeypatch):
    """A machine with an NVIDIA driver that torch cannot use."""
    (tmp_path / "version").write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15\n")
    monkeypatch.setattr(distributed, "DRIVER", tmp_path / "version")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_too_old_gpu_driver_is_named(driver, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    line = describe_device(torch.device("cpu"))
    assert "its CUDA is 13.0, and CUDA 13 needs driver 580" in line and "\n" not in line


def test_no_gpu_or_a_hidden_gpu_gives_no_warning(driver, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "driver" not in describe_device(torch.device("cpu"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(distributed, "DRIVER", tmp_path / "none")
    assert "driver" not in describe_device(torch.device("cpu"))


@pytest.mark.parametrize(("capability", "old"), [((9, 0), False), ((8, 0), False), ((7, 5), True)])
def test_gpu_older_than_the_kernels_is_named(monkeypatch, capability, old):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA T4")
    line = describe_device(torch.device("cuda"))
    assert line.startswith("device: NVIDIA T4") and ("model.kernels=torch" in line) is old
