"""`bevt doctor`: check the machine, and the links between the ranks that it is started with.

Alone it checks one machine. Under a launcher, `torchrun --nproc_per_node 8 -m bevt_ds.doctor`, one rank of each node
checks its machine, all of them measure a collective, and rank 0 prints what was found.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from importlib.util import find_spec
from pathlib import Path

from bevt_ds.data.reading.index import cache_home
from bevt_ds.doctor.devices import check_decoders, check_gpu
from bevt_ds.doctor.lines import Line, as_json, as_text, is_well
from bevt_ds.doctor.machine import LEAST_CACHE, LEAST_DISK, check_open_files, check_shared_memory, check_space
from bevt_ds.doctor.software import check_compiler, check_extras, check_packages, check_python
from bevt_ds.errors import UserError

TO_MEND = 1  # exit code
MINUTES = "2"  # for all ranks to meet


def main(argv: Sequence[str]) -> int:
    """Print what is found; 0: all is well, 1: something must be mended."""
    arguments = _parser().parse_args([word for word in argv if not word.startswith(("--local_rank", "--local-rank"))])
    with redirect_stdout(sys.stderr):  # what libraries say as they load
        hosts = examine(arguments.output_dir, arguments.cache_dir)
    if hosts:
        print((as_json if arguments.json else as_text)(hosts))
    return 0 if is_well(hosts) else TO_MEND


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bevt doctor", description=__doc__.split("\n")[0])
    parser.add_argument("--output-dir", type=Path, default=Path("runs"), help="where runs are to be written (runs)")
    parser.add_argument("--cache-dir", type=Path, default=cache_home() / "shards", help="data.cache_dir of the runs")
    parser.add_argument("--json", action="store_true", help="the same as JSON")
    return parser


def examine(output: Path, cache: Path) -> dict[str, list[Line]]:
    """The lines of each host on rank 0; nothing on other ranks. Collective."""
    world, local = (int(os.environ.get(name, default)) for name, default in (("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")))
    own = examine_machine(output, cache, world) if local == 0 else []
    if world == 1:
        text = "1 rank: `torchrun --nproc_per_node N -m bevt_ds.doctor` measures the links between N"
        return {socket.gethostname(): [*own, Line("collective", "absent", text)]}
    return examine_links(own)


def examine_machine(output: Path, cache: Path, world: int) -> list[Line]:
    """Everything that needs no other rank."""
    lines = [check_python(), *check_packages(), check_compiler()]
    gpu = False
    if find_spec("torch"):  # else the packages' line has the remedy
        import torch

        gpu = torch.cuda.is_available()
        lines += check_gpu()
    return [
        *lines,
        *check_extras(gpu),
        *check_decoders(gpu),
        check_shared_memory(),
        check_open_files(world),
        check_space("disk", output, LEAST_DISK, "output_dir="),
        check_space("cache", cache, LEAST_CACHE, "data.cache_dir= (only remote shards need it)"),
    ]


def examine_links(own: list[Line]) -> dict[str, list[Line]]:
    """Let all ranks meet and measure a collective; the lines of each host on rank 0. Collective."""
    os.environ.setdefault("DEEPSPEED_TIMEOUT", MINUTES)  # before deepspeed is imported
    import torch

    from bevt_ds.doctor.collective import REMEDY, check_sum
    from bevt_ds.runtime.engine_setup import start_ranks

    try:
        ranks = start_ranks()
        line = check_sum(ranks)
        found = ranks.gather((socket.gethostname(), own))
        torch.distributed.destroy_process_group()
    except (RuntimeError, UserError) as error:
        line = Line("collective", "mend", str(error).splitlines()[0], REMEDY)
        return {socket.gethostname(): [*own, line]} if own else {}
    if not ranks.is_main:
        return {}
    hosts: dict[str, list[Line]] = {}
    for host, lines in found:
        hosts.setdefault(host, []).extend(lines)
    hosts[found[0][0]].append(line)
    return hosts
