"""The `bevt` command: `bevt COMMAND ...`. Each command's module is loaded only when it is named."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from importlib import import_module

import bevt_ds
from bevt_ds.config.command_line import run_program, while_read
from bevt_ds.errors import UserError
from bevt_ds.exit_codes import INTERRUPTED, USER_ERROR

PROGRAMS = {  # the same programs that a launcher starts as files: bevt_ds/pretrain.py, ...
    "pretrain": "pretrain BEVT; on several GPUs: deepspeed --module bevt_ds.pretrain",
    "train_tokenizer": "train a tokenizer: frames to ids and back",
    "finetune": "fine-tune a classifier; on several GPUs: deepspeed --module bevt_ds.finetune",
    "evaluate": "test a classifier on several views of every video",
    "probe": "measure the features of a frozen encoder",
}
GROUPS = {
    "plan": ("bevt_ds.plan.cli", "what a run takes on GPUs that are not at hand: memory, time, cost"),
    "shards": ("bevt_ds.shards.cli", "draw, pack, index, check and survey shards of videos and images"),
    "tokens": ("bevt_ds.train.tokens", "the tokenizer's ids of all crops of a pretraining's shards, made once"),
    "doctor": ("bevt_ds.doctor.cli", "whether this machine can train: versions, GPU, decoders, limits, links"),
    "checkpoint": ("bevt_ds.report.checkpoints", "list, verify, compare and export what a run has committed"),
    "replay": ("bevt_ds.train.replay", "run a step that was not finite again: which sample, which layer"),
    "report": ("bevt_ds.report.page", "runs as one HTML page: curves, predictions, settings, checkpoints"),
    "view": ("bevt_ds.report.view", "contact sheets of shards: frames, crop, mask, the tokenizer's view"),
    "runs": ("bevt_ds.report.listing", "a table of the runs below a folder: state, step, loss, speed"),
    "features": ("bevt_ds.interop.features", "features of all samples of shards, by a frozen encoder, in files"),
    "convert": ("bevt_ds.interop.convert", "weights of others to ours, and ours to torchvision, timm and Hugging Face"),
    "compare": ("bevt_ds.report.compare", "settings in which runs differ, and their last losses side by side"),
}
COMPLETION = "bash or zsh: a script that completes commands, options, recipes and key="


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. A user's mistake, and Ctrl-C, is one line on standard error."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0] in PROGRAMS:
        return run_program(import_module(f"bevt_ds.{words[0]}").main, words[1:])
    return while_read(partial(_run, words))


def _run(words: Sequence[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        print(_usage())
        return 0 if words else USER_ERROR
    if words[0] == "--version":
        print(f"bevt_ds {bevt_ds.__version__}")
        return 0
    try:
        if words[0] == "completion":
            modules = {name: f"bevt_ds.{name}" for name in PROGRAMS} | {
                name: module for name, (module, _) in GROUPS.items()
            }
            return import_module("bevt_ds.config.completion").main(words[1:], modules)
        if words[0] not in GROUPS:
            raise UserError(f"no command {words[0]!r}; there are: {', '.join([*PROGRAMS, *GROUPS])}")
        return import_module(GROUPS[words[0]][0]).main(words[1:])
    except UserError as error:
        print(f"bevt: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt as interrupt:
        print("bevt: interrupted", *interrupt.args, sep=": ", file=sys.stderr)
        return INTERRUPTED


def _usage() -> str:
    texts = PROGRAMS | {name: text for name, (_, text) in GROUPS.items()} | {"completion": COMPLETION}
    lines = [f"  {name:<17}{text}" for name, text in texts.items()]
    return "\n".join(["usage: bevt COMMAND [options]   (--help after any of them; --version)", "", *lines])


if __name__ == "__main__":
    sys.exit(main())
