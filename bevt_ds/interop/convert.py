"""`bevt convert SRC DST`: weights of others to ours, and ours to others, compared with the libraries' own models."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from timm.models import is_model, load_checkpoint
from torch import nn

import bevt_ds
from bevt_ds.errors import UserError
from bevt_ds.interop.hub_folder import save_hugging_face
from bevt_ds.interop.references import REFERENCES, Outputs, difference, ours, outputs_of, probe
from bevt_ds.interop.writers import (
    OURS,
    TARGETS,
    Written,
    config_of,
    require_new,
    save_folder,
    save_state_dict,
)
from bevt_ds.model.arch import SwinArch
from bevt_ds.model.containers import State, contained, read_file
from bevt_ds.model.convert import Weights, from_state, listed
from bevt_ds.model.layouts import BY_NAME, TIMM, VIDEO
from bevt_ds.model.presets import SIZES, TIMM_SWINS
from bevt_ds.model.tensor_file import require_finite
from bevt_ds.model.timm_model import TimmVideoSwin
from bevt_ds.model.weights import ENCODER, HEAD_SIZES, TENSORS, read_weights, stripped

Facts = dict[str, Any]
LARGEST = 1e-5  # difference of features that is still the same model; in float64 it is about 1e-13
UNCHECKED = "no: --no-check"
USAGE = """\
examples:
  bevt convert swin3d_b.pth runs/k400                  torchvision's file as a folder of ours
  bevt convert runs/ssv2 ssv2.pth --to torchvision     for torchvision.models.video.swin3d_b(num_classes=174)
  bevt convert runs/joint hub/bevt-base --to hf        a folder for AutoModel.from_pretrained
"""


def main(argv: Sequence[str]) -> int:
    """The `convert` command; returns the exit code."""
    parser = argparse.ArgumentParser(
        "bevt convert",
        description="Read weights of any layout of docs/interop.md, write them for a library, and compare both models.",
        epilog=USAGE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="SRC", help="a run, a folder of weights, a DeepSpeed folder, or a file")
    parser.add_argument("target", metavar="DST", type=Path, help="a new folder (bevt, hf) or file (.pth, .safetensors)")
    parser.add_argument("--to", choices=TARGETS, default="bevt", help="whose names and files (default: bevt)")
    parser.add_argument("--no-check", action="store_true", help="do not run the models; the result says so")
    options = parser.parse_args(argv)
    for line in convert(options.source, options.target, options.to, check=not options.no_check):
        print(line, flush=True)
    return 0


def convert(source: str | Path, target: Path, to: str, check: bool = True) -> list[str]:
    """Write `source` to `target`; returns the report's lines.

    Raises:
        UserError: the source cannot be read or lacks a tensor, `target` exists, or two models that should be the same
            differ: then nothing is written.
    """
    require_new(target)
    weights = read_weights(Path(source))
    require_whole(weights)
    require_finite(weights.state, Path(source))
    written = TARGETS[to](weights)
    lines = [f"{weights.source}: {weights.layout}, {len(weights.state)} tensors", *weights.notes]
    lines += by_reason("not read", weights.unused) + by_reason("not written", written.left_out)
    facts: Facts = {"by": f"bevt_ds {bevt_ds.__version__}", "from": weights.layout, "checked": UNCHECKED}
    if check:
        compared, largest = compare(weights, written)
        lines.append(f"largest difference of features: {largest:.1e} (float64), of {' and '.join(compared)}")
        lines += ["no library that is installed here has a model to compare with"] if len(compared) == 1 else []
        facts |= {"checked": compared, "largest_difference": largest}
    aside = target.with_name(f".{target.stem}.partial{target.suffix}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _save(aside, to, weights, written, facts, str(source), target.name)
        require_read_back(aside, written)
        if check and (loaded := as_loaded(to, aside, weights)) is not None:
            both = {"this project's": ours(weights, probe(weights)), f"the written {to}": loaded}
            lines.append(f"the same of what was written, loaded again: {require_same(weights, both):.1e}")
        aside.rename(target)
    except OSError as error:
        raise UserError(f"cannot write {target} ({error}): choose another DST.") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True) if aside.is_dir() else aside.unlink(missing_ok=True)
    return [*lines, f"wrote {target}", *hints(to, target, weights)]


def require_whole(weights: Weights) -> None:
    """Hold names and shapes against models of this project's, with or without a comparison.

    Raises:
        UserError: the encoder, or another part that the weights have, lacks a tensor, has one that no model has, or has
            one of another shape: by name.
    """
    arch, heads = SwinArch.of(weights.arch).arguments(), weights.arch.keys() & HEAD_SIZES.keys()
    with torch.device("meta"):  # names and shapes alone
        pretraining = bevt_ds.BEVT(**{key: weights.arch[key] for key in heads}, **arch)
        classifier = bevt_ds.VideoClassifier(weights.arch.get("num_classes", 1), **arch)
    own, state = {**pretraining.state_dict(), **classifier.state_dict()}, weights.state
    parts = {ENCODER, *(f"{name.split('.')[0]}." for name in state)}
    other = [name for name in state if name in own and state[name].shape != own[name].shape]
    shapes = [f"{tuple(state[name].shape)} of {name}, not {tuple(own[name].shape)}" for name in other]
    for problem, names in (
        ("is not whole: it lacks", [n for n in own if n.startswith(tuple(parts)) and n not in state]),
        ("has tensors that no BEVT model has:", [n for n in state if n not in own]),
        ("is of another architecture: it has the shapes", shapes),
    ):
        if names:
            raise UserError(f"{weights.source} {problem} {listed(names)}: nothing was written.")


def by_reason(what: str, names: dict[str, str]) -> list[str]:
    """A line for each reason, with every name."""
    reasons = dict.fromkeys(names.values())
    return [f"{what}, {why}: {', '.join(name for name in names if names[name] == why)}" for why in reasons]


def compare(weights: Weights, written: Written) -> tuple[list[str], float]:
    """Run the source's, our and the target's model on one input: their names, and the largest difference.

    Raises:
        UserError: they differ.
    """
    pixels = probe(weights)
    outputs = {"this project's": ours(weights, pixels)}
    for name, layout, state in (*_of_source(weights), *_of_target(weights, written)):
        found = outputs_of(layout, state, weights.arch, pixels)
        outputs |= {name: found} if found is not None else {}
    return list(outputs), require_same(weights, outputs)


def require_same(weights: Weights, outputs: dict[str, Outputs]) -> float:
    """The largest difference from the first one's outputs. Raises UserError where it is more than rounding."""
    first = next(iter(outputs.values()))
    differences = {name: difference(first, other) for name, other in outputs.items()}
    worst = max(differences, key=differences.__getitem__)
    if not differences[worst] <= LARGEST:
        raise UserError(
            f"{weights.source}: features of {worst} model differ by {differences[worst]:.1e} from this project's, more"
            f" than {LARGEST:.0e}: nothing was written. --no-check writes it all the same, and says so in the file."
        )
    return differences[worst]


