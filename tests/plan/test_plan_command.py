"""`bevt plan` from its command line on."""

import json

import pytest

from bevt_ds.cli import main

SMALL = ["recipe=demo", "data.size=64", "data.token_size=32", "data.short_side=64,80", "model.window=2,2,2"]
SMALL += ["train.micro_clips=2", "train.micro_images=6"]


def run(capsys, *words: str) -> tuple[int, str, str]:
    code = main(["plan", *words])
    return code, *capsys.readouterr()


def test_a_plan_says_all_of_it(capsys):
    code, text, error = run(capsys, *SMALL, "--gpus", "2", "--deepspeed_config", "zero1")
    assert code == 0 and not error
    names = "run parameters step arithmetic sent time rates input decoding checkpoint whole memory largest recommended"
    assert [line.split()[0] for line in text.split("\n\n")[0].splitlines() if line[0] != " "] == [
        name for part in names.split() for name in [part] * (2 if part == "input" else 1)
    ]
    assert "1 micro-step of 2 clips + 6 images a GPU" in text
    assert "|     1 |    1+ |" in text and "activations, stage 4" in text


def test_json_has_the_same_numbers(capsys):
    code, text, _ = run(capsys, *SMALL, "--gpus", "2", "--json")
    values = json.loads(text)
    assert code == 0 and values["gpus"] == 2 and values["micro_clips"] == 2
    assert values["memory"]["peak"] < values["memory"]["usable"]
    assert set(values["seconds"]) == {"compute", "launch", "link", "decode", "storage"}
    assert values["gpu_hours"] == pytest.approx(values["steps"] * values["step_seconds"] * 2 / 3600)


def test_what_if_has_a_line_for_each(capsys):
    code, text, _ = run(capsys, *SMALL, "--what-if", "1,2,4", "--gpus-per-node", "2")
    assert code == 0 and [line.split()[1] for line in text.splitlines()[2:]] == ["1", "2", "4"]
    code, text, _ = run(capsys, *SMALL, "--what-if", "gpus=1,4", "--json")
    assert [plan["nodes"] for plan in json.loads(text)] == [1, 1]


@pytest.mark.parametrize(("words", "message"), [
    (["--gpu", "h300"], "--gpu h300: not known; there are a100-40"),
    (["recipe=joint_swin_b", "--gpus", "24"], "ranks divide the step"),
    (["recipe=joint_swin_b", "--what-if", "8,24"], "24 GPUs do not divide a step of 256 + 2,048 samples; 1, 2, 4"),
    (["recipe=joint_swin_c"], "no recipe 'joint_swin_c'"),
    (["--gpus", "12", "--nodes", "2"], "--gpus 12 is not --nodes 2 of --gpus-per-node 8: 16"),
    (["--gpus", "0"], "must be above 0"),
    (["--nvdecs", "0"], "--nvdecs 0: must be above 0"),
    (["--what-if", "gpus=8,many"], "--what-if gpus=8,many: numbers of GPUs, such as gpus=64,128,256"),
    (["recipe=demo", "train.micro_clips=4096", "train.global_clips=4096", "train.micro_images=16384",
      "train.global_images=16384", "model.name=swin_b", "--gpus", "1"], "it does not fit: a rank needs"),
])  # fmt: skip
def test_mistakes_are_one_line(capsys, words, message):
    code, _, error = run(capsys, *words)
    assert code == 2 and message in error and error.count("\n") == 1
