"""`bevt shards`: make shards, index them, look into them."""

from __future__ import annotations

import argparse
import json
import math
import os
import re
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from bevt_ds.config.parse import apply_overrides, get_value, parse_overrides
from bevt_ds.config.recipes import PRETRAINING, get_recipe
from bevt_ds.config.samples import DataConfig
from bevt_ds.config.schema import Config
from bevt_ds.config.validate import check_fields
from bevt_ds.data.decoding.transcode import CRF, Profile
from bevt_ds.data.reading.deadline import Deadline, DeadlineExecutor
from bevt_ds.data.reading.index import SUFFIX, is_packed, load_shard, write_atomic
from bevt_ds.data.reading.members import EXTENSIONS
from bevt_ds.data.reading.remote import is_remote, redacted
from bevt_ds.data.reading.storage import Storage
from bevt_ds.errors import UserError
from bevt_ds.exit_codes import FOUND_FAULTS
from bevt_ds.shards.check import Report, check, outlook, survey
from bevt_ds.shards.dali_index import write_dali_index
from bevt_ds.shards.pack import READING, SHARD_BYTES, SHARD_SAMPLES, pack
from bevt_ds.shards.sources import endings
from bevt_ds.shards.synthetic.draw import draw, ensure_demo_shards

UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
SHOWN = 20  # findings on the screen; all of them are in the report
LISTS = """\
lists:
  Kinetics' CSV, Something-Something V2's JSON, Diving48 V2's JSON; or a line for each file, its path and its label:
    videos/clip 7.mp4 push left           a tab, comma, semicolon or spaces between; a path ends with its extension
    "clip 7" "push left"                  quotes where a path has no extension, a path a comma, a label commas in a .csv
    # a comment                           a line that begins with '#' and a space
    path,label                            first line, if you like: names of columns, in any order, others too
"""
READING_KEYS = (  # which the messages of these commands name
    "max_pixels",
    "max_frames",
    "max_file_bytes",
    "max_clip_bytes",
    "decode_seconds",
    "read_seconds",
    "remote_seconds",
    "cache_dir",
    "cache_bytes",
    "allow_pipe",
)
_READING = re.compile(r"data\.\w+=")
LEAST_FPS, MOST_FPS = 0.01, 1000.0
CLIPS_A_GPU = 100.0  # a second: what a Swin-B on one H200 takes at about 30 % of its peak


def main(argv: Sequence[str]) -> int:
    """Run one verb; returns the exit code."""
    # argparse takes no positional words behind options, and these may stand anywhere
    reading = [word for word in argv if _READING.match(word)]
    arguments = _parser().parse_args([word for word in argv if word not in reading])
    if reading and "reading" not in arguments:
        raise UserError(f"{reading[0]}: this command reads no shards and no files: leave it out")
    if reading:
        arguments.reading += reading
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
    verb.add_argument("--clips", type=_whole(0), default=320, help="default: %(default)s")
    verb.add_argument("--images", type=_whole(0), default=1024, help="default: %(default)s")
    verb.add_argument("--seed", type=_whole(0), default=0, help="default: %(default)s")
    verb.set_defaults(run=_draw)


def _add_demo(verbs) -> None:
    verb = verbs.add_parser("demo", help="draw and pack the demo recipe's shards, unless they are there")
    verb.add_argument("folder", type=Path, help="where they are kept")
    verb.set_defaults(run=lambda arguments: ensure_demo_shards(arguments.folder))


