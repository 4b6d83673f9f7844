"""The templates of docs/launch, and the commands of docs/launch.md: they start what they say, and begin it again."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import yaml
from deepspeed.launcher import runner
from torch.distributed.run import parse_args

from bevt_ds.config.command_line import parse_arguments, resolve_config
from bevt_ds.config.schema import Config
from bevt_ds.exit_codes import RANK_LOST, STOPPED
from tests.training.processes import ROOT
from tests.waiting import SECONDS, until

SLURM, MANIFEST = ROOT / "docs/launch/slurm.sh", ROOT / "docs/launch/pytorchjob.yaml"
PAGE = (ROOT / "docs/launch.md").read_text()
STAND_INS = {  # what of SLURM and Python the template calls: two tasks on one node
    "srun": """while [[ $1 == --* ]]; do shift; done
for task in 0 1; do SLURM_NTASKS=2 SLURM_PROCID=$task SLURM_LOCALID=$task "$@" & tasks+=($!); done
for task in "${tasks[@]}"; do wait $task; code=$?; ((code > most)) && most=$code; done
exit ${most:-0}""",
    "scontrol": """if [[ $1 == show ]]; then printf 'node-a\\nnode-b\\n'; else echo "$@" > requeued; fi""",
    "squeue": "echo $JOB_STATE",
    "python": """printf '%s\\n' "$WORLD_SIZE $LOCAL_RANK $LOCAL_WORLD_SIZE $MASTER_ADDR $MASTER_PORT" "$@" > made-$RANK
mv made-$RANK rank-$RANK
while [[ $UNTIL && ! -e $UNTIL ]]; do sleep 0.05; done
exit $CODE""",
}


@pytest.fixture
def slurm(tmp_path):
    """Starts the template in a folder with stand-ins, given the ranks' exit code and other variables."""
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").write_text("")
    for name, text in STAND_INS.items():
        (tmp_path / ".venv" / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / ".venv" / "bin" / name).chmod(0o755)
    job = {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "123456", "SLURM_JOB_NODELIST": "node-[a-b]"}
    job |= {"SLURM_CPUS_PER_TASK": "12", "SLURM_NTASKS_PER_NODE": "2", "BEVT_CACHE": "/local/cache"}
    path = f"{tmp_path / '.venv' / 'bin'}{os.pathsep}{os.environ['PATH']}"

    def start(code, state="RUNNING", **more):
        environment = {**os.environ, **job, "PATH": path, "CODE": str(code), "JOB_STATE": state, "UNTIL": "", **more}
        words = ["bash", str(SLURM), "output_dir=runs/joint", "data.videos=a b.tar"]
        return subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    return start


@pytest.mark.parametrize(
    ("code", "state", "restarts", "again"),
    [
        (STOPPED, "RUNNING", "50", True),
        (STOPPED, "COMPLETING", "0", False),  # scancel
        (RANK_LOST, "RUNNING", "9", True),
        (RANK_LOST, "RUNNING", "10", False),
        (2, "RUNNING", "0", False),
        (0, "RUNNING", "0", False),
    ],
)
def test_slurm_job_is_begun_again_after_a_stop_or_a_lost_rank(slurm, tmp_path, code, state, restarts, again):
    job = slurm(code, state, SLURM_RESTART_COUNT=restarts)
    output, _ = job.communicate(timeout=SECONDS)
    assert job.returncode == code, output
    assert (tmp_path / "requeued").exists() == again, output
    if again:
        assert (tmp_path / "requeued").read_text() == "requeue 123456\n"


def test_slurm_tasks_are_the_ranks_of_a_run(slurm, tmp_path):
    slurm(0).communicate(timeout=SECONDS)
    for rank in (0, 1):
        place, entry, *words = (tmp_path / f"rank-{rank}").read_text().splitlines()
        assert place == f"2 {rank} 2 node-a {20000 + 123456 % 20000}"
        assert (ROOT / entry).is_file() and words[-1] == "data.videos=a b.tar"
        config, _, _ = resolve_config(parse_arguments(words, "", "zero2"), Config, 32)
        assert (config.resume, config.data.cache_dir, config.output_dir) == ("auto", "/local/cache", "runs/joint")


