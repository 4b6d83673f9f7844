"""`bevt shards`: make shards, index them, look into them."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from bevt_ds.data.check import check, outlook, survey
from bevt_ds.data.dali_index import write_dali_index
from bevt_ds.data.draw import draw, ensure_demo_shards
from bevt_ds.data.index import load_shard, write_atomic
from bevt_ds.data.members import EXTENSIONS
from bevt_ds.data.pack import SHARD_BYTES, SHARD_SAMPLES, pack
from bevt_ds.data.remote import is_remote
from bevt_ds.data.shards import expand
from bevt_ds.data.transcode import Profile
from bevt_ds.errors import UserError
from bevt_ds.recipes import RECIPES, get_recipe

UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
FOUND_FAULTS = 1  # exit code of `check`
SHOWN = 20  # findings on the screen; all of them are in the report
CLIPS_A_GPU = 100.0  # a second: what a Swin-B on one H200 takes at about 30 % of its peak


def main(argv: Sequence[str]) -> int:
    """Run one verb; returns the exit code."""
    arguments = _parser().parse_args(argv)
    return arguments.run(arguments) or 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bevt shards", description=__doc__)
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    for add in (_add_draw, _add_demo, _add_pack, _add_index, _add_check, _add_stats):
        add(verbs)
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
    verb = verbs.add_parser(
        "pack",
        help="pack media into WebDataset tars",
        description="A packing that was interrupted goes on when the same command is given again.",
    )
    verb.add_argument(
        "source",
        help="folder (labels if its folders are ImageNet's), glob, or list: lines `path label`, Kinetics' CSV,"
        " Something-Something V2's or Diving48 V2's JSON",
    )
    verb.add_argument("out", type=Path, help="folder for the tars")
    verb.add_argument("--root", type=Path, help="where the files of a list are; default: beside it")
    verb.add_argument("--kind", choices=sorted(EXTENSIONS), default="video")
    verb.add_argument("--split", default="train", help="tars are named SPLIT-000000.tar and so on")
    verb.add_argument("--shard-size", type=_bytes, default=SHARD_BYTES, help="bytes, such as 500M or 1G")
    verb.add_argument("--shard-samples", type=int, default=SHARD_SAMPLES)
    verb.add_argument("--jobs", type=int, help="processes; default: one a core")
    _add_profile(verb)
    verb.set_defaults(run=_pack)


def _add_profile(verb: argparse.ArgumentParser) -> None:
    profile = Profile()
    verb.add_argument(
        "--profile",
        choices=("copy", "train"),
        default="copy",
        help="copy: bytes as they are; train: H.264 that decodes cheaply, without sound",
    )
    group = verb.add_argument_group("of the profile train")
    group.add_argument("--short-side", type=int, default=profile.short_side, help="pixels, at most")
    group.add_argument("--keyframe-every", type=int, default=profile.keyframe_every, help="frames")
    group.add_argument("--crf", type=int, default=profile.crf, help="x264's quality; lower is better and larger")
    group.add_argument(
        "--fps",
        type=float,
        default=profile.fps,
        help="frames a second, so that a recipe's stride becomes 1 or 2: 30 fps at stride 8 is 3.75 fps at stride 1",
    )


def _add_index(verbs) -> None:
    verb = verbs.add_parser("index", help="index tars, which a run otherwise does at its start")
    verb.add_argument("shards", help="path, glob, {000..099} range, or several with commas")
    verb.add_argument("--fresh", action="store_true", help="read the tars even where there is an index")
    verb.add_argument("--dedupe", choices=("refuse", "first"), default="refuse", help="when a tar holds a key twice")
    verb.add_argument("--dali", action="store_true", help="write DALI's .idx files too")
    verb.set_defaults(run=_index)


def _add_check(verbs) -> None:
    verb = verbs.add_parser("check", help="hash and decode every sample; exit code 1 if any is bad")
    verb.add_argument("shards", help="path, URL, glob, {000..099} range, or several with commas")
    verb.add_argument("--report", type=Path, help="write all findings there, a JSON line each")
    verb.add_argument("--jobs", type=int, help="processes; default: one a core")
    verb.set_defaults(run=_check)


def _add_stats(verbs) -> None:
    verb = verbs.add_parser("stats", help="what is in the shards, and whether this machine can feed a recipe from them")
    verb.add_argument("shards", help="path, URL, glob, {000..099} range, or several with commas")
    verb.add_argument("--recipe", choices=sorted(RECIPES), default="joint_swin_b")
    verb.add_argument("--stride", type=int, help="default: the recipe's; smaller for shards packed with --fps")
    verb.add_argument("--clips-per-second", type=float, default=CLIPS_A_GPU, help="what the GPUs of this machine take")
    verb.add_argument("--plot", type=Path, default=Path("stats.png"))
    verb.add_argument("--jobs", type=int, help="processes; default: one a core")
    verb.set_defaults(run=_stats)


def _draw(arguments: argparse.Namespace) -> None:
    draw(arguments.folder, arguments.clips, arguments.images, arguments.seed)
    print(f"{arguments.folder}: {arguments.clips} clips and {arguments.images} images")


def _pack(arguments: argparse.Namespace) -> None:
    profile = None
    if arguments.profile == "train":
        profile = Profile(arguments.short_side, arguments.keyframe_every, arguments.crf, arguments.fps)
    packed = pack(
        arguments.source,
        arguments.out,
        arguments.kind,
        arguments.split,
        arguments.shard_size,
        arguments.shard_samples,
        progress=True,
        profile=profile,
        root=arguments.root,
        jobs=arguments.jobs,
    )
    rejected = f", {packed.rejected} rejected (see {arguments.split}-rejected.jsonl)" if packed.rejected else ""
    print(f"{arguments.out}: {packed.samples} samples in {len(packed.shards)} shards{rejected}")


def _index(arguments: argparse.Namespace) -> None:
    paths = expand(arguments.shards)
    if remote := [path for path in paths if is_remote(path)]:
        raise UserError(f"{remote[0]} is remote: it is indexed by the run that reads it")
    for path in paths:
        keep_first = arguments.dedupe == "first"
        shard = load_shard(path, fresh=arguments.fresh or keep_first, keep_first=keep_first)
        counts = ", ".join(f"{len(shard.only(kind))} {kind}s" for kind in sorted(EXTENSIONS))
        ignored = f", {shard.ignored} members that are no regular files passed over" if shard.ignored else ""
        dali = f", {write_dali_index(path).name}" if arguments.dali else ""
        print(f"{path}: {counts}{ignored}{dali}")


def _check(arguments: argparse.Namespace) -> int:
    report = check(expand(arguments.shards), arguments.jobs, progress=True)
    for finding in report.findings[:SHOWN]:
        print(f"bad: {finding['key']!r} in {finding['shard']}: {finding['reason']}")
    if len(report.findings) > SHOWN:
        print(f"... and {len(report.findings) - SHOWN} more")
    for note in outlook(report.facts):
        print(f"note: {note}")
    if arguments.report:
        lines = "".join(json.dumps(finding) + "\n" for finding in report.findings)
        write_atomic(arguments.report, lines.encode())
    print(f"{report.samples} samples, {len(report.findings)} faults")
    return FOUND_FAULTS if report.findings else 0


def _stats(arguments: argparse.Namespace) -> None:
    from bevt_ds.data.stats import measure, plot, table, verdict  # matplotlib is slow to import

    paths = expand(arguments.shards)
    report = survey(paths, arguments.jobs, progress=True)
    print(
        f"{len(report.facts)} samples in {len(paths)} shards, {len(report.findings)} unreadable\n{table(report.facts)}"
    )
    plot(report.facts, arguments.plot)
    print(f"plots: {arguments.plot}")
    if any("codec" in facts for facts in report.facts):
        recipe = get_recipe(arguments.recipe).data
        data = replace(recipe, stride=arguments.stride or recipe.stride)
        print(verdict(measure(paths, data), arguments.recipe, data, arguments.clips_per_second))


def _bytes(text: str) -> int:
    """`500M` -> 524288000; a bare number is bytes."""
    number, unit = (text[:-1], text[-1].upper()) if text[-1:].upper() in UNITS else (text, "")
    if not number.isdigit() or int(number) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 500M or 1G")
    return int(number) * UNITS.get(unit, 1)
