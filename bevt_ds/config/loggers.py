"""Which loggers a run has next to log.jsonl."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from bevt_ds.config.fields import Field

LOGGERS = ("tensorboard", "wandb", "mlflow")  # by the names of their packages


@dataclass(frozen=True)
class LogConfig:
    """Where the numbers of log.jsonl go besides."""

    to: Annotated[
        str, Field("loggers next to log.jsonl: tensorboard, wandb, mlflow, with commas between; or none", resume="free")
    ] = "tensorboard"

    @property
    def names(self) -> list[str]:
        """The loggers that are named."""
        return [] if self.to == "none" else [name.strip() for name in self.to.split(",")]
