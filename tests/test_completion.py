"""`bevt completion`: the script in a real bash, and help of every command."""

from __future__ import annotations

import subprocess

import pytest

from bevt_ds import cli
from bevt_ds.config.recipes import FINETUNING, PRETRAINING

ASK = """
eval "$SCRIPT"
complete -p bevt > /dev/null || exit 1
COMP_LINE="$LINE" COMP_POINT=${#LINE} COMP_WORDBREAKS="$BREAKS"
_bevt
printf '%s\\n' "${COMPREPLY[@]}"
"""
BREAKS = " \t\n\"'><=;|&(:"  # bash's own


@pytest.fixture(scope="module")
def scripts() -> dict[str, str]:
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        for shell in ("bash", "zsh"):
            printed: list[str] = []
            patch.setattr("builtins.print", lambda text, printed=printed: printed.append(text))
            assert cli.main(["completion", shell]) == 0
            (found[shell],) = printed
    return found


def complete(script: str, line: str, cwd=None, breaks: str = BREAKS) -> list[str]:
    """What bash offers behind a line."""
    env = {"SCRIPT": script, "LINE": line, "BREAKS": breaks, "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        ["bash", "--norc", "-c", ASK], env=env, cwd=cwd, capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stderr == ""
    return done.stdout.split()


def test_bash_completes_commands_recipes_keys_and_values(scripts, tmp_path):
    script = scripts["bash"]
    assert set(complete(script, "bevt ")) >= {*cli.PROGRAMS, *cli.GROUPS, "completion", "--help"}
    assert complete(script, "bevt pretr") == ["pretrain"]
    assert complete(script, "bevt pretrain recipe=") == [*PRETRAINING]
    assert complete(script, "bevt finetune train.steps=3 recipe=finetune_d") == ["finetune_diving48", "finetune_demo"]
    assert sorted(complete(script, "bevt pretrain optim.wa")) == ["optim.warmup_ratio=", "optim.warmup_steps="]
    assert complete(script, "bevt pretrain train.precision=") == ["bf16", "fp16", "fp32"]
    assert complete(script, "bevt pretrain dry_run=t") == ["true"]
    assert "train_tokenizer" in complete(script, "bevt train")
    assert "train.steps=" in complete(script, "bevt train_tokenizer train.st")
    assert complete(script, "bevt shards pa") == ["pack"]
    assert complete(script, "bevt view --b") == ["--bad"]
    assert complete(script, "bevt completion --h") == ["--help"]
    assert set(complete(script, "bevt evaluate recipe=")) == {*FINETUNING}


def test_bash_completes_paths_where_no_word_fits(scripts, tmp_path):
    (tmp_path / "mine-000000.tar").touch()
    assert complete(scripts["bash"], "bevt pretrain data.videos=mi", tmp_path) == ["mine-000000.tar"]
    assert complete(scripts["bash"], "bevt report mi", tmp_path) == ["mine-000000.tar"]


def test_bash_that_does_not_break_words_at_equals_gets_whole_words(scripts):
    assert complete(scripts["bash"], "bevt pretrain dry_run=t", breaks=" ") == ["dry_run=true"]


def test_zsh_gets_the_same_words(scripts):
    tables = scripts["bash"].partition("_bevt() {")[0]
    assert scripts["zsh"].startswith("#compdef bevt\n" + tables) and "compdef _bevt bevt" in scripts["zsh"]
    assert 'then _bevt "$@"' in scripts["zsh"], "a file of $fpath is run as its function at the first tab"


def test_other_shells_are_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["completion", "fish"])
    assert "choose from" in capsys.readouterr().err


@pytest.mark.parametrize("command", [*cli.PROGRAMS, *cli.GROUPS, "completion"])
def test_help_of_every_command_says_how_to_use_it(command, capsys):
    try:
        code = cli.main([command, "--help"])
    except SystemExit as end:
        code = end.code
    text = capsys.readouterr().out
    assert code == 0
    assert text.startswith("usage: ") and len(text.splitlines()) > 4
