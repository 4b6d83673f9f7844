"""`bevt shards`: make shards and index them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from bevt_ds.data.draw import draw, ensure_demo_shards
from bevt_ds.data.index import EXTENSIONS, load_shard
from bevt_ds.data.pack import SHARD_BYTES, SHARD_SAMPLES, pack
from bevt_ds.data.shards import expand

UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def main(argv: Sequence[str]) -> int:
    """Run one verb; returns the exit code."""
    arguments = _parser().parse_args(argv)
    arguments.run(arguments)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bevt shards", description=__doc__)
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    _add_draw(verbs)
    _add_demo(verbs)
    _add_pack(verbs)
    _add_index(verbs)
    return parser


def _add_draw(verbs) -> None:
    verb = verbs.add_parser("draw", help="draw MP4 clips and JPEG images of moving textured shapes")
    verb.add_argument("folder", type=Path, help="new folder for the files")
    verb.add_argument("--clips", type=int, default=320)
    verb.add_argument("--images", type=int, default=1024)
    verb.add_argument("--seed", type=int, default=0)
    verb.set_defaults(run=_draw)


def _add_demo(verbs) -> None:
    verb = verbs.add_parser("demo", help="draw and pack the demo recipe's shards, unless they are there")
    verb.add_argument("folder", type=Path)
    verb.set_defaults(run=lambda arguments: ensure_demo_shards(arguments.folder))


def _add_pack(verbs) -> None:
    verb = verbs.add_parser("pack", help="pack a folder of media into WebDataset tars")
    verb.add_argument("source", type=Path, help="folder, searched with its subfolders")
    verb.add_argument("out", type=Path, help="folder for the tars")
    verb.add_argument("--kind", choices=sorted(EXTENSIONS), default="video")
    verb.add_argument("--split", default="train", help="tars are named SPLIT-000000.tar and so on")
    verb.add_argument("--shard-size", type=_bytes, default=SHARD_BYTES, help="bytes, such as 500M or 1G")
    verb.add_argument("--shard-samples", type=int, default=SHARD_SAMPLES)
    verb.set_defaults(run=_pack)


def _add_index(verbs) -> None:
    verb = verbs.add_parser("index", help="index tars, which a run otherwise does at its start")
    verb.add_argument("shards", help="path, glob, {000..099} range, or several with commas")
    verb.set_defaults(run=_index)


def _draw(arguments: argparse.Namespace) -> None:
    draw(arguments.folder, arguments.clips, arguments.images, arguments.seed)
    print(f"{arguments.folder}: {arguments.clips} clips and {arguments.images} images")


def _pack(arguments: argparse.Namespace) -> None:
    packed = pack(
        arguments.source,
        arguments.out,
        arguments.kind,
        arguments.split,
        arguments.shard_size,
        arguments.shard_samples,
        progress=True,
    )
    rejected = f", {packed.rejected} rejected (see {arguments.split}-rejected.jsonl)" if packed.rejected else ""
    print(f"{arguments.out}: {packed.samples} samples in {len(packed.shards)} shards{rejected}")


def _index(arguments: argparse.Namespace) -> None:
    for path in expand(arguments.shards):
        shard = load_shard(path)
        counts = ", ".join(f"{len(shard.only(kind))} {kind}s" for kind in sorted(EXTENSIONS))
        print(f"{path}: {counts}")


def _bytes(text: str) -> int:
    """`500M` -> 524288000; a bare number is bytes."""
    number, unit = (text[:-1], text[-1].upper()) if text[-1:].upper() in UNITS else (text, "")
    if not number.isdigit() or int(number) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 500M or 1G")
    return int(number) * UNITS.get(unit, 1)
