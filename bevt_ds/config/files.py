"""Settings from files: what a run saved of itself, as a starting point, and `config=FILE` with overrides."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from bevt_ds.config.parse import from_dict
from bevt_ds.config.schema import RunT
from bevt_ds.errors import UserError

CONFIG = "config.json"  # of a run's folder
ENGINE = "deepspeed.json"  # of a run's folder: the DeepSpeed JSON with which it was started last
OF_ONE_RUN = {"output_dir": "", "resume": "never", "dry_run": False}  # what a run that starts from another leaves out


def saved_config(path: str) -> Path | None:
    """The config.json that `path` names: a run's folder, or the file itself. None: it names neither."""
    file = Path(path) / CONFIG if path and Path(path).is_dir() else Path(path)
    return file if file.suffix == ".json" and file.is_file() else None


def read_settings(file: Path, kind: type[RunT]) -> RunT:
    """The configuration in a run's config.json.

    Raises:
        UserError: it is damaged, or a run of another kind, or of another version, wrote it.
    """
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("no JSON object")
        return from_dict(values, kind)
    except UserError as error:
        raise UserError(f"{file.parent}: {error}") from error
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is not the {CONFIG} of a run: {error}") from error


def start_from(file: Path, kind: type[RunT]) -> RunT:
    """The settings of a run as those of a new one, in a folder of its own."""
    saved = read_settings(file, kind)
    return replace(saved, **{name: value for name, value in OF_ONE_RUN.items() if hasattr(saved, name)})


def read_overrides(path: str) -> dict[str, str]:
    """A JSON or YAML file of settings as `key=value` texts; keys are nested or dotted.

    Raises:
        UserError: no such file, not JSON or YAML, not a mapping, a key twice, or an empty value.
    """
    import yaml

    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))  # JSON is YAML too
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"config={path} cannot be read: {getattr(error, 'strerror', None) or error}.") from error
    except yaml.YAMLError as error:
        raise UserError(f"config={path} is neither JSON nor YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(values, dict):
        raise UserError(f"config={path}: expected keys and values, as in `train: {{steps: 100}}`.")
    found: dict[str, str] = {}
    for key, value in dotted(values):
        if key in found:
            raise UserError(f"config={path}: {key} is given twice.")
        if value is None:
            raise UserError(f"config={path}: {key} has no value.")
        found[key] = _as_text(value)
    return found


def dotted(values: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested settings under dotted keys, as `key=value` writes them."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from dotted(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _as_text(value: Any) -> str:
    """A value as the command line writes it."""
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(map(_as_text, value)) if isinstance(value, list) else str(value)
