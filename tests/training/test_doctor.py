"""`bevt doctor`: each fault of a machine is found and its remedy named; a healthy machine passes."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from bevt_ds import cli
from bevt_ds.doctor import cli as doctor
from bevt_ds.doctor import devices, machine, software
from bevt_ds.doctor.lines import Line, as_json, as_text, attempt
from tests.training.processes import launch

NEEDS = [
    "torch>=2.11,<2.14",
    "av<19,>=18.1",
    "numpy>=2",
    "nvidia-dali-cuda130>=2.4",
    "pytest>=8; extra == 'test'",
    "triton>=3; platform_system == 'Plan9'",
]


def test_doctor_passes_on_this_machine(capfd, tmp_path, monkeypatch):
    """The environment of the tests can train on its CPU; standard output is one JSON document."""
    monkeypatch.setattr(doctor, "LEAST_DISK", 1)
    monkeypatch.setattr(doctor, "LEAST_CACHE", 1)
    monkeypatch.setattr(doctor, "check_shared_memory", lambda: machine.check_shared_memory(least=1))
    monkeypatch.setattr(doctor, "check_open_files", lambda world: machine.check_open_files(world, 4096))
    code = cli.main(["doctor", "--json", "--output-dir", str(tmp_path / "a" / "b"), "--cache-dir", str(tmp_path)])
    report = json.loads(capfd.readouterr().out)
    assert (code, report["well"]) == (0, True), report
    (lines,) = report["hosts"].values()
    states = {line["name"]: line["state"] for line in lines}
    assert {n for n, state in states.items() if state == "ok"} >= {"python", "compiler", "cpu video", "dali", "disk"}
    assert states["collective"] == "absent" and not (tmp_path / "a").exists()


def test_doctor_fault_sets_the_exit_code_and_names_the_remedy(capsys, monkeypatch):
    fault = Line("open files", "mend", "256 a process", "ulimit -n 65536")
    monkeypatch.setattr(doctor, "examine_machine", lambda *_: [Line("python", "ok", "3.11.7"), fault])
    assert cli.main(["doctor"]) == 1
    printed = capsys.readouterr().out
    assert "mend    open files      256 a process\n" in printed
    assert "-> ulimit -n 65536" in printed and printed.endswith("1 to mend\n")


def test_doctor_tells_hosts_apart():
    hosts = {"a": [Line("gpu", "ok", "H100")], "b": [Line("gpu", "mend", "none", "look")]}
    assert as_text(hosts).split("\n")[0] == "a:" and "\nb:\n" in as_text(hosts)
    assert json.loads(as_json(hosts))["hosts"]["b"][0]["remedy"] == "look"
    assert not json.loads(as_json(hosts))["well"]


def test_doctor_names_packages_out_of_range_and_missing(monkeypatch):
    versions = {"torch": "2.10.0", "av": None, "nvidia-dali-cuda130": "2.4.0"}
    monkeypatch.setattr(software, "_installed", lambda name: versions.get(name, "9999" if name == "numpy" else "8"))
    monkeypatch.setattr(software, "requires", lambda _: NEEDS)
    old, av, rest = software.check_packages({"torch": "2.13.0", "numpy": "2.4.6"})
    assert (old.state, old.remedy) == ("mend", "pip install 'torch==2.13.0'")
    assert "2.10.0 is outside" in old.text
    assert (av.text, av.remedy) == ("is not installed", "pip install 'av<19,>=18.1'")
    assert rest.text.startswith("2 of 4") and "torch 2.10.0 (2.13.0)" in rest.text and "numpy 9999 (2.4.6)" in rest.text


def test_doctor_reads_the_lock_with_its_markers():
    locked = software._locked()
    assert locked["deepspeed"] and locked["torch"] and "pyyaml-ft" not in locked  # that is for Python 3.13


def test_doctor_accepts_either_dali_package(monkeypatch):
    def version(name):
        if name != "nvidia-dali-cuda120":
            raise software.PackageNotFoundError(name)
        return "2.4.0"

    monkeypatch.setattr(software, "version", version)
    assert software._installed("nvidia-dali-cuda130") == "2.4.0"
    assert software._installed("torch") is None


def test_doctor_names_an_old_python(monkeypatch):
    monkeypatch.setattr(software.platform, "python_version", lambda: "3.14.1")
    assert software.check_python().remedy == "use Python 3.11 or 3.12"


def test_doctor_names_missing_or_broken_compilers(monkeypatch, tmp_path):
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\necho 'a.cpp:1: fatal error: Python.h: none' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    line = software.check_compiler()
    assert line.state == "mend" and "Python.h: none" in line.text and "python3-dev" in line.remedy
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path / "none"))
    assert "no C++ compiler" in software.check_compiler().text


def test_doctor_names_low_limits_of_containers(tmp_path):
    small = machine.check_shared_memory(tmp_path, least=1 << 60)
    assert small.state == "mend" and "--shm-size" in small.remedy
    assert machine.check_shared_memory(tmp_path / "none").state == "mend"
    assert machine.check_open_files(2, limit=256).remedy == "ulimit -n 65536"
    assert machine.check_open_files(1024, limit=2000).state == "mend", "each rank has sockets to all others"
    assert machine.check_open_files(1, limit=-1).state == "ok"


def test_doctor_names_folders_without_room_or_that_are_files(tmp_path):
    (tmp_path / "file").write_text("")
    full = machine.check_space("disk", tmp_path / "new", 1 << 60, "output_dir=")
    assert full.state == "mend" and "output_dir=" in full.remedy and "less than" in full.text
    assert "cannot be written" in machine.check_space("disk", tmp_path / "file" / "run", 1, "output_dir=").text


@pytest.mark.parametrize("spoil", [lambda x: x[::-1], lambda x: x[:, ::2]], ids=["other pixels", "another shape"])
def test_doctor_names_a_decoder_of_wrong_pixels(spoil):
    line = attempt("nvdec", lambda: devices._judged(spoil, "NVDEC", "a video"), devices.VIDEO_DRIVER)
    assert line.state == "mend" and line.text.startswith("NVDEC decodes a video") and "compute,utility" in line.remedy
    right = attempt("nvdec", lambda: devices._judged(np.copy, "NVDEC", "a video"), "")
    assert (right.state, right.text) == ("ok", "NVDEC decodes a video, 0.0 levels off on average")


def test_doctor_reports_the_error_of_a_failing_decoder():
    """DALI decodes no H.264 on a CPU: its error is the line's text, in one line."""
    line = attempt("nvdec", lambda: str(devices.video_by_nvdec(devices.sample(), "cpu")), devices.VIDEO_DRIVER)
    assert line.state == "mend" and line.text and "\n" not in line.text


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_doctor_gpu_lines():
    lines = {line.name: line for line in [*devices.check_gpu(), *devices.check_decoders(gpu=True)]}
    assert {"driver", "gpu 0", "nccl", "nvdec", "nvjpeg"} <= lines.keys()
    assert [line for line in lines.values() if line.state != "ok"] == []


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024", "550.54.15"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build", "580.95.05"),
        ("something else", "of unknown version"),
    ],
)
def test_doctor_driver_version(text, version):
    assert devices.driver_version(text) == version


@pytest.mark.dist
def test_doctor_two_ranks_measure_their_link(tmp_path):
    output = launch(["-m", "bevt_ds.doctor", "--json", "--output-dir", str(tmp_path)], 2)
    report = json.loads(output[output.index('{\n "well"') : output.rindex("}") + 1])
    (lines,) = report["hosts"].values()
    (line,) = [line for line in lines if line["name"] == "collective"]
    assert line["state"] == "ok" and line["text"].startswith("16 MiB over 2 ranks on 1 node by gloo: "), line
    assert len(lines) == len({line["name"] for line in lines}), "one rank of a node looks at it"
