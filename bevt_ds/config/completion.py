"""`bevt completion bash|zsh`: a script that completes commands, their options, recipes, `key=` and values.

The script holds every word, so that a press of the tab key starts no Python. Options are read from the source of each
command's module, because to import some of them takes seconds.
"""

from __future__ import annotations

import argparse
import ast
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from bevt_ds.config.loggers import LOGGERS
from bevt_ds.config.parse import config_fields
from bevt_ds.config.recipes import FINETUNING, RECIPES
from bevt_ds.config.schema import (
    Config,
    EvaluateConfig,
    FinetuneConfig,
    ProbeRunConfig,
    RunConfig,
)
from bevt_ds.config.tokenizing import TokenizerTrainingConfig

KINDS: dict[str, type[RunConfig]] = {  # what the key=value words of a command are of
    "pretrain": Config,
    "train_tokenizer": TokenizerTrainingConfig,
    "finetune": FinetuneConfig,
    "evaluate": EvaluateConfig,
    "probe": ProbeRunConfig,
    "plan": Config,
    "view": Config,
}
NAMES = {**RECIPES, EvaluateConfig: FINETUNING, ProbeRunConfig: {}}  # of recipes
OF_A_LAUNCHER = ("--deepspeed_config", "--help")
EPILOG = """\
bash:  bevt completion bash > ~/.local/share/bash-completion/completions/bevt
zsh:   bevt completion zsh > DIR/_bevt, where DIR is a folder of $fpath
       or, for either, eval "$(bevt completion SHELL)" in the shell's start file
"""
BASH = """\
_bevt() {
  local line="${COMP_LINE:0:$COMP_POINT}" word command="" key
  local -a words
  read -ra words <<< "$line"
  [[ "$line" == *" " ]] && words+=("")
  word="${words[${#words[@]}-1]}"
  (( ${#words[@]} > 2 )) && command="${words[1]}"
  if [[ "$word" == *=* ]]; then
    key="${word%%=*}"
    COMPREPLY=($(compgen -W "$(_bevt_values "$command" "$key")" -- "${word#*=}"))
    (( ${#COMPREPLY[@]} )) || COMPREPLY=($(compgen -f -- "${word#*=}"))
    [[ "$COMP_WORDBREAKS" == *=* ]] || COMPREPLY=("${COMPREPLY[@]/#/$key=}")
  else
    COMPREPLY=($(compgen -W "$(_bevt_words "$command")" -- "$word"))
    (( ${#COMPREPLY[@]} )) || COMPREPLY=($(compgen -f -- "$word"))
    [[ "${COMPREPLY[*]}" == *= ]] && compopt -o nospace 2> /dev/null
  fi
  return 0
}
complete -F _bevt bevt"""
ZSH = """\
_bevt() {
  local word="${words[CURRENT]}" command="" key
  local -a found
  (( CURRENT > 2 )) && command="${words[2]}"
  if [[ "$word" == *=* ]]; then
    key="${word%%=*}"
    found=(${=$(_bevt_values "$command" "$key")})
    compset -P '*='
    if (( $#found )); then compadd -- $found; else _files; fi
  else
    found=(${=$(_bevt_words "$command")})
    compadd -S '' -- ${(M)found:#*=}
    compadd -- ${found:#*=}
    _files
  fi
}
# As a file of $fpath this is the function's first call; sourced, it is not.
if [[ "${funcstack[1]}" == _bevt ]]; then _bevt "$@"; else compdef _bevt bevt; fi"""


def main(argv: Sequence[str], modules: Mapping[str, str]) -> int:
    """Print the script; returns the exit code. modules: command -> the module whose options it takes."""
    parser = argparse.ArgumentParser(
        prog="bevt completion",
        description=__doc__.split("\n")[0],
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("shell", choices=("bash", "zsh"))
    shell = parser.parse_args(argv).shell
    print(script(shell, {**modules, "completion": __name__}))
    return 0


def script(shell: str, modules: Mapping[str, str]) -> str:
    """The whole script for one shell."""
    words = {"": [*modules, "--help", "--version"]} | {name: [*words_of(name, modules[name])] for name in modules}
    values = {f"{name} {key}": found for name in KINDS for key, found in values_of(KINDS[name])}
    parts = ["#compdef bevt"] if shell == "zsh" else []
    parts += [_table("_bevt_words", "$1", words), _table("_bevt_values", "$1 $2", values)]
    return "\n".join([*parts, ZSH if shell == "zsh" else BASH])


def words_of(command: str, module: str) -> Iterator[str]:
    """What may follow a command: its verbs, options, and the keys of its configuration."""
    if command in KINDS:
        yield from (f"{leaf.key}=" for leaf in config_fields(KINDS[command]))
    yield from OF_A_LAUNCHER if command in KINDS and command not in ("plan", "view") else written_words(module)


def written_words(module: str) -> list[str]:
    """The options, verbs and choices that the source of a module gives to argparse."""
    spec, found = find_spec(module), ["--help"]
    calls = ast.walk(ast.parse(Path(str(spec and spec.origin)).read_text(encoding="utf-8")))
    for call in (node for node in calls if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
        first = call.args[0].value if call.args and isinstance(call.args[0], ast.Constant) else ""
        if call.func.attr == "add_parser" or (call.func.attr == "add_argument" and str(first).startswith("--")):
            found.append(str(first))
    return list(dict.fromkeys(found))


def values_of(kind: type[RunConfig]) -> Iterator[tuple[str, list[str]]]:
    """Key -> its values, of the keys that take a few."""
    for leaf in config_fields(kind):
        if found := [*NAMES[kind]] if leaf.key == "recipe" else _choices(leaf.key, leaf.type):
            yield leaf.key, found


def _choices(key: str, kind: Any) -> list[str]:
    if key == "log.to":
        return [*LOGGERS, "none"]
    if kind is bool:
        return ["true", "false"]
    return [str(value) for value in get_args(kind)] if get_origin(kind) is Literal else []


def _table(name: str, subject: str, rows: Mapping[str, Sequence[str]]) -> str:
    """A function of the shell that prints the words of a row."""
    cases = [f'    "{key}") echo "{" ".join(words)}" ;;' for key, words in rows.items()]
    return "\n".join([f"{name}() {{", f'  case "{subject}" in', *cases, "  esac", "}"])