def _add_pack(verbs) -> None:
    verb = verbs.add_parser(
        "pack",
        help="pack media into WebDataset tars",
        description="A packing that was interrupted goes on when the same command is given again.",
        epilog=LISTS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verb.add_argument(
        "source",
        help="folder (labels if its folders are ImageNet's), glob, or list: see below",
    )
    verb.add_argument("out", type=Path, help="folder for the tars")
    verb.add_argument("--root", type=Path, help="where the files of a list are; default: next to it")
    verb.add_argument(
        "--class-folders", action="store_true", help="each folder in SOURCE is a class; its name, the label"
    )
    verb.add_argument("--kind", choices=sorted(EXTENSIONS), default="video", help="default: %(default)s")
    verb.add_argument(
        "--split", type=_name, default="train", help="tars are named SPLIT-000000.tar and so on; default: %(default)s"
    )
    verb.add_argument("--strict", action="store_true", help="exit code 1 if a file was rejected")
    verb.add_argument("--shard-size", type=_bytes, default=SHARD_BYTES, help="at most, such as 500M; default: 1G")
    verb.add_argument("--shard-samples", type=_whole(1), default=SHARD_SAMPLES, help="at most; default: %(default)s")
    _add_jobs(verb)
    _add_profile(verb)
    verb.set_defaults(run=_pack)


def _add_profile(verb: argparse.ArgumentParser) -> None:
    profile = Profile()
    verb.add_argument(
        "--profile",
        choices=("copy", "train"),
        default="copy",
        help="copy: bytes as they are; train: H.264 or HEVC that decodes cheaply, without sound",
    )
    group = verb.add_argument_group("with --profile train")
    group.add_argument(
        "--short-side", type=_whole(2), default=profile.short_side, help="pixels, at most; default: %(default)s"
    )
    group.add_argument(
        "--keyframe-every", type=_whole(1), default=profile.keyframe_every, help="frames; default: %(default)s"
    )
    group.add_argument(
        "--codec",
        choices=sorted(CRF),
        default=profile.codec,
        help="hevc: smaller files, dearer on a CPU, for GPUs that decode; default: %(default)s",
    )
    group.add_argument(
        "--crf",
        type=_whole(0, 51),
        help="x264's or x265's quality, lower is better and larger; default: "
        + ", ".join(f"{crf} for {codec}" for codec, crf in CRF.items()),
    )
    group.add_argument(
        "--fps",
        type=_rate,
        default=profile.fps,
        help="frames a second, so that a recipe's stride becomes 1 or 2: 30 fps at stride 8 is 3.75 fps at stride 1;"
        " default: the source's",
    )


def _add_jobs(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--jobs", type=_whole(1), help="processes; default: one a core")
    _add_reading(verb)


def _add_reading(verb: argparse.ArgumentParser) -> None:
    keys = ", ".join(f"{key}={getattr(READING, key)}" for key in READING_KEYS if getattr(READING, key) != "")
    verb.add_argument(
        "reading",
        nargs="*",
        metavar="data.KEY=VALUE",
        help=f"limits and times, under their names in a run, which needs the same: {keys}",
    )


def _add_index(verbs) -> None:
    verb = verbs.add_parser("index", help="index tars, which a run otherwise does at its start")
    verb.add_argument("shards", help="path, glob, {000..099} range, or several with commas")
    verb.add_argument("--fresh", action="store_true", help="read the tars even where there is an index")
    verb.add_argument(
        "--dedupe", choices=("refuse", "first"), default="refuse", help="when a tar holds two of a kind under a key"
    )
    verb.add_argument("--dali", action="store_true", help="write DALI's .idx files too")
    _add_reading(verb)
    verb.set_defaults(run=_index)


def _add_check(verbs) -> None:
    verb = verbs.add_parser("check", help="hash and decode every sample; exit code 1 if any is bad")
    verb.add_argument("shards", help="path, URL, glob, {000..099} range, or several with commas")
    verb.add_argument("--report", type=_new_file, help="write all findings there, a JSON line each")
    _add_jobs(verb)
    verb.set_defaults(run=_check)


def _add_stats(verbs) -> None:
    verb = verbs.add_parser("stats", help="what is in the shards, and whether this machine can feed a recipe from them")
    verb.add_argument("shards", help="path, URL, glob, {000..099} range, or several with commas")
    verb.add_argument("--recipe", choices=sorted(PRETRAINING), default="joint_swin_b", help="default: %(default)s")
    verb.add_argument("--stride", type=_whole(1), help="default: the recipe's; smaller for shards packed with --fps")
    verb.add_argument(
        "--clips-per-second",
        type=_positive,
        default=CLIPS_A_GPU,
        help="what the GPUs of this machine take; default: %(default)g, an estimate for one H200",
    )
    verb.add_argument(
        "--out",
        "--plot",
        type=_new_file,
        help="image of the plots; default: stats.png, next to shards of `pack` or else here",
    )
    _add_jobs(verb)
    verb.set_defaults(run=_stats)


def _draw(arguments: argparse.Namespace) -> None:
    draw(arguments.folder, arguments.clips, arguments.images, arguments.seed)
    print(f"{arguments.folder}: {arguments.clips} clips and {arguments.images} images")


def _pack(arguments: argparse.Namespace) -> int:
    crf = CRF[arguments.codec] if arguments.crf is None else arguments.crf
    profile = Profile(arguments.short_side, arguments.keyframe_every, crf, arguments.fps, arguments.codec)
    if arguments.profile == "copy":
        if profile != Profile():
            raise UserError("--short-side, --keyframe-every, --codec, --crf and --fps need --profile train")
        profile = None
    try:
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
            class_folders=arguments.class_folders,
            reading=_reading(arguments),
        )
    except KeyboardInterrupt as interrupt:
        raise KeyboardInterrupt("the same command goes on where this one was") from interrupt
    done = "nothing to do: " if packed.repeated else ""
    print(f"{done}{arguments.out}: {packed.samples} samples in {len(packed.shards)} shards")
    if packed.passed_over:
        print(f"passed over for their ending: {endings(packed.passed_over)}")
    if packed.rejected:
        print(f"{packed.rejected} files rejected: {arguments.out}/{arguments.split}-rejected.jsonl says why")
    return FOUND_FAULTS if packed.rejected and arguments.strict else 0


def _index(arguments: argparse.Namespace) -> None:
    reading = _reading(arguments)
    paths = _paths(arguments.shards, reading)
    if remote := [path for path in paths if is_remote(path)]:
        raise UserError(f"{remote[0]} is remote: it is indexed by the run that reads it")
    deadline = Deadline(reading.read_seconds)
    with closing(DeadlineExecutor(1)) as executor:
        for path in paths:
            facts = executor.call(_index_one, path, arguments, place=f"shard {path}", deadline=deadline)
            print(f"{path}: {facts}")


def _index_one(path: str, arguments: argparse.Namespace) -> str:
    """What there is to say of it."""
    keep_first = arguments.dedupe == "first"
    fresh = arguments.fresh or keep_first or not os.path.exists(path + SUFFIX)  # a run may have kept one in the cache
    shard = load_shard(path, fresh=fresh, keep_first=keep_first)
    counts = ", ".join(f"{len(shard.only(kind))} {kind}s" for kind in sorted(EXTENSIONS))
    ignored = f", {note}" if (note := shard.ignored_note()) else ""
    dropped = f", {shard.dropped} dropped because their key came before" if shard.dropped else ""
    dali = f", {write_dali_index(path).name}" if arguments.dali else ""
    return counts + ignored + dropped + dali


def _reading(arguments: argparse.Namespace) -> DataConfig:
    """What a file may be, and how long a read may take."""
    values = parse_overrides(arguments.reading)
    if unknown := [key for key in values if key.removeprefix("data.") not in READING_KEYS]:
        raise UserError(f"{unknown[0]} is none of {', '.join(f'data.{key}' for key in READING_KEYS)}")
    reading = apply_overrides(Config(data=READING), values).data
    check_fields(reading, "data.")
    return reading


def _paths(patterns: str, reading: DataConfig) -> list[str]:
    """The shards that they name. StorageStalled: a disk or file server does not answer."""
    with closing(Storage(reading)) as storage:
        return storage.paths(patterns)


def _check(arguments: argparse.Namespace) -> int:
    reading = _reading(arguments)
    with closing(Storage(reading)) as storage:
        paths, all_there_are = storage.paths(arguments.shards), storage.has_wildcard(arguments.shards)
    report = check(paths, arguments.jobs, progress=True, whole=all_there_are, reading=reading)
    _print_findings(report)
    for note in outlook(report.facts):
        print(f"note: {note}")
    if arguments.report:
        lines = "".join(json.dumps(finding) + "\n" for finding in report.findings)
        write_atomic(arguments.report, lines.encode())
    print(f"{report.samples} samples, {len(report.findings)} faults")
    return FOUND_FAULTS if report.findings else 0


def _print_findings(report: Report) -> None:
    """The faults, and the members that are no samples though they look like some."""
    for shard in report.shards:
        if note := shard.ignored_note():
            print(f"note: {redacted(shard.path)}: {note}")
    for finding in report.findings[:SHOWN]:
        print(f"bad: {finding['key']!r} in {finding['shard']}: {finding['reason']}")
    if len(report.findings) > SHOWN:
        print(f"... and {len(report.findings) - SHOWN} more")


def _stats(arguments: argparse.Namespace) -> int:
    from bevt_ds.shards.stats import measure, plot, table, verdict  # matplotlib is slow to import

    reading = _reading(arguments)
    report = survey(_paths(arguments.shards, reading), arguments.jobs, progress=True, reading=reading)
    _print_findings(report)
    print(f"{len(report.facts)} samples in {len(report.shards)} shards, {len(report.findings)} unreadable")
    if not report.facts:
        return FOUND_FAULTS
    print(table(report.facts))
    image = arguments.out or _next_to(report.shards[0].path)
    plot(report.facts, image)
    print(f"plots: {image}")
    if any("codec" in facts for facts in report.facts):
        recipe = get_recipe(arguments.recipe).data
        given = {
            key.removeprefix("data."): get_value(Config(data=reading), key)
            for key in parse_overrides(arguments.reading)
        }
        data = replace(recipe, stride=arguments.stride or recipe.stride, **given)
        print(verdict(measure(report.shards, data), arguments.recipe, data, arguments.clips_per_second))
    return 0


def _next_to(shard: str) -> Path:
    """Where the plots go: next to shards that `pack` has put there, if that can be, else into the working folder."""
    folder = Path(shard).parent
    return (folder if is_packed(shard) and os.access(folder, os.W_OK) else Path()) / "stats.png"


def _whole(least: int, most: int | None = None) -> Callable[[str], int]:
    """A reader of whole numbers from `least` to `most`, or below 2**63."""

    def read(text: str) -> int:
        digits = text.lstrip("-").isdecimal() and len(text) < 20  # no more are 64 bits
        if not digits or not least <= int(text) <= ((1 << 63) - 1 if most is None else most):
            bounds = f"from {least} on, below 2**63" if most is None else f"from {least} to {most}"
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number {bounds}")
        return int(text)

    return read


def _positive(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return number


def _rate(text: str) -> float:
    """Frames a second that a video may have."""
    rate = _positive(text)
    if not LEAST_FPS <= rate <= MOST_FPS:
        raise argparse.ArgumentTypeError(f"{text!r} is not a rate from {LEAST_FPS:g} to {MOST_FPS:g} frames a second")
    return rate


def _name(text: str) -> str:
    """A part of a file's name."""
    if not re.fullmatch(r"\w[\w.-]*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a name of letters, digits, '_', '.' and '-'")
    return text


def _new_file(text: str) -> Path:
    """Told before the long work, not after it."""
    path = Path(text)
    if not path.parent.is_dir() or path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is not a file in a folder that exists")
    return path


def _bytes(text: str) -> int:
    """`500M` -> 524288000; a bare number is bytes."""
    number, unit = (text[:-1], text[-1].upper()) if text[-1:].upper() in UNITS else (text, "")
    if not number.isdigit() or int(number) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 500M or 1G")
    return int(number) * UNITS.get(unit, 1)
