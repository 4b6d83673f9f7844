"""What `pack` is given -> the files to pack, with keys and labels: folders, globs, lists, and three data sets' own."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from bevt_ds.data.reading.members import is_apple_double
from bevt_ds.errors import UserError
from bevt_ds.shards.file_lists import FILES, QUICKTIME, read_rows
from bevt_ds.shards.file_tree import files_below, files_matching

_SYNSET = re.compile(r"n\d{8}")  # how ImageNet names its folders
APPLE_DOUBLE, NO_ENDING = "macOS's ._NAME", "no ending"


@dataclass(frozen=True)
class Item:
    """A file to be packed."""

    path: Path
    name: str  # its path relative to where the source's files lie
    label: str = ""  # empty: none
    fault: str = ""  # why it cannot be packed, where that is known already

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


@dataclass(frozen=True)
class Listing:
    """What a source names."""

    items: Sequence[Item]
    passed_over: Counter[str] = field(default_factory=Counter)  # ending, such as ".wmv" -> files left out for it


def list_items(source: str, kind: str, root: Path | None = None, class_folders: bool = False) -> Listing:
    """The files of `kind` ("video" or "image") that a source names, in an order that does not depend on the machine.

    source: a folder (searched with its subfolders and links; labels if they are ImageNet's), a glob, or a list as
    file_lists.py reads it. root: where the files of a list are; by default next to it. A file that is listed and not
    there is kept, and so are links that lead nowhere: packing them fails, and that is written down.
    class_folders: a file's label is the name of the source's folder that it lies in.
    UserError: there is nothing to pack, the list cannot be read, or a file lies in no class's folder.
    """
    path, is_folder = Path(source), os.path.isdir(source)  # whereas Path's own raises where a name is too long
    if class_folders and not is_folder:
        raise UserError(f"{source} is no folder of class folders: leave out --class-folders, or name one")
    if is_folder:
        listing = _from_folder(path, kind, class_folders)
    elif os.path.isfile(source) and not _is_media(path.name, kind):
        listing = Listing(_from_list(path, root or path.parent, kind))
    else:
        listing = _from_glob(source, kind)
    if not listing.items:
        others = f"; there are {endings(listing.passed_over)}" if listing.passed_over else ""
        raise UserError(f"no {kind} file in {source} (looked for {', '.join(FILES[kind])}{others})")
    return listing


def endings(passed_over: Counter[str]) -> str:
    """`12 .wmv, 1 .txt`, the commonest first."""
    return ", ".join(f"{count} {ending}" for ending, count in sorted(passed_over.items(), key=lambda e: (-e[1], e[0])))


def _is_media(name: str, kind: str) -> bool:
    """By its name; macOS puts a `._name` next to files on foreign disks, which holds none of their data."""
    return Path(name).suffix[1:].lower() in FILES[kind] and not is_apple_double(name)


def _from_folder(folder: Path, kind: str, class_folders: bool) -> Listing:
    listing = _sorted_out(((path, path.relative_to(folder), fault) for path, fault in files_below(folder)), kind)
    classes = {_class_folder(i) for i in listing.items if not i.fault or _SYNSET.fullmatch(_class_folder(i))}
    labels: dict[str, str] = {}
    if class_folders:
        if loose := [item for item in listing.items if "/" not in item.name and not item.fault]:
            raise UserError(
                f"{loose[0].path} lies in no folder of {folder}: with --class-folders that would be its class"
            )
        if odd := [name for name in sorted(classes) if not _is_utf8(name)]:
            raise UserError(f"the name of the folder {odd[0]!r} in {folder} is not in UTF-8, and a label is: rename it")
        labels = {name: name for name in classes}
    elif classes and all(_SYNSET.fullmatch(name) for name in classes):
        # those without a usable file too: a class has its number however many of the others can be read
        classes |= {entry.name for entry in os.scandir(folder) if entry.is_dir() and _SYNSET.fullmatch(entry.name)}
        labels = {name: str(i) for i, name in enumerate(sorted(classes))}
    items = [replace(item, label=labels.get(_class_folder(item), "")) for item in listing.items]
    return replace(listing, items=items)


def _class_folder(item: Item) -> str:
    """The first part of its name: the source's folder that it lies in, or itself."""
    return item.name.partition("/")[0]


def _from_glob(pattern: str, kind: str) -> Listing:
    found = dict(sorted(files_matching(pattern)))
    listing = _sorted_out(((path, path, fault) for path, fault in found.items()), kind)
    if not listing.items:
        others = f"; it matches {endings(listing.passed_over)}" if listing.passed_over else ""
        raise UserError(f"{pattern} is no folder, no list, and no glob that matches a {kind} file{others}")
    common = Path(os.path.commonpath([item.path.parent for item in listing.items]))
    return replace(listing, items=[replace(i, name=str(i.path.relative_to(common))) for i in listing.items])


def _sorted_out(files: Iterable[tuple[Path, Path, str]], kind: str) -> Listing:
    """(path, name, fault) of some files -> those of a kind, in order, and a count of the others."""
    items, passed_over = [], Counter()
    for path, name, fault in sorted(files):
        if fault or _is_media(path.name, kind):
            items.append(Item(path, str(name), fault=fault))
        else:
            passed_over[APPLE_DOUBLE if is_apple_double(path.name) else path.suffix.lower() or NO_ENDING] += 1
    return Listing(items, passed_over)


def _is_utf8(name: str) -> bool:
    """Python reads other bytes of a file's name as surrogates."""
    return name.encode(errors="ignore").decode() == name


def _from_list(path: Path, root: Path, kind: str) -> list[Item]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is neither a list in UTF-8 nor a {kind} file") from error
    return [_listed(root, name, label, kind) for name, label in read_rows(path, text)]


def _listed(root: Path, name: str, label: str, kind: str) -> Item:
    """A list may leave out extensions; Kinetics has a folder for each class, perhaps with underscores for spaces."""
    is_whole = Path(name).suffix[1:].lower() in FILES[kind]
    names = [name] if is_whole else [f"{name}.{extension}" for extension in FILES[kind]]
    folders = [root, root / label, root / label.replace(" ", "_")] if label else [root]
    found = ((folder / choice, choice) for choice in names for folder in folders if os.path.isfile(folder / choice))
    path, chosen = next(found, (root / name, name))
    return Item(path, chosen, label)
