"""The processes of a run and the few collectives that are not DeepSpeed's business."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bevt_ds.disk import DiskError, cannot_write
from bevt_ds.errors import UserError


@dataclass(frozen=True)
class Ranks:
    """This process among the others. Every method is collective: all ranks call it, in the same order.

    `host` is a process group over the CPU, so that small facts travel without waiting for the device.
    """

    rank: int
    world: int
    device: torch.device
    host: Any = None

    @property
    def is_main(self) -> bool:
        """True on the one process that writes and prints."""
        return self.rank == 0

    def apart(self) -> Ranks:
        """The same ranks with a process group of their own, for another thread. Collective."""
        return replace(self, host=dist.new_group(backend="gloo")) if self.world > 1 else self

    def barrier(self) -> None:
        """Wait for all."""
        if self.world > 1:
            dist.barrier(group=self.host)

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value (any small picklable object of our own) on every rank."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.host)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value (any small picklable object of our own), by rank, on every rank."""
        values = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value, group=self.host)
        return values

    def sum_counts(self, counts: Sequence[int]) -> list[int]:
        """Integers summed over ranks, element by element."""
        total = torch.tensor(counts, dtype=torch.int64)
        if self.world > 1:
            dist.all_reduce(total, group=self.host)
        return total.tolist()

    def all_hold(self, holds: bool) -> bool:
        """True where it holds on every rank."""
        return self.sum_counts([int(holds)]) == [self.world]

    @contextmanager
    def writing(self, path: Path, needed: int = 0) -> Iterator[None]:
        """A block in which rank 0 writes `path`, of so many bytes if that is known.

        Raises:
            DiskError: on all ranks, if rank 0 cannot.
        """
        problem = None
        try:
            yield
        except OSError as error:
            problem = cannot_write(path, error, needed)
        except DiskError as error:
            problem = str(error)
        if problem := self.broadcast(problem):
            raise DiskError(problem)

    def sum(self, value: Tensor) -> Tensor:
        """The sum of device tensors over ranks, in place."""
        if self.world > 1:
            dist.all_reduce(value)
        return value


DRIVER = Path("/proc/driver/nvidia/version")  # is there where an NVIDIA driver is loaded
OLDEST = (8, 0)  # compute capability: bf16 in hardware, and the oldest GPU that the kernels are compiled for


def ranks_of(environment: Mapping[str, str]) -> Ranks:
    """This process among those of torchrun or DeepSpeed's launcher. They never meet, so that no group is made."""
    rank, world, local = (int(environment.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    if not torch.cuda.is_available():
        return Ranks(rank, world, torch.device("cpu"))
    torch.cuda.set_device(local)
    return Ranks(rank, world, torch.device("cuda", local))


def describe_device(device: torch.device) -> str:
    """One line on what a run computes on, with the reason and the remedy where that is not what the machine has."""
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        old = "" if capability >= OLDEST else "; older than the kernels are made for (8.0): use model.kernels=torch"
        name, version = torch.cuda.get_device_name(device), ".".join(map(str, capability))
        return f"device: {name}, compute capability {version}, CUDA {torch.version.cuda}{old}"
    fault = driver_fault()
    return f"device: CPU, {len(os.sched_getaffinity(0))} cores" + (f". {fault}" if fault else "")


def device_memory(device: torch.device) -> tuple[str, int]:
    """The name of a GPU, and its bytes."""
    properties = torch.cuda.get_device_properties(device)
    return properties.name, properties.total_memory


def driver_fault() -> str | None:
    """Why torch can use no GPU although a driver is loaded; for a machine where it can use none.

    None: there is no driver, or the GPUs are hidden on purpose.
    """
    if not DRIVER.exists() or os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return None
    needs = "it is a build for CPUs" if torch.version.cuda is None else f"its CUDA is {torch.version.cuda}"
    return (
        f"An NVIDIA driver is loaded, but torch {torch.__version__} can use no GPU: {needs}, and CUDA 13 needs"
        " driver 580 or later; README, Requirements, says how to install for an older driver."
    )


def choose_rendezvous(environment: MutableMapping[str, str]) -> None:
    """Complete the variables by which the ranks of a run find each other.

    A single rank meets no one, so it takes a free port: DeepSpeed's launcher gives every run the same one, 29500.
    torchrun's agent holds its port itself.

    Raises:
        UserError: the port of several ranks is in use. On rank 0, which would listen there.
    """
    if "RANK" not in environment:
        environment.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1")
    elif environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return
    if environment["WORLD_SIZE"] == "1":
        environment["MASTER_PORT"] = str(_free_port())
    elif environment["RANK"] == "0":
        _require_free(int(environment["MASTER_PORT"]))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _require_free(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port that was just left is free
        try:
            probe.bind(("", port))
            probe.listen()
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            raise UserError(
                f"port {port} of this machine is in use, probably by another run: give this one its own with"
                f" `deepspeed --master_port {_free_port()} ...` (or torchrun's --master_port)."
            ) from None
