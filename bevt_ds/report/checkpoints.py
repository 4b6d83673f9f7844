"""`bevt checkpoint ls|verify|diff|export`: what a run has committed, whether it is whole, and what differs.

Nothing is unpickled, and no model is made. RUN is the folder that a run writes; PATH, FIRST and SECOND are a run, of
which the newest checkpoint is meant, or one of its `checkpoints/step-...`.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bevt_ds.config.files import dotted
from bevt_ds.disk import in_words, writing
from bevt_ds.errors import UserError
from bevt_ds.exit_codes import FINISHED, FOUND_FAULTS
from bevt_ds.folders import CHECKPOINTS, MANIFEST, WEIGHTS, checkpoint_folders
from bevt_ds.model.tensor_file import read_tensors, require_finite, write_tensors
from bevt_ds.report.compare import aligned, side_by_side
from bevt_ds.runtime.checkpoint import RESHARDING, find_damage
from bevt_ds.runtime.distributed import Ranks
from bevt_ds.runtime.manifest import file_problems, read_manifest
from bevt_ds.runtime.pieces import WEIGHTS as MASTERS
from bevt_ds.runtime.pieces import SavedPieces

ALONE = Ranks(0, 1, torch.device("cpu"))
STATE, TENSORS = "state", "model.safetensors"
FACTS = ("step", "world", "stage", "schema", "loss", "data")
SHOWN = 10  # tensors that a comparison names
NO_NUMBER = "in one only, of another size, or not finite"


def main(argv: Sequence[str]) -> int:
    """Run one of the commands; returns the exit code: 1 where something is damaged, or differs."""
    arguments = _parser().parse_args(argv)
    return int(arguments.work(arguments))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bevt checkpoint", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, text: str, work: Any, *names: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(work=work)
        for each in names:
            command.add_argument(each.lower(), type=Path, metavar=each)
        return command

    add("ls", "list a run's checkpoints; sizes are compared, contents are not read", list_commits, "RUN")
    add("verify", "read every byte of a run's checkpoints, or of one", verify, "PATH")
    add("diff", "settings, facts and tensors in which two checkpoints differ", diff, "FIRST", "SECOND")
    export = add("export", "write a checkpoint's weights as config.json and model.safetensors", export_weights, "PATH")
    export.add_argument("out", type=Path, metavar="OUT", help="a folder that does not exist yet")
    export.add_argument("--raw", action="store_true", help="the weights themselves where the run keeps an average")
    return parser


def list_commits(arguments: argparse.Namespace) -> int:
    """A line for each checkpoint, the newest first."""
    rows, faults = [["checkpoint", "step", "ranks", "ZeRO", "precision", "loss", "size", "state"]], False
    for folder in commits_of(arguments.run):
        size = in_words(sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()))
        try:
            manifest = read_manifest(folder)
            problems = file_problems(folder, manifest["files"])
        except UserError as error:
            manifest, problems = {}, [str(error)]
        faults |= bool(problems)
        rows.append([folder.name, *_facts(manifest), size, "; ".join(problems) or "all files there"])
    print(aligned(rows))
    return FOUND_FAULTS if faults else FINISHED


def _facts(manifest: Mapping[str, Any]) -> list[str]:
    if not manifest:
        return ["-"] * 5
    loss = manifest.get("loss")
    precision = str(dict(dotted(manifest["config"])).get("train.precision", "-"))
    numbers = [str(manifest[name]) for name in ("step", "world", "stage")]
    return [*numbers, precision, "-" if loss is None else f"{loss:.4f}"]


def verify(arguments: argparse.Namespace) -> int:
    """A line for each checkpoint: whole, or what is wrong."""
    path = arguments.path
    folders = [path] if _is_commit(path) else commits_of(path)
    problems = {folder: find_damage(folder, ALONE) for folder in folders}
    for folder, problem in problems.items():
        print(f"{folder}: {problem or 'whole'}")
    return FOUND_FAULTS if any(problems.values()) else FINISHED


def diff(arguments: argparse.Namespace) -> int:
    """Tables of what differs."""
    folders = [one_commit(path) for path in (arguments.first, arguments.second)]
    manifests = [read_manifest(folder) for folder in folders]
    names = [str(folder) for folder in folders]
    facts = [{name: manifest.get(name) for name in FACTS} for manifest in manifests]
    parts = [
        side_by_side("fact", names, facts),
        side_by_side("setting", names, [dict(dotted(manifest["config"])) for manifest in manifests]),
        _tensor_differences(folders, all(manifest["schema"] >= RESHARDING for manifest in manifests)),
    ]
    print("\n\n".join(filter(None, parts)) or "no difference")
    return FOUND_FAULTS if any(parts) else FINISHED


def _tensor_differences(folders: Sequence[Path], by_pieces: bool) -> str:
    """By kind, how many tensors differ, and those that differ most; empty: none."""
    rows = []
    with ExitStack() as files:
        first, second = (_Tensors(files, folder, by_pieces) for folder in folders)
        for key in sorted(first.names | second.names):
            if distance := _distance(first.get(key), second.get(key)):
                rows.append((distance, key))
        total = len(first.names | second.names)
    if not rows:
        return ""
    rows.sort(key=lambda row: (-row[0], row[1]))
    shown = [[key, NO_NUMBER if d == float("inf") else f"{d:.3g}"] for d, key in rows[:SHOWN]]
    head = f"{len(rows)} of {total} tensors differ; the largest differences:"
    return f"{head}\n{aligned(shown)}"


def _distance(ours: Tensor | None, theirs: Tensor | None) -> float:
    """The largest difference of two elements; infinite for tensors of other sizes, or where one has NaN."""
    if ours is None or theirs is None or ours.shape != theirs.shape:
        return float("inf")
    if torch.equal(ours, theirs) or not ours.numel():
        return 0.0
    return float(torch.nan_to_num((ours.double() - theirs.double()).abs(), nan=float("inf")).max())


class _Tensors:
    """A checkpoint's tensors by name: of all its pieces, read one by one, or the exported weights."""

    def __init__(self, files: ExitStack, folder: Path, by_pieces: bool) -> None:
        if by_pieces:
            saved = files.enter_context(SavedPieces(folder / STATE))
            self._sizes, self._whole, self._saved = saved.sizes(), saved.whole(), saved
            self.names = self._sizes.keys() | self._whole.keys()
        else:
            self._sizes, self._whole = {}, read_tensors(folder / WEIGHTS / TENSORS)
            self.names = self._whole.keys()

    def get(self, key: str) -> Tensor | None:
        if key in self._sizes:
            return self._saved.read(key, 0, self._sizes[key])
        return self._whole.get(key)


