"""What `pack` is given -> the files to pack, with keys and labels: folders, globs, lists, and three data sets' own."""

from __future__ import annotations

import glob
import os
import re
from dataclasses import dataclass
from pathlib import Path

from bevt_ds.errors import UserError
from bevt_ds.shards.file_lists import FILES, QUICKTIME, read_rows

_SYNSET = re.compile(r"n\d{8}")  # how ImageNet names its folders


@dataclass(frozen=True)
class Item:
    """A file to be packed."""

    path: Path
    name: str  # its path relative to where the source's files lie
    label: str = ""  # empty: none

    @property
    def key(self) -> str:
        """Its name in the shards; webdataset ends a key at the first dot of its last part."""
        *folders, last = (part for part in Path(self.name).parts if part not in ("..", "/"))
        return str(Path(*folders, Path(last).stem.replace(".", "_")))

    @property
    def extension(self) -> str:
        """Of its member in the shards."""
        extension = self.path.suffix[1:].lower()
        return "mp4" if extension in QUICKTIME else extension


def list_items(source: str, kind: str, root: Path | None = None, class_folders: bool = False) -> list[Item]:
    """The files of `kind` ("video" or "image") that a source names, in an order that does not depend on the machine.

    source: a folder (searched with its subfolders; labels if they are ImageNet's), a glob, or a list as file_lists.py
    reads it. root: where the files of a list are; by default next to it. A file that is listed and not there is kept:
    packing it fails, and that is written down.
    class_folders: a file's label is the name of the source's folder that it lies in.
    UserError: there is nothing to pack, the list cannot be read, or a file lies in no class's folder.
    """
    path, is_folder = Path(source), os.path.isdir(source)  # whereas Path's own raises where a name is too long
    if class_folders and not is_folder:
        raise UserError(f"{source} is no folder of class folders: leave out --class-folders, or name one")
    if is_folder:
        items = _from_folder(path, kind, class_folders)
    elif os.path.isfile(source) and not _is_media(path, kind):
        items = _from_list(path, root or path.parent, kind)
    else:
        items = _from_glob(source, kind)
    if not items:
        raise UserError(f"no {kind} file in {source} (looked for {', '.join(FILES[kind])})")
    return items


def _is_media(path: Path, kind: str) -> bool:
    """By its name; macOS puts a `._name` beside files on foreign disks, which holds none of their data."""
    return path.suffix[1:].lower() in FILES[kind] and not path.name.startswith("._")


def _from_folder(folder: Path, kind: str, class_folders: bool) -> list[Item]:
    files = sorted(p for p in folder.rglob("*") if _is_media(p, kind) and p.is_file())
    classes = {p.relative_to(folder).parts[0] for p in files}
    labels: dict[str, str] = {}
    if class_folders:
        if loose := [p for p in files if p.parent == folder]:
            raise UserError(f"{loose[0]} lies in no folder of {folder}: with --class-folders that would be its class")
        if odd := [name for name in sorted(classes) if not _is_utf8(name)]:
            raise UserError(f"the name of the folder {odd[0]!r} in {folder} is not in UTF-8, and a label is: rename it")
        labels = {name: name for name in classes}
    elif classes and all(_SYNSET.fullmatch(name) for name in classes):
        labels = {name: str(i) for i, name in enumerate(sorted(classes))}
    return [Item(p, str(p.relative_to(folder)), labels.get(p.relative_to(folder).parts[0], "")) for p in files]


def _is_utf8(name: str) -> bool:
    """Python reads other bytes of a file's name as surrogates."""
    return name.encode(errors="ignore").decode() == name


def _from_glob(pattern: str, kind: str) -> list[Item]:
    files = [Path(p) for p in sorted(glob.glob(pattern, recursive=True))]
    files = [p for p in files if _is_media(p, kind) and p.is_file()]
    if not files:
        raise UserError(f"{pattern} is no folder, no list, and no glob that matches a {kind} file")
    common = Path(os.path.commonpath([p.parent for p in files]))
    return [Item(p, str(p.relative_to(common))) for p in files]


def _from_list(path: Path, root: Path, kind: str) -> list[Item]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is neither a list in UTF-8 nor a {kind} file") from error
    return [_listed(root, name, label, kind) for name, label in read_rows(path, text)]


def _listed(root: Path, name: str, label: str, kind: str) -> Item:
    """A list may leave out the extension, and Kinetics puts videos into a folder for each class."""
    is_whole = Path(name).suffix[1:].lower() in FILES[kind]
    names = [name] if is_whole else [f"{name}.{extension}" for extension in FILES[kind]]
    folders = [root, root / label] if label else [root]
    found = ((folder / choice, choice) for choice in names for folder in folders if os.path.isfile(folder / choice))
    path, chosen = next(found, (root / name, name))
    return Item(path, chosen, label)
