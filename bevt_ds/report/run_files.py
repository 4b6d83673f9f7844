"""Reads what a run has written so far, of any kind, while it goes on or after it was killed. Damage is listed."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bevt_ds.config.files import CONFIG, dotted
from bevt_ds.config.parse import to_dict
from bevt_ds.config.recipes import RECIPES
from bevt_ds.data.loader import LEDGER
from bevt_ds.errors import UserError
from bevt_ds.folders import CHECKPOINTS, LOG, MANIFEST, checkpoints
from bevt_ds.runtime.lock import owner_of
from bevt_ds.runtime.run_dir import CHANGES, PANELS, SAMPLES, SUMMARY
from bevt_ds.runtime.run_record import RECORD, read_record

CHANGE = {"step": int, "key": str}  # what entries must hold, and of which kind
START = {"first_step": int, "devices": list, "versions": dict, "commit": str, "command": str, "outcome": str}
PNG_END = b"IEND\xaeB`\x82"
OF_ONE_RUN = {"output_dir", "resume", "dry_run"}  # settings that say nothing of what is trained
Row = dict[str, Any]


@dataclass(frozen=True)
class Commit:
    """A checkpoint on disk."""

    name: str
    step: int
    megabytes: float
    loss: float | None


@dataclass(frozen=True)
class Run:
    """A run's folder as it was found. `damage`: what could not be read, a sentence each; the rest is still shown."""

    folder: Path
    settings: Mapping[str, Any]  # dotted key -> value
    recipe_settings: Mapping[str, Any]  # of its recipe as it is today; empty where there is none of that name
    rows: list[Row]  # of log.jsonl, by step
    starts: list[Row]  # of run.json
    changes: list[Row]  # overridden on resume
    summary: Mapping[str, Any]
    bad: Counter[tuple[str, str]]  # (stream, reason) -> samples
    commits: list[Commit]  # the newest first
    panels: list[tuple[int, Path]]  # by step, images of masked predictions; -1: of the end
    running: str | None  # who holds the folder
    damage: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.folder.name or str(self.folder)

    @property
    def last(self) -> Row:
        """The last value of every logged field."""
        return {key: value for row in self.rows for key, value in row.items()}

    @property
    def state(self) -> str:
        """running, finished, or how it ended."""
        if self.running:
            return "running"
        if not self.starts:
            return "unknown"
        return str(self.starts[-1].get("outcome", "killed"))

    @property
    def steps_done(self) -> int:
        return int(self.rows[-1]["step"]) + 1 if self.rows else 0

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """Updates done and the values of a logged field; of lines that have no number there, nothing."""
        points = [(row["step"] + 1, row[name]) for row in self.rows if _is_number(row.get(name))]
        return [step for step, _ in points], [value for _, value in points]

    @property
    def waits(self) -> Counter[str]:
        """What the data was short of, in how many log lines."""
        return Counter(row["waits_for"] for row in self.rows if row.get("waits_for"))

    def differences(self) -> dict[str, tuple[str, str]]:
        """key -> the recipe's value and the run's, of settings that say what is trained."""
        # A run of an earlier version lacks fields that came since.
        keys = [key for key in self.recipe_settings if key not in OF_ONE_RUN and key in self.settings]
        pairs = {key: (self.recipe_settings[key], self.settings[key]) for key in keys}
        return {key: (str(a), str(b)) for key, (a, b) in pairs.items() if _plain(a) != _plain(b)}


def read_run(folder: Path) -> Run:
    """Everything that is there.

    Raises:
        UserError: no such folder, or no file of a run is in it.
    """
    written = (CONFIG, LOG, RECORD)
    if not folder.is_dir() or not any((folder / name).exists() for name in written):
        raise UserError(
            f"{folder} is not a run's folder: it holds none of {', '.join(written)}. `bevt runs FOLDER` lists runs."
        )
    damage: list[str] = []

    def part(read: Callable[[], Any], default: Any) -> Any:
        try:
            return read()
        except (UserError, OSError, UnicodeDecodeError) as error:
            damage.append(str(error))
            return default

    settings, found = part(lambda: read_settings(folder), {}), checkpoints(folder / CHECKPOINTS)
    return Run(
        folder=folder,
        settings=dict(dotted(settings)),
        recipe_settings=dict(dotted(recipe_settings(settings.get("recipe", "")))),
        rows=part(lambda: read_rows(folder / LOG, damage), []),
        starts=part(lambda: entries(folder / RECORD, read_record(folder / RECORD), START, damage), []),
        changes=part(lambda: read_changes(folder / CHANGES, damage), []),
        summary=part(lambda: read_summary(folder / SUMMARY), {}),
        bad=part(lambda: bad_samples(folder / LEDGER), Counter()),
        commits=[part(lambda c=c: read_commit(c), Commit(c.name, -1, 0.0, None)) for c in found],
        panels=part(lambda: list(panels_of(folder, damage)), []),
        running=part(lambda: owner_of(folder), None),
        damage=damage,
    )


