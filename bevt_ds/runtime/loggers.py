"""Where the numbers of log.jsonl go besides, by `log.to`: TensorBoard, Weights & Biases, MLflow.

Each is a `Logger` in an `Outlet`. Its first failure is its last and is said in one line: the run goes on, because
log.jsonl has the same numbers. Weights & Biases and MLflow are imported only where they are named, and are configured
by their own environment variables (WANDB_MODE=offline, WANDB_PROJECT, MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME).
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol
from uuid import uuid4

import numpy as np
from PIL import Image
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from tqdm import tqdm

from bevt_ds.data.reading.index import write_atomic
from bevt_ds.disk import cannot_write

BOARD = "tensorboard"
IDS = "loggers.json"  # in a run's folder: under which id each service knows the run
PROJECT = "bevt_ds"  # where the environment names none


class Logger(Protocol):
    """Takes a run's numbers. `folder` is the run's, `first_step` the first that will be written."""

    title: ClassVar[str]

    def __init__(self, folder: Path, first_step: int) -> None: ...

    @classmethod
    def failures(cls) -> tuple[type[Exception], ...]:
        """What it raises where it cannot write or reach something."""

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """The numbers of a log line."""

    def write_settings(self, settings: Mapping[str, Any]) -> None:
        """The configuration: dotted key -> value."""

    def write_image(self, step: int, path: Path) -> None:
        """An image file, under the name of the file."""

    def close(self, failed: bool) -> None:
        """Write what is still in memory. failed: an error ends the run."""


class Outlet:
    """A logger until its first failure."""

    def __init__(self, name: str, folder: Path, first_step: int) -> None:
        self._kind, self._folder = LOGGERS[name], folder
        self._logger: Logger | None = None
        self._attempt(lambda: self._open(folder, first_step))

    def give(self, work: Callable[[Logger], None]) -> None:
        """Let `work` have the logger, unless it has failed before."""
        if self._logger:
            logger = self._logger
            self._attempt(lambda: work(logger))

    def _open(self, folder: Path, first_step: int) -> None:
        self._logger = self._kind(folder, first_step)

    def _attempt(self, work: Callable[[], None]) -> None:
        try:
            work()
        except self._kind.failures() as error:
            self._logger = None
            tqdm.write(f"{self._reason(error)} The run goes on without {self._kind.title}.")

    def _reason(self, error: Exception) -> str:
        if isinstance(error, OSError) and self._kind is TensorBoard:
            return cannot_write(self._folder / BOARD, error)
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return f"{self._kind.title} fails: {lines[0].rstrip('.')}."


class TensorBoard:
    """Events in RUN/tensorboard/."""

    title = "TensorBoard"

    def __init__(self, folder: Path, first_step: int) -> None:
        _be_quiet()
        self._writer = SummaryWriter(str(folder / BOARD), purge_step=first_step)

    @classmethod
    def failures(cls) -> tuple[type[Exception], ...]:
        return (OSError,)

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def write_settings(self, settings: Mapping[str, Any]) -> None:
        plain = {key: str(value) if isinstance(value, tuple) else value for key, value in settings.items()}
        for summary in hparams(plain, {"loss": 0.0}):  # add_hparams would begin a second run for them
            self._writer.file_writer.add_summary(summary)

    def write_image(self, step: int, path: Path) -> None:
        self._writer.add_image(path.stem, np.asarray(Image.open(path).convert("RGB")), step, dataformats="HWC")

    def close(self, failed: bool) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run at wandb.ai, or in RUN/wandb/ with WANDB_MODE=offline; `wandb sync` uploads that."""

    title = "Weights & Biases"

    def __init__(self, folder: Path, first_step: int) -> None:
        import wandb

        number = known_id(folder, "wandb") or uuid4().hex
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=folder.name,
            dir=str(folder),
            id=number,
            resume="allow",
            settings=wandb.Settings(console="off"),
        )
        self._run.define_metric("*", step_metric="step")  # its own count of steps cannot go back on resume
        keep_id(folder, "wandb", number)

    @classmethod
    def failures(cls) -> tuple[type[Exception], ...]:
        import wandb
        from wandb.sdk import mailbox

        return (OSError, wandb.errors.Error, mailbox.MailboxClosedError, mailbox.HandleAbandonedError)

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        self._run.log({"step": step, **numbers})

    def write_settings(self, settings: Mapping[str, Any]) -> None:
        self._run.config.update(dict(settings), allow_val_change=True)

    def write_image(self, step: int, path: Path) -> None:
        import wandb

        self._run.log({"step": step, path.stem: wandb.Image(str(path))})

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class MLflow:
    """A run of the server MLFLOW_TRACKING_URI, or else in RUN/mlflow.db and RUN/mlruns/."""

    title = "MLflow"

    def __init__(self, folder: Path, first_step: int) -> None:
        from mlflow import MlflowClient

        place = os.environ.get("MLFLOW_TRACKING_URI", "")
        self._client = MlflowClient(tracking_uri=place or f"sqlite:///{folder.absolute()}/mlflow.db")
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        number = known_id(folder, "mlflow")
        if not number:
            known = self._client.get_experiment_by_name(name)
            artifacts = None if place else (folder.absolute() / "mlruns").as_uri()
            experiment = known.experiment_id if known else self._client.create_experiment(name, artifacts)
            number = self._client.create_run(experiment, run_name=folder.name).info.run_id
            keep_id(folder, "mlflow", number)
        self._id = number
        self._client.update_run(number, status="RUNNING")

    @classmethod
    def failures(cls) -> tuple[type[Exception], ...]:
        from mlflow.exceptions import MlflowException

        return (OSError, MlflowException)

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(self._id, metrics=[Metric(name, value, now, step) for name, value in numbers.items()])

    def write_settings(self, settings: Mapping[str, Any]) -> None:
        self._client.log_dict(self._id, dict(settings), "settings.json")  # a parameter may not change on resume

    def write_image(self, step: int, path: Path) -> None:
        self._client.log_artifact(self._id, str(path))

    def close(self, failed: bool) -> None:
        self._client.set_terminated(self._id, "FAILED" if failed else "FINISHED")


LOGGERS: dict[str, type[Logger]] = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases, "mlflow": MLflow}


def known_id(folder: Path, name: str) -> str:
    """The id under which a service knows this run from an earlier start; empty: it does not."""
    return str(_ids(folder).get(name, ""))


def keep_id(folder: Path, name: str, number: str) -> None:
    """Remember an id for the next start of this run."""
    write_atomic(folder / IDS, json.dumps(_ids(folder) | {name: number}).encode())


def _ids(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / IDS).read_text())
    except (FileNotFoundError, ValueError):  # a damaged one costs a new run at the service, no more
        return {}
    return found if isinstance(found, dict) else {}


def _be_quiet() -> None:
    """Keep the traceback of TensorBoard's own thread from the terminal: it raises again where it is called."""
    usual = threading.excepthook

    def hook(what: threading.ExceptHookArgs) -> None:
        ours = type(what.thread).__name__ == "_AsyncWriterThread" and isinstance(what.exc_value, OSError)
        if not ours:
            usual(what)

    threading.excepthook = hook