@torch.no_grad()
def as_loaded(to: str, path: Path, weights: Weights) -> Outputs | None:
    """Outputs of this project's class for the target, loaded from the disk as a user does; None: it has none."""
    pixels, classes = probe(weights), weights.arch.get("num_classes", 0)
    if to == "bevt":
        return ours(read_weights(path), pixels)
    if to == "timm" and not weights.still:
        model = TimmVideoSwin(classes, **SwinArch.of(weights.arch).arguments())
        load_checkpoint(model, str(path))
        return _outputs(model.double().eval().forward_features(pixels), model.head if classes else None)
    if to == "hf" and not weights.still and find_spec("transformers"):
        from bevt_ds.interop.hugging_face import load_folder

        model = load_folder(path).double().eval()
        return _outputs(model.features(pixels.transpose(1, 2)), model.head if classes else None)
    return None


def _outputs(features: torch.Tensor, head: nn.Module | None) -> Outputs:
    """Of features (B,C,T',H',W')."""
    return Outputs(features.movedim(1, -1), None if head is None else head(features.mean((2, 3, 4))))


def _of_source(weights: Weights) -> list[tuple[str, str, State]]:
    """The library's model that has the source's tensors; of layouts without one, that with the same architecture."""
    if not weights.original:
        return []
    if weights.layout in REFERENCES:
        return [(f"{weights.layout}, the source's", weights.layout, weights.original)]
    official = BY_NAME[weights.layout].read(weights.original)
    layout = TIMM if official["patch_embed.proj.weight"].ndim == 4 else VIDEO
    return [(f"{layout} with the source's tensors", layout, BY_NAME[layout].write(official))]


