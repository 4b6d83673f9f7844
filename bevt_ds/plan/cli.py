"""`bevt plan`: what a run would take on GPUs that are not at hand."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from bevt_ds.config.command_line import parse_arguments, resolve_config
from bevt_ds.config.recipes import FINETUNING
from bevt_ds.config.schema import Config, FinetuneConfig
from bevt_ds.errors import UserError
from bevt_ds.runtime.gpus import GPUS, Gpu, gpu_named

from .compute import rates
from .planning import alternatives, largest_micro, make_plan, on, require_fit
from .report import as_json, as_text, what_if
from .supply import CLIP_BYTES, CORES, IMAGE_BYTES, Machines

USAGE = "bevt plan [recipe=NAME] [key=value ...] [--deepspeed_config FILE] [--gpu NAME] [--gpus N] [options]"
ABOUT = """What a run takes, before it starts: parameters, FLOPs, memory a GPU, bytes sent, input, time and cost.
No GPU is needed and nothing of the model's size is allocated. Words are those of bevt pretrain and bevt finetune."""


def counts(text: str) -> list[int]:
    """'gpus=8,16', or '8,16' -> [8, 16]. Raises UserError for another text."""
    words = text.removeprefix("gpus=").split(",")
    if not all(word.isdecimal() and int(word) for word in words):
        raise UserError(f"--what-if {text}: numbers of GPUs, such as gpus=64,128,256.")
    return list(map(int, words))


def parser() -> argparse.ArgumentParser:
    """The options; all other words are the run's."""
    result = argparse.ArgumentParser("bevt plan", usage=USAGE, description=ABOUT, allow_abbrev=False)
    add = result.add_argument
    add("--gpu", default="h200", help=f"type: {', '.join(gpu.name for gpu in GPUS)}; default: %(default)s")
    add("--gpus", type=int, help="in all; default: --nodes times --gpus-per-node, or 8")
    add("--nodes", type=int, help="default: as many as the GPUs need")
    add("--gpus-per-node", type=int, default=8, help="default: %(default)s")
    add("--cores", type=int, default=CORES, help="CPU cores for each GPU; default: %(default)s")
    add("--nvdecs", type=int, help="video decoders of each GPU; default: those that its type has")
    add("--storage", type=float, default=10.0, help="GB/s that all nodes read together; default: %(default)s")
    add("--clip-bytes", type=float, default=CLIP_BYTES, help="of a video in the shards; default: %(default)s")
    add("--image-bytes", type=float, default=IMAGE_BYTES, help="of an image in the shards; default: %(default)s")
    add("--samples", type=int, help="videos of an epoch (images, if there are only these), for runs given in epochs")
    add("--mfu", type=float, help="share of the GPU's peak to assume, instead of measured rows")
    add("--rows", type=Path, help="folder of measured rows; default: benchmarks/results of the checkout")
    add("--what-if", metavar="gpus=N,N,...", help="a line for each number of GPUs, in place of the plan")
    add("--json", action="store_true", help="numbers in place of the table")
    return result


def main(argv: Sequence[str]) -> int:
    """The command. Raises UserError for a plan that cannot be, which includes one that does not fit."""
    options, words = parser().parse_known_args(argv)
    gpu, machines = gpu_of_options(options), machines_of(options)
    arguments = parse_arguments(words, default_recipe="joint_swin_b", default_json="zero2")
    kind = FinetuneConfig if arguments.recipe in FINETUNING else Config
    world = machines.gpus
    config, values, _ = resolve_config(arguments, kind, 1 if options.what_if else world)
    speed = rates(gpu, config.model.name, options.mfu, options.rows)
    if options.what_if:
        each = [replace(machines, gpus=n) for n in counts(options.what_if)]
        plans = [make_plan(on(config, m.gpus), values, gpu, m, speed, options.samples) for m in each]
        print(json.dumps([as_json(p, gpu, speed) for p in plans], indent=1) if options.json else what_if(plans))
        return 0
    plan = make_plan(config, values, gpu, machines, speed, options.samples)
    plans = alternatives(plan, values, gpu, speed)
    if options.json:
        print(json.dumps(as_json(plan, gpu, speed), indent=1))
    else:
        print(as_text(plan, plans, gpu, speed, largest_micro(plan, gpu)))
    require_fit(plan, plans, gpu)
    return 0


def gpu_of_options(options: argparse.Namespace) -> Gpu:
    """Raises UserError for an unknown type, or one without decoders."""
    gpu = gpu_named(options.gpu)
    if options.nvdecs is not None and options.nvdecs <= 0:
        raise UserError(f"--nvdecs {options.nvdecs}: must be above 0; data.decoder=cpu decodes on cores.")
    return gpu if options.nvdecs is None else replace(gpu, decoders=options.nvdecs)


def machines_of(options: argparse.Namespace) -> Machines:
    """Raises UserError for numbers of GPUs and nodes that do not go together."""
    per_node, nodes = options.gpus_per_node, options.nodes
    gpus = per_node * (nodes or 1) if options.gpus is None else options.gpus
    if min(gpus, per_node, 1 if nodes is None else nodes, options.cores, options.storage) <= 0:
        raise UserError("--gpus, --nodes, --gpus-per-node, --cores and --storage must be above 0.")
    if nodes and gpus != nodes * per_node:
        raise UserError(f"--gpus {gpus} is not --nodes {nodes} of --gpus-per-node {per_node}: {nodes * per_node}.")
    storage = options.storage * 1e9
    return Machines(gpus, per_node, options.cores, storage, options.clip_bytes, options.image_bytes)
