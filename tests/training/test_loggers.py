"""`log.to`: Weights & Biases and MLflow next to TensorBoard; one that is missing or fails is one line.

The two packages are replaced by stand-ins with the functions that are called, by the names and arguments of wandb
0.31 and mlflow 3.17.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from bevt_ds.config.loggers import LogConfig
from bevt_ds.config.recipes import demo
from bevt_ds.config.validate import missing_inputs, problems
from bevt_ds.runtime.run_log import RunLog
from tests.downstream.worlds import ALONE


class WandbError(Exception):
    pass


class MlflowError(Exception):
    pass


class FakeRun:
    """wandb.Run: what it was given, and an error from `fails_at` lines on."""

    def __init__(self, options: dict[str, Any], fails_at: int) -> None:
        self.options, self.fails_at, self.logged, self.metrics, self.ended = options, fails_at, [], {}, None
        self.settings: dict[str, Any] = {}
        self.config = SimpleNamespace(update=self.update)

    def define_metric(self, name: str, step_metric: str) -> None:
        self.metrics[name] = step_metric

    def log(self, data: dict[str, Any]) -> None:
        if len(self.logged) >= self.fails_at:
            raise WandbError("the service is gone.\nmore")
        self.logged.append(data)

    def update(self, values: dict[str, Any], allow_val_change: bool) -> None:
        assert allow_val_change
        self.settings |= values

    def finish(self, exit_code: int) -> None:
        self.ended = exit_code


@pytest.fixture
def wandb(monkeypatch) -> SimpleNamespace:
    made = SimpleNamespace(runs=[], fails_at=1000)

    def init(*, project, name, dir, id, resume, settings):
        options = {"project": project, "name": name, "dir": dir, "id": id, "resume": resume, "settings": settings}
        made.runs.append(FakeRun(options, made.fails_at))
        return made.runs[-1]

    module, sdk = ModuleType("wandb"), ModuleType("wandb.sdk")
    sdk.mailbox = SimpleNamespace(MailboxClosedError=WandbError, HandleAbandonedError=WandbError)
    module.init, module.sdk, module.errors = init, sdk, SimpleNamespace(Error=WandbError)
    module.Settings = lambda console: {"console": console}
    module.Image = lambda path: ("image", path)
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setitem(sys.modules, "wandb.sdk", sdk)
    return made


class FakeClient:
    """mlflow.MlflowClient, of one store."""

    store: dict[str, Any] = {}

    def __init__(self, tracking_uri: str) -> None:
        self.store.setdefault("uri", tracking_uri)

    def get_experiment_by_name(self, name: str) -> SimpleNamespace | None:
        if self.store.get("down"):
            raise MlflowError("no answer")
        return self.store.get(name)

    def create_experiment(self, name: str, artifact_location: str | None) -> str:
        self.store[name] = SimpleNamespace(experiment_id="7", artifacts=artifact_location)
        return "7"

    def create_run(self, experiment_id: str, run_name: str) -> SimpleNamespace:
        self.store.setdefault("runs", []).append((experiment_id, run_name))
        return SimpleNamespace(info=SimpleNamespace(run_id=f"run{len(self.store['runs'])}"))

    def update_run(self, run_id: str, status: str) -> None:
        self.store.setdefault("status", []).append((run_id, status))

    set_terminated = update_run

    def log_batch(self, run_id: str, metrics: list) -> None:
        self.store.setdefault("metrics", []).extend((run_id, m.key, m.value, m.step) for m in metrics)

    def log_dict(self, run_id: str, dictionary: dict, artifact_file: str) -> None:
        self.store[artifact_file] = dictionary

    def log_artifact(self, run_id: str, local_path: str) -> None:
        self.store["artifact"] = local_path


@pytest.fixture
def mlflow(monkeypatch) -> dict[str, Any]:
    package = ModuleType("mlflow")
    package.MlflowClient = FakeClient
    exceptions, entities = ModuleType("mlflow.exceptions"), ModuleType("mlflow.entities")
    exceptions.MlflowException = MlflowError
    entities.Metric = lambda key, value, timestamp, step: SimpleNamespace(key=key, value=value, step=step)
    for module in (package, exceptions, entities):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(FakeClient, "store", {})
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return FakeClient.store


def write_run(folder: Path, to: list[str], first_step: int = 0) -> None:
    Image.new("RGB", (8, 4)).save(folder / "samples.png")
    with RunLog(folder, ALONE, first_step, to) as log:
        log.write_settings(demo())
        for step in (first_step, first_step + 1):
            log.write(step, {"loss": 2.0 - step, "mfu": None, "waits_for": "decode"})
        log.write_image(first_step + 1, folder / "samples.png")


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_wandb_gets_the_numbers_settings_and_images_of_a_run(tmp_path, wandb):
    write_run(tmp_path, ["wandb"])
    (run,) = wandb.runs
    assert run.options["dir"] == str(tmp_path) and run.options["name"] == tmp_path.name
    assert run.options["project"] == "bevt_ds" and run.options["resume"] == "allow"
    assert run.logged[:2] == [{"step": 0, "loss": 2.0}, {"step": 1, "loss": 1.0}]
    assert run.logged[2] == {"step": 1, "samples": ("image", str(tmp_path / "samples.png"))}
    assert run.metrics == {"*": "step"} and run.settings["optim.lr"] == demo().optim.lr and run.ended == 0
    assert not (tmp_path / "tensorboard").exists()


def test_resumed_run_is_the_same_run_to_wandb_and_mlflow(tmp_path, wandb, mlflow):
    write_run(tmp_path, ["wandb", "mlflow"])
    write_run(tmp_path, ["wandb", "mlflow"], first_step=1)
    first, second = (run.options["id"] for run in wandb.runs)
    assert first == second
    assert mlflow["runs"] == [("7", tmp_path.name)]
    assert [line["step"] for line in lines(tmp_path)] == [0, 1, 2]


def test_mlflow_gets_the_numbers_in_a_store_of_the_run(tmp_path, mlflow):
    write_run(tmp_path, ["mlflow", "tensorboard"])
    assert mlflow["uri"] == f"sqlite:///{tmp_path}/mlflow.db"
    assert mlflow["bevt_ds"].artifacts == (tmp_path / "mlruns").as_uri()
    assert mlflow["metrics"] == [("run1", "loss", 2.0, 0), ("run1", "loss", 1.0, 1)]
    assert mlflow["settings.json"]["model.name"] == "tiny" and mlflow["artifact"] == str(tmp_path / "samples.png")
    assert mlflow["status"] == [("run1", "RUNNING"), ("run1", "FINISHED")]
    assert list((tmp_path / "tensorboard").iterdir())


def test_an_error_of_the_run_is_told_to_the_loggers(tmp_path, wandb, mlflow):
    with pytest.raises(KeyError), RunLog(tmp_path, ALONE, 0, ["wandb", "mlflow"]):
        raise KeyError("of the run")
    assert wandb.runs[0].ended == 1 and mlflow["status"][-1] == ("run1", "FAILED")


def test_logger_that_fails_is_one_line_and_the_run_goes_on(tmp_path, wandb, mlflow, capsys):
    wandb.fails_at, mlflow["down"] = 1, True
    write_run(tmp_path, ["wandb", "mlflow", "tensorboard"])
    said = capsys.readouterr().out.splitlines()
    assert said == [
        "MLflow fails: no answer. The run goes on without MLflow.",
        "Weights & Biases fails: the service is gone. The run goes on without Weights & Biases.",
    ]
    assert [line["step"] for line in lines(tmp_path)] == [0, 1] and list((tmp_path / "tensorboard").iterdir())


def test_damaged_list_of_ids_begins_a_new_run_at_the_service(tmp_path, wandb):
    (tmp_path / "loggers.json").write_text("{")
    write_run(tmp_path, ["wandb"])
    assert json.loads((tmp_path / "loggers.json").read_text()) == {"wandb": wandb.runs[0].options["id"]}


@pytest.mark.parametrize(("to", "said"), [("wandb,comet", "'comet' is none of"), ("wandb,wandb", "named twice")])
def test_unknown_and_repeated_loggers_are_refused(to, said):
    assert [said in problem for problem in problems(replace(demo(), log=LogConfig(to)))] == [True]


def test_missing_package_is_named_with_its_pip_command_before_the_start(monkeypatch):
    monkeypatch.setattr("bevt_ds.config.validate.find_spec", lambda name: None if name == "wandb" else object())
    config = replace(demo(), log=LogConfig("tensorboard, wandb"))
    assert list(problems(config)) == []
    (problem,) = missing_inputs(config)
    assert problem == "log.to=tensorboard, wandb: the package wandb is not installed: pip install wandb"
    assert list(missing_inputs(replace(config, log=LogConfig("none")))) == []
