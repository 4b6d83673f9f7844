"""What every command does around its work: arguments, its own package, one clear line for a user's mistake."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bevt_ds.errors import UserError

OTHERS_WAIT = 5.0  # seconds


@dataclass(frozen=True)
class Arguments:
    """The command line, split: DeepSpeed's JSON, the recipe, and the other key=value words."""

    deepspeed_config: str
    recipe: str
    overrides: list[str] = field(default_factory=list)
    wants_help: bool = False


def parse_arguments(argv: Sequence[str], default_recipe: str, default_json: str) -> Arguments:
    """Split a command line. Launchers add `--local_rank`, which is read from the environment instead.

    Raises:
        UserError: an option that does not exist, or a recipe given twice.
    """
    json_path, recipe, overrides, wants_help = default_json, None, [], False
    words = iter(argv)
    for word in words:
        name, equals, value = word.partition("=")
        if name in ("-h", "--help"):
            wants_help = True
        elif name == "--deepspeed":
            continue
        elif name in ("--local_rank", "--local-rank"):
            _ = value if equals else next(words, "")
        elif name == "--deepspeed_config":
            json_path = value if equals else next(words, "")
        elif name == "recipe":
            if recipe is not None:
                raise UserError(f"recipe is given twice: {recipe!r} and {value!r}.")
            recipe = value
        elif word.startswith("-"):
            raise UserError(f"no option {name!r}: there are --deepspeed_config FILE and --help; all else is key=value.")
        else:
            overrides.append(word)
    if not json_path:
        raise UserError("--deepspeed_config needs a file: the project's are in ds_configs/.")
    return Arguments(json_path, default_recipe if recipe is None else recipe, overrides, wants_help)


def require_own_package(file: str) -> None:
    """Takes the package's folder off the import path, where its config.py and data/ would shadow other modules.

    Exits if the package that is installed is not the one around `file`: two versions of the code would mix.
    """
    here, ours = Path(file).resolve().parent, Path(__file__).resolve().parents[1]
    if sys.path and Path(sys.path[0] or ".").resolve() == here:
        del sys.path[0]
    if here != ours:
        sys.exit(
            f"error: this is {file}, but `import bevt_ds` finds the copy installed at {ours}. Run"
            f" `pip install -e {here.parent}`, or start the installed copy with `python -m bevt_ds.{Path(file).stem}`."
        )


def run(main: Callable[[Sequence[str]], int]) -> None:
    """Call `main` and exit with its code; a `UserError` becomes one line and exit code 2.

    Most mistakes are every rank's mistake, so the others give rank 0 the time to say it first: the launcher then ends
    them before they repeat it. Anything that is not a `UserError` keeps its traceback.
    """
    try:
        code = main(sys.argv[1:])
        _leave_ranks()
    except UserError as error:
        rank = os.environ.get("RANK", "0")
        if rank != "0":
            time.sleep(OTHERS_WAIT)
        print(
            "error: " if rank == "0" else f"error on rank {rank}: ",
            error,
            sep="",
            file=sys.stderr,
            flush=True,
        )
        code = error.exit_code
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(code)


def _leave_ranks() -> None:
    """End the process group, if there is one: its threads can abort a process that ends around them."""
    distributed = sys.modules.get("torch.distributed")  # only where it was needed: torch takes seconds to import
    if distributed and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def shipped_json(name: str) -> str:
    """A DeepSpeed JSON of the project: beside the package in a checkout, inside it where it is installed."""
    package = Path(__file__).resolve().parents[1]
    return str(next(p for p in (package.parent / "ds_configs" / name, package / "ds_configs" / name) if p.is_file()))