def export_weights(arguments: argparse.Namespace) -> int:
    """Verify a checkpoint, then write its weights."""
    folder, out = one_commit(arguments.path), arguments.out
    if problem := find_damage(folder, ALONE):
        raise UserError(f"{folder} is damaged ({problem}): nothing is exported. `bevt checkpoint ls` lists the others.")
    if out.exists():
        raise UserError(f"{out} exists: name a folder that does not.")
    aside = out.with_name(f".{out.name}.partial")
    with writing(out, kept=f"Kept: {folder}."):
        try:
            shutil.copytree(folder / WEIGHTS, aside)
            if arguments.raw:
                _require_pieces(folder)
                with SavedPieces(folder / STATE) as saved:
                    write_tensors(aside / TENSORS, saved.weights(MASTERS), {"format": "pt"})
            require_finite(read_tensors(aside / TENSORS), folder)
            aside.rename(out)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    size = (out / TENSORS).stat().st_size
    print(f"wrote {out}: the weights of {folder}, {in_words(size)}")
    return FINISHED


def _require_pieces(folder: Path) -> None:
    if read_manifest(folder)["schema"] < RESHARDING:
        raise UserError(f"{folder} was written by an earlier version: export it without --raw.")


def commits_of(run: Path) -> list[Path]:
    """The checkpoints of a run's folder, the newest first. UserError: there is none."""
    found = checkpoint_folders(run / CHECKPOINTS) or checkpoint_folders(run)
    if not found:
        raise UserError(f"{run} is no run with checkpoints: name the folder that a run writes.")
    return found


def one_commit(path: Path) -> Path:
    """The checkpoint that a path means; of a run, the newest."""
    return path if _is_commit(path) else commits_of(path)[0]


def _is_commit(path: Path) -> bool:
    return (path / MANIFEST).is_file()
