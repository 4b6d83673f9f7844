"""What every command does around its work: from its words to a configuration, one clear line for a user's mistake."""

from __future__ import annotations

import os
import select
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Generic, TextIO

from bevt_ds.config.deepspeed import merge, read_json
from bevt_ds.config.engines import launch_problems, ranks_a_node
from bevt_ds.config.files import ENGINE, read_overrides, saved_config
from bevt_ds.config.help import page
from bevt_ds.config.parse import apply_overrides, config_fields, get_value, parse_overrides
from bevt_ds.config.recipes import FINETUNING, RECIPES, get_recipe, recipe_for
from bevt_ds.config.schema import EvaluateConfig, InferenceT, RunConfig, TrainingConfig, TrainingT
from bevt_ds.config.validate import micro_steps, problems, require_inputs, validate
from bevt_ds.disk import refusal
from bevt_ds.errors import UserError
from bevt_ds.exit_codes import CLOSED_PIPE, INTERRUPTED
from bevt_ds.launcher import launchers

OTHERS_WAIT = 5.0  # seconds
OF_TRAININGS = """\
  recipe=RUN                the settings of a run, by its folder or config.json, for a new one
  config=FILE               a JSON or YAML file of settings; key=value wins
  resume=auto output_dir=RUN   continues a run with its own settings
  --deepspeed_config FILE   engine knobs (default: ZeRO-2 as ds_configs/zero2.json); "auto" is filled in from the recipe
  --help                    this text; with recipe=NAME the defaults shown are that recipe's
"""


@dataclass(frozen=True)
class DryRun(Generic[TrainingT]):
    """A run that is asked about and not started. `is_sound`: whether its settings can be; else it is not worked out."""

    config: TrainingT
    values: dict[str, Any]  # the DeepSpeed JSON
    notes: list[str]  # what the JSON changed
    world: int  # ranks
    is_sound: bool = True


Report = Callable[[DryRun[TrainingT]], tuple[str, list[str]]]  # what is printed, and what would stop the run


@dataclass(frozen=True)
class Arguments:
    """The command line, split: DeepSpeed's JSON, the recipe, the file of settings, and the other key=value words."""

    deepspeed_config: str
    recipe: str
    overrides: list[str] = field(default_factory=list)
    wants_help: bool = False
    settings: dict[str, str] = field(default_factory=dict)  # of config=FILE

    def given(self, kind: type[RunConfig]) -> dict[str, str]:
        """What overrides the recipe, as texts by key: the file's settings, and over them the command line's.

        Raises:
            UserError: an unknown key, one given twice, or a word without `=`.
        """
        file = [f"{key}={text}" for key, text in self.settings.items()]
        return parse_overrides(file, kind) | parse_overrides(self.overrides, kind)


def parse_arguments(argv: Sequence[str], default_recipe: str, default_json: str) -> Arguments:
    """Split a command line. Launchers add `--local_rank`, which is read from the environment instead.

    A run that continues alone, with resume=auto and output_dir=RUN and no recipe, has RUN's settings as its recipe. The
    DeepSpeed JSON of a run whose settings are taken is taken too, unless another is named.

    Raises:
        UserError: an option that does not exist, a recipe or a file of settings that is given twice or cannot be read.
    """
    named: dict[str, str | None]
    json_path, named, overrides, wants_help = None, dict.fromkeys(("recipe", "config")), [], False
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
        elif name in named and equals:
            if named[name] is not None:
                raise UserError(f"{name} is given twice: {named[name]!r} and {value!r}.")
            named[name] = value
        elif word.startswith("-"):
            raise UserError(f"no option {name!r}: there are --deepspeed_config FILE and --help; all else is key=value.")
        else:
            overrides.append(word)
    if json_path == "":
        raise UserError("--deepspeed_config needs a file, or a name, such as zero2.")
    settings = {} if named["config"] is None else read_overrides(named["config"])
    of_file = settings.pop("recipe", "") or _run_to_continue(settings, overrides) or default_recipe
    recipe = of_file if named["recipe"] is None else named["recipe"]
    engine = (file := saved_config(recipe)) and file.with_name(ENGINE)
    default_json = str(engine) if engine and engine.is_file() else default_json
    return Arguments(json_path or default_json, recipe, overrides, wants_help, settings)


