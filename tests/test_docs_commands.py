"""Every command of the documents: run on small data, or run up to the data that it lacks, or parsed.

tests/test_own_videos.py runs the tutorial and what shows its run; test_launch_templates.py parses several nodes'.
"""

from __future__ import annotations

import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest

from bevt_ds import cli, evaluate, finetune, pretrain, probe, train_tokenizer
from bevt_ds.config.command_line import parse_arguments
from bevt_ds.config.completion import main as completion
from bevt_ds.config.parse import apply_overrides, parse_overrides
from bevt_ds.config.recipes import get_recipe
from bevt_ds.config.schema import Config, EvaluateConfig, FinetuneConfig, ProbeRunConfig
from bevt_ds.errors import UserError
from bevt_ds.interop import convert, features
from bevt_ds.plan import cli as plan_cli
from bevt_ds.shards import cli as shards_cli
from bevt_ds.train import tokens

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
USAGES = [module.USAGE for module in (pretrain, train_tokenizer, finetune, evaluate, probe, convert, features, tokens)]
ELSEWHERE = {"own-videos.md", "launch.md"}
SHOWN = {"report", "runs", "view", "compare"}  # run in test_own_videos.py
TRAININGS = {"pretrain", "finetune", "train_tokenizer"}
TESTS = {"evaluate": EvaluateConfig, "probe": ProbeRunConfig}
# What is not here: the examples' files, and packages that their page says to install.
LACKS = r"no file matches|(?i:no such file)|do(es)? not exist|it has no report.json|pip install (wandb|mlflow)"


def lines_of(text: str) -> list[str]:
    """Lines, with those that a backslash continues joined; of a block of `$ command` and output, the commands."""
    lines = [line.strip() for line in re.sub(r"\s*\\\n\s*", " ", text).splitlines()]
    shown = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    return shown or [line for line in lines if line]


def fenced(page: Path) -> list[str]:
    """The lines of the blocks that name no language but bash: each is a command or settings."""
    blocks = re.findall(r"^ *```(\w*)\n(.*?)^ *```", page.read_text(), re.MULTILINE | re.DOTALL)
    return [line for language, block in blocks if language in ("", "bash") for line in lines_of(block)]


def examples(usage: str) -> list[str]:
    """The whole commands of a help text, without what it says next to them."""
    found = re.findall(r"^  ((?:deepspeed|torchrun|bevt) [^\n\[]*)$", "\n  ".join(["", *lines_of(usage)]), re.MULTILINE)
    return [re.split(r"\s{3,}", line)[0] for line in found]


def words_of(line: str) -> list[str]:
    """A line's words up to where a shell would begin another command; of a launcher's, as of `bevt`."""
    words = shlex.split(line, comments=True)
    words = words[: next((i for i, word in enumerate(words) if word in (">", "&&")), len(words))]
    if words[0] in ("deepspeed", "torchrun", "python"):
        place = next(i for i, word in enumerate(words) if re.match(r"bevt_ds[./]", word))
        program = words[place].removesuffix(".py").replace("/", ".").rpartition(".")[2]
        return ["bevt", program, *words[place + 1 :]]
    return words


LINES = {line: page.name for page in PAGES for line in fenced(page)}
COMMANDS = [words_of(line) for line in dict.fromkeys([line for line, page in LINES.items() if page not in ELSEWHERE])]
COMMANDS += [words for usage in USAGES for words in map(words_of, examples(usage)) if words not in COMMANDS]


def commands(*programs: str) -> list:
    found = [words[1:] for words in COMMANDS if words[0] == "bevt" and words[1] in programs]
    return [pytest.param(words, id=" ".join(words)[:60]) for words in found]


def test_every_line_is_a_command_that_a_test_takes():
    assert len(COMMANDS) > 50 and all(examples(usage) for usage in USAGES)
    taken = (
        TRAININGS | TESTS.keys() | SHOWN | {"shards", "plan", "tokens", "convert", "features", "replay", "completion"}
    )
    for words in COMMANDS:
        known = words[0] == "make" or (words[0] == "bevt" and words[1] in taken)  # `make`: test_conventions.py
        assert known or all(re.fullmatch(r"[\w.]+=\S+", word) for word in words), words
    for program in taken - SHOWN:
        assert commands(program), program


@pytest.mark.parametrize("words", commands(*TRAININGS))
def test_documented_training_resolves(words, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    try:
        code = import_module(f"bevt_ds.{words[0]}").main([*words[1:], "dry_run=true"])
    except UserError as error:  # a tokenizer or teacher says what the head is to be
        assert re.search(LACKS, str(error)) and re.search("(tokenizer|teacher).weights=", str(error))
        return
    printed = capsys.readouterr().out
    stops = [line for line in printed.splitlines() if line.startswith("would stop")]
    assert all(re.search(LACKS, line) for line in stops), stops
    assert code == (2 if stops else 0)
    assert "parameters" in printed


@pytest.mark.parametrize("words", commands(*TESTS))
def test_documented_words_of_a_measurement_are_known(words):
    """These need weights to resolve; the words and their types can be checked without."""
    kind = TESTS[words[0]]
    arguments = parse_arguments(words[1:], default_recipe="finetune_k400", default_json="none")
    assert get_recipe(arguments.recipe, FinetuneConfig)
    assert apply_overrides(kind(), parse_overrides(arguments.overrides, kind)).weights


@pytest.mark.parametrize("words", [words for words in COMMANDS if "=" in words[0]], ids=" ".join)
def test_documented_settings_are_known(words):
    assert apply_overrides(Config(), parse_overrides(words, Config)) != Config()


@pytest.mark.parametrize("words", commands("shards"))
def test_documented_shards_command_is_parsed(words, monkeypatch):
    """It has no unknown option: what each verb does has its own tests."""
    calls = []
    monkeypatch.setattr(shards_cli.argparse.ArgumentParser, "error", lambda self, message: pytest.fail(message))
    for verb in ("_pack", "_index", "_check", "_stats", "_draw"):
        monkeypatch.setattr(shards_cli, verb, lambda arguments, verb=verb: calls.append(verb))
    monkeypatch.setattr(shards_cli, "ensure_demo_shards", calls.append)
    assert shards_cli.main(words[1:]) == 0
    assert len(calls) == 1


class Reached(Exception):
    """All words have been read."""


@pytest.mark.parametrize("words", commands("plan"))
def test_documented_plan_is_parsed(words, monkeypatch):
    """What it prints is held by tests/benchmarks/test_scaling_plan.py."""

    def reached(*_: object) -> None:
        raise Reached

    monkeypatch.setattr(plan_cli, "make_plan", reached)
    with pytest.raises(Reached):
        plan_cli.main(words[1:])


@pytest.mark.parametrize("words", commands("tokens"))
def test_documented_making_of_ids_lacks_its_files_alone(words, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match="tokenizer.weights=encoder.pkl: no such file"):
        tokens.main(words[1:])


@pytest.mark.parametrize("words", commands("convert", "features", "replay"))
def test_documented_command_lacks_its_files_alone(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(words) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert re.search(LACKS, said) and words[1] in said


@pytest.mark.parametrize("words", commands("completion"))
def test_documented_completion_is_printed(words, capsys):
    assert completion(words[1:], {}) == 0
    assert "_bevt" in capsys.readouterr().out