def _of_target(weights: Weights, written: Written) -> list[tuple[str, str, State]]:
    """The library's model with the target's tensors, where the target is not ours."""
    if written.layout == OURS:
        return []
    if written.layout in REFERENCES:
        return [(f"{written.layout}, the target's", written.layout, written.state)]
    read = from_state(stripped(written.state), weights.arch["window"][1:])
    return [(f"{VIDEO} with the target's tensors", VIDEO, TARGETS["torchvision"](read).state)]


def _save(path: Path, to: str, weights: Weights, written: Written, facts: Facts, source: str, name: str) -> None:
    if to == "bevt":
        save_folder(path, written.state, config_of(weights, written), facts)
    elif to == "hf":
        save_hugging_face(path, name, weights, written, facts, source)
    else:
        save_state_dict(path, written.state, facts, "state_dict" if to == "official" else "")


def require_read_back(path: Path, written: Written) -> None:
    """What lies on the disk is what was meant. Raises UserError where a tensor changed."""
    _, state = contained(read_file(path / TENSORS if path.is_dir() else path))
    changed = [name for name, value in written.state.items() if name not in state or not state[name].equal(value)]
    if changed or len(state) != len(written.state):
        raise UserError(f"{path} does not hold what was written: {listed(changed)}")


def hints(to: str, target: Path, weights: Weights) -> list[str]:
    """How the result is loaded."""
    arch, classes, path = SwinArch.of(weights.arch), weights.arch.get("num_classes", 0), repr(str(target))
    fits = [n for n in TIMM_SWINS if (SIZES[n].depths, SIZES[n].embed_dim) == (arch.depths, arch.embed_dim)]
    size = fits[0] if fits else "swin_b"
    match to:
        case "bevt":
            call = f"bevt_ds.{'VideoClassifier' if classes else 'VideoSwin'}.from_pretrained({path})"
        case "hf":
            auto = "AutoModelForVideoClassification" if classes and not weights.still else "AutoModel"
            call = f"transformers.{auto}.from_pretrained({path})" + ("" if weights.still else ", after import bevt_ds")
        case "official":
            call = f"mmcv.runner.load_checkpoint(model, {path})"
        case "torchvision":
            call = f"{_swin3d_call(arch, size, classes)}.load_state_dict(torch.load({path})"
            call += ")" if classes else ", strict=False)"
        case _:
            name, sizes = _timm_call(arch, size, weights.still)
            given = {"num_classes": 0 if weights.still else classes} | sizes
            words = "".join(f", {key}={value!r}" for key, value in given.items())
            call = f"timm.create_model({name!r}{words}, checkpoint_path={path})"
    return [f"load it: {call}"]


def _swin3d_call(arch: SwinArch, size: str, classes: int) -> str:
    """torchvision's constructor of a model of this architecture."""
    given = f"num_classes={classes}" if classes else ""
    if size != "swin_l" and not _other_sizes(arch, SIZES[size]):
        return f"torchvision.models.video.swin3d_{size[-1]}({given})"
    sizes = (arch.patch, arch.embed_dim, arch.depths, arch.num_heads, arch.window, arch.mlp_ratio)
    words = ", ".join(str(list(value) if isinstance(value, tuple) else value) for value in sizes)
    return f"torchvision.models.video.SwinTransformer3d({words}{', ' * bool(given)}{given})"


def _timm_call(arch: SwinArch, size: str, still: bool) -> tuple[str, Facts]:
    """timm's name of a model, and what differs from it."""
    if not still:
        return f"bevt_{TIMM_SWINS[size]}", _other_sizes(arch, SIZES[size])
    name = f"{TIMM_SWINS[size]}_patch{arch.patch[1]}_window{arch.window[1]}_{32 * arch.window[1]}"
    base = replace(SIZES[size], window=arch.window)
    if is_model(name) and not _other_sizes(arch, base):
        return name, {}
    side = arch.window[1] if arch.window[1] == arch.window[2] else arch.window[1:]
    sizes = {"patch_size": arch.patch[1], "window_size": side, "embed_dim": arch.embed_dim}
    sizes |= {"depths": arch.depths, "num_heads": arch.num_heads, "mlp_ratio": arch.mlp_ratio}
    return "swin_base_patch4_window7_224", sizes


def _other_sizes(arch: SwinArch, base: SwinArch) -> Facts:
    """Fields in which a network differs from another; not those that training or small images alone see."""
    theirs = base.arguments()
    passed = ("drop_path", "small_windows")
    return {k: v for k, v in arch.arguments().items() if k not in passed and theirs.get(k) != v}