def _run_to_continue(settings: Mapping[str, str], overrides: Sequence[str]) -> str:
    """The folder of the run that these settings continue, if it is there; or nothing."""
    given = {**settings, **dict(word.partition("=")[::2] for word in overrides)}
    folder = given.get("output_dir", "")
    return folder if given.get("resume") == "auto" and folder and saved_config(folder) else ""


def start_training(
    argv: Sequence[str],
    kind: type[TrainingT],
    usage: str,
    train: Callable[[TrainingT, dict[str, Any], list[str], set[str]], int],
    report: Report[TrainingT],
    check: Callable[[TrainingT], list[str]] = lambda _: [],
    default_recipe: str = "",
    shown_recipe: str = "",
) -> int:
    """A training program from its command line on: help, dry run, or the run itself. Returns the exit code.

    Args:
        kind: the configuration of its runs.
        train: takes the configuration, the DeepSpeed JSON, lines that say what the JSON changed and `check` found, and
            the keys that the command line or the JSON decides.
        report: what a dry run prints, and what would stop the run.
        check: finds in a valid configuration what works and is hardly meant, a line each, or raises UserError.
        default_recipe: where the command line names none; empty: it must.
        shown_recipe: the one whose defaults `--help` shows then.

    Raises:
        UserError: any mistake that shows without torch.
    """
    arguments = parse_arguments(argv, default_recipe, default_json="zero2")
    if arguments.wants_help:
        print(page(f"{usage}\n{OF_TRAININGS}", RECIPES[kind], get_recipe(arguments.recipe or shown_recipe, kind)))
        return 0
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if apply_overrides(get_recipe(arguments.recipe, kind), arguments.given(kind)).dry_run:
        return dry_run(arguments, kind, world, report, check) if os.environ.get("RANK", "0") == "0" else 0
    config, values, notes = resolve_config(arguments, kind, world)
    notes += check(config)
    require_inputs(config)
    return train(config, values, notes, given_keys(arguments, config))


def dry_run(
    arguments: Arguments,
    kind: type[TrainingT],
    world: int,
    report: Report[TrainingT],
    check: Callable[[TrainingT], list[str]],
) -> int:
    """Print what a run would be, then all that would stop it; returns the exit code. See `start_training`.

    What the run would be is not worked out from settings that are themselves at fault.
    """
    overrides = arguments.given(kind)
    config = apply_overrides(recipe_for(arguments.recipe, kind, overrides), overrides)
    values = read_json(arguments.deepspeed_config)
    stops: list[str] = []
    config, notes = _listed(stops, partial(merge, config, set(overrides), values, world), (config, []))
    stops += [*problems(config, values), *launch_problems(config, values, world, ranks_a_node(os.environ, world))]
    notes += [] if stops else _listed(stops, partial(check, config), [])
    text, more = report(DryRun(config, values, notes, world, is_sound=not stops))
    print("\n".join([text, *(f"would stop     {problem}" for problem in [*stops, *more])]))
    return UserError.exit_code if stops or more else 0


def _listed(stops: list[str], work: Callable[[], Any], otherwise: Any) -> Any:
    """The result of `work`; if a user's mistake ends it, that joins the list and the result is `otherwise`."""
    try:
        return work()
    except UserError as error:
        stops.append(str(error))
        return otherwise