def read_settings(folder: Path) -> dict[str, Any]:
    """The configuration of a run. UserError: there is none, or it is damaged."""
    if not (folder / CONFIG).exists():
        raise UserError(f"{folder} is not a run's folder: it has no {CONFIG}. `bevt runs FOLDER` lists runs.")
    return read_json(folder / CONFIG, dict)


def read_json(path: Path, kind: type) -> Any:
    """The content of a file of JSON; of one that is not there, nothing. UserError: it is damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return kind()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}") from error
    if not isinstance(value, kind):
        raise UserError(f"{path} is damaged: it holds no {'settings' if kind is dict else 'list'}")
    return value


def entries(path: Path, found: list[Any], kinds: Mapping[str, type], damage: list[str]) -> list[Row]:
    """Those of a file's entries whose fields, as far as they are there, are of these kinds; the others are damage."""
    good = [
        entry
        for entry in found
        if isinstance(entry, dict)
        and all(isinstance(entry[name], kind) for name, kind in kinds.items() if entry.get(name) is not None)
    ]
    if len(good) < len(found):
        damage.append(f"{path}: {len(found) - len(good)} entries cannot be read and are left out")
    return good


def read_changes(path: Path, damage: list[str]) -> list[Row]:
    """What was overridden on resume; a field that is missing is shown as unknown."""
    unknown = dict.fromkeys((*CHANGE, "from", "to"), "?")
    return [unknown | entry for entry in entries(path, read_json(path, list), CHANGE, damage)]


def read_summary(path: Path) -> dict[str, Any]:
    """The closing summary. UserError: it is damaged."""
    summary = read_json(path, dict)
    for name, values in summary.items():
        counts = values.get("id_counts", []) if isinstance(values, dict) else []
        entropy = values.get("unigram_entropy", 0) if isinstance(values, dict) else 0
        if not isinstance(counts, list) or not all(map(_is_number, [*counts, entropy])):
            raise UserError(f"{path} is damaged: {name} has no numbers where they must be")
    return summary


def recipe_settings(name: str) -> dict[str, Any]:
    """The settings of a recipe, nested; empty where there is none of this name."""
    make = next((recipes[name] for recipes in RECIPES.values() if name in recipes), None)
    return to_dict(make()) if make else {}


def read_rows(path: Path, damage: list[str]) -> list[Row]:
    """The lines of log.jsonl by step; no file: none. A torn last line is normal in a run that goes on."""
    if not path.exists():
        return []
    *lines, last = path.read_text(encoding="utf-8", errors="replace").split("\n")
    rows, torn = [], 0
    for line in lines:
        row = _row(line)
        torn += row is None
        rows += [] if row is None else [row]
    if torn:
        damage.append(f"{path}: {torn} lines cannot be read and are left out")
    rows += [row] if (row := _row(last)) else []
    return sorted({row["step"]: row for row in rows}.values(), key=lambda row: row["step"])


def _row(line: str) -> Row | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    good = isinstance(row, dict) and isinstance(row.get("step"), int) and isinstance(row.get("waits_for", ""), str)
    return row if good else None


def bad_samples(path: Path) -> Counter[tuple[str, str]]:
    """How often each reason stands in bad_samples.jsonl, by stream; each sample once."""
    places: dict[tuple, tuple[str, str]] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else ():
        try:
            event = json.loads(line)
            places[event["stream"], event["shard"], event["key"]] = (event["stream"], str(event["reason"]))
        except (ValueError, KeyError, TypeError):
            continue  # a line that a kill cut short
    return Counter(places.values())


def read_commit(folder: Path) -> Commit:
    """What a checkpoint says of itself; its bytes are not verified here. UserError: its manifest is damaged."""
    manifest = read_json(folder / MANIFEST, dict)
    if manifest.get("loss") is not None and not _is_number(manifest["loss"]):
        raise UserError(f"{folder / MANIFEST} is damaged: its loss is no number")
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return Commit(folder.name, int(folder.name.partition("-")[2]), size / 1e6, manifest.get("loss"))


def panels_of(folder: Path, damage: list[str]) -> Iterator[tuple[int, Path]]:
    """Images of masked predictions by step, and at last that of the end; one that was cut short is damage."""
    found = [(step, path) for path in (folder / PANELS).glob("step-*.png") if (step := path.stem[5:]).isdecimal()]
    for step, path in [*sorted((int(step), path) for step, path in found), (-1, folder / SAMPLES)]:
        if path.exists() and not path.read_bytes().endswith(PNG_END):
            damage.append(f"{path} is cut short and left out")
        elif path.exists():
            yield step, path


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf")


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