def test_slurm_script_waits_for_the_ranks_after_a_signal(slurm, tmp_path):
    """SIGTERM to the script itself, as SLURM sends it to all of a job: it ends after the ranks, with their code."""
    job = slurm(STOPPED, UNTIL=str(tmp_path / "committed"))
    until(lambda: (tmp_path / "rank-1").exists() and (tmp_path / "rank-0").exists())
    job.send_signal(signal.SIGTERM)
    (tmp_path / "committed").write_text("")
    output, _ = job.communicate(timeout=SECONDS)
    assert (job.returncode, (tmp_path / "requeued").exists()) == (STOPPED, True), output
    assert "after a signal" in output


def test_slurm_script_has_no_fault_that_a_checker_finds():
    checkers = [["bash", "-n"], *([["shellcheck"]] if shutil.which("shellcheck") else [])]
    for checker in checkers:
        done = subprocess.run([*checker, SLURM], capture_output=True, text=True)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_slurm_options_and_the_page_agree():
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?", SLURM.read_text(), re.MULTILINE))
    assert options["signal"] == "USR1@300" and "requeue" in options and "--signal=USR1@300" in PAGE


def test_pytorchjob_starts_a_run_on_every_gpu(monkeypatch):
    """torchrun takes nodes, ranks and address from the operator's variables, and the run its settings."""
    job = yaml.safe_load(MANIFEST.read_text())
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    replicas = job["spec"]["pytorchReplicaSpecs"]
    assert replicas["Master"]["template"] == replicas["Worker"]["template"] and replicas["Master"]["replicas"] == 1
    pod = replicas["Worker"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == int(job["spec"]["nprocPerNode"])
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts.keys() == {volume["name"] for volume in pod["volumes"]} and mounts["shm"] == "/dev/shm"
    nodes = 1 + replicas["Worker"]["replicas"]
    given = {"NNODES": nodes, "NPROC_PER_NODE": job["spec"]["nprocPerNode"], "NODE_RANK": 2, "MASTER_ADDR": "master"}
    for name, value in given.items():
        monkeypatch.setenv(f"PET_{name}", str(value))
    launcher, *words = container["command"]
    parsed = parse_args(words)
    assert launcher == "torchrun"
    assert (parsed.nnodes, parsed.nproc_per_node, parsed.node_rank, parsed.master_addr) == ("4", "8", 2, "master")
    assert parsed.shutdown_timeout < pod["terminationGracePeriodSeconds"]
    arguments = parse_arguments(parsed.training_script_args, "", "zero2")
    config, _, _ = resolve_config(arguments, Config, nodes * int(parsed.nproc_per_node))
    assert Path(config.output_dir).is_relative_to(mounts["runs"]) and config.data.cache_dir == mounts["cache"]
    assert config.resume == "auto" and (ROOT / parsed.training_script).is_file()


def page_commands(program):
    """The words after `program` of each command in the page's blocks."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    lines = [line for language, block in blocks if not language for line in block.splitlines()]
    return [shlex.split(line)[1:] for line in lines if line.startswith(f"{program} ")]


@pytest.mark.parametrize(
    ("program", "parse", "names"),
    [
        ("deepspeed", runner.parse_args, ("user_script", "user_args")),
        ("torchrun", parse_args, ("training_script", "training_script_args")),
    ],
)
def test_documented_launches_are_parsed(program, parse, names):
    commands = page_commands(program)
    assert commands
    for words in commands:
        parsed = parse(words)
        script, rest = (getattr(parsed, name) for name in names)
        assert (ROOT / script).is_file(), script
        assert resolve_config(parse_arguments(rest, "", "zero2"), Config, 16)


def test_documented_hostfile_is_parsed(tmp_path):
    (tmp_path / "hosts").write_text(re.search(r"```hostfile\n(.*?)```", PAGE, re.DOTALL)[1])
    assert runner.fetch_hostfile(str(tmp_path / "hosts")) == {"node-0": 8, "node-1": 8}


def test_documented_batch_job_names_the_template():
    (words,) = page_commands("sbatch")
    assert ROOT / words[0] == SLURM
    assert parse_arguments(words[1:], "joint_swin_b", "zero2").given(Config)["output_dir"] == "runs/joint"