def resolve_config(
    arguments: Arguments, kind: type[TrainingT], world: int
) -> tuple[TrainingT, dict[str, Any], list[str]]:
    """Recipe, command line and DeepSpeed JSON as one valid config; the JSON; and what the JSON changed.

    Raises:
        UserError: any mistake that shows without looking at shards or weights.
    """
    overrides = arguments.given(kind)
    config = apply_overrides(recipe_for(arguments.recipe, kind, overrides), overrides)
    values = read_json(arguments.deepspeed_config)
    config, notes = merge(config, set(overrides), values, world)
    micro_steps(validate(config, values), world)
    for problem in launch_problems(config, values, world, ranks_a_node(os.environ, world)):
        raise UserError(problem)
    return config, values, notes


def given_keys(arguments: Arguments, config: TrainingConfig) -> set[str]:
    """The keys that the command line or its file names, and those that the JSON changed from the recipe to `config`."""
    kind = type(config)
    recipe = get_recipe(arguments.recipe, kind)
    changed = {leaf.key for leaf in config_fields(kind) if get_value(recipe, leaf.key) != get_value(config, leaf.key)}
    return changed | set(arguments.given(kind))


def start_inference(
    argv: Sequence[str],
    kind: type[InferenceT],
    usage: str,
    starting_point: Callable[[str, str], InferenceT],
    work: Callable[[InferenceT], int],
) -> int:
    """A program that runs trained weights, from its command line on. Returns the exit code.

    Args:
        kind: its configuration.
        starting_point: the configuration before `key=value`, from weights (empty: none) and recipe (empty: none).

    Raises:
        UserError: any mistake that shows without looking at shards.
    """
    arguments = parse_arguments(argv, default_recipe="", default_json="none")
    if arguments.wants_help:
        recipes = FINETUNING if kind is EvaluateConfig else {}
        print(page(usage, recipes, starting_point("", arguments.recipe)))
        return 0
    overrides = arguments.given(kind)
    config = apply_overrides(starting_point(overrides.get("weights", ""), arguments.recipe), overrides)
    require_inputs(validate(config))
    return work(config)


def require_own_package(file: str) -> None:
    """Takes the package's folder off the import path, where its config/ and data/ would shadow other modules.

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
    """Call `main` and exit with its code; a `UserError` becomes one line and exit code 2, a closed pipe nothing.

    Most mistakes are every rank's mistake, so the others give rank 0 the time to say it first: the launcher then ends
    them before they repeat it. A disk that is full or read-only is one line too. Anything else keeps its traceback.
    """
    sys.exit(run_program(main, sys.argv[1:]))


def run_program(main: Callable[[Sequence[str]], int], argv: Sequence[str]) -> int:
    """What `run` does, with the exit code as its result."""
    launchers()  # while they are there
    return while_read(partial(_exit_code, main, argv))


def _exit_code(main: Callable[[Sequence[str]], int], argv: Sequence[str]) -> int:
    try:
        code = main(argv)
        _leave_ranks()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        code = INTERRUPTED
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
    except OSError as error:
        if (refused := refusal(error, Path.cwd())) is None:
            raise
        print(f"error: {refused}", file=sys.stderr, flush=True)
        code = refused.exit_code
    return code


def while_read(work: Callable[[], int]) -> int:
    """The exit code of `work`; 141 where nothing reads what it prints any more, as behind `| head`.

    Raises:
        BrokenPipeError: from another pipe than those of standard output and error.
    """
    try:
        try:
            code = work()
        except SystemExit:  # argparse's way, after its help
            sys.stdout.flush()
            raise
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        unread = [stream for stream in (sys.stdout, sys.stderr) if _is_unread(stream)]
        if not unread:
            raise
        for stream in unread:  # what is still buffered is flushed when the interpreter ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return CLOSED_PIPE


def _is_unread(stream: TextIO) -> bool:
    """Whether it is a pipe whose other end is closed."""
    poll = select.poll()
    poll.register(stream.fileno(), 0)
    return any(state & (select.POLLERR | select.POLLHUP) for _, state in poll.poll(0))


def _leave_ranks() -> None:
    """End the process group, if there is one: its threads can abort a process that ends around them."""
    distributed = sys.modules.get("torch.distributed")  # only where it was needed: torch takes seconds to import
    if distributed and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
