"""Saving and loading models: a folder of config.json and model.safetensors, or an official checkpoint file.

Loading is strict: each parameter of the model is loaded, or stays at its initialisation for a reason that the report
states; each tensor of the file is used, or is expected to be unused. Anything else is a UserError.
"""

from __future__ import annotations

import inspect
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from bevt_ds.disk import writing
from bevt_ds.errors import UserError
from bevt_ds.folders import TENSORS, WEIGHTS, weights_of

from .arch import SwinArch
from .containers import State, contained, deepspeed_folder, read_deepspeed, read_file, strip
from .convert import TABLE, Weights, fit_table, from_state, infer_window, listed, without_untrained
from .layers import draw_parameters
from .tensor_file import write_tensors
from .windows import Size3

CONFIG = "config.json"
FORMAT = "bevt_ds"
ENCODER = "encoder."
HEAD = "head."  # of a classifier
TARGET_HEADS = ("lm_head.", "feature_head.")  # of token ids, or of features: a BEVT has one of them
# Constructor arguments that not every model has, and those that may differ between a file and the model it starts.
NOT_EVERYWHERE = {"vocab_size", "target_dim", "image_windows", "num_classes", "classes", "dropout"}
HEAD_SIZES = {"vocab_size": "token ids", "target_dim": "features"}  # of a BEVT, which has one -> what it predicts
MAY_DIFFER = {"window", "drop_path", "num_classes", "classes", "dropout"}
PARTS = {  # what a file may hold next to the encoder -> why a model without it does not load it
    "mask_token.": "not part of the model: masking",
    "image_embed.": "not part of the model: the images' stem",
    "video_decoder.": "not part of the model: decoder",
    "image_decoder.": "not part of the model: decoder",
    "lm_head.": "not part of the model: classifier of visual tokens",
    "feature_head.": "not part of the model: regression of features",
    HEAD: "not part of the model: classifier of clips",
}


@dataclass(frozen=True)
class LoadReport:
    """What a load did, by parameter name. `str()` sums it up in a few lines."""

    source: Path
    loaded: tuple[str, ...]
    resized: tuple[str, ...]  # those of `loaded` whose bias table was fitted to another window
    fresh: tuple[str, ...]  # parameters that the file lacks and that keep their initialisation
    unused: dict[str, str]  # the file's keys that are not loaded -> why
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.source}: {len(self.loaded)} tensors loaded", *self.notes]
        if self.resized:
            lines.append(f"{len(self.resized)} bias tables resized to the model's window")
        if self.fresh:
            groups = Counter(name.split(".")[0] for name in self.fresh)
            lines.append("kept at their initialisation: " + ", ".join(f"{n} of {g}" for g, n in groups.items()))
        for reason, number in Counter(self.unused.values()).items():
            lines.append(f"{number} not loaded: {reason}")
        return "\n  ".join(lines)


class PretrainedMixin:
    """Initial, saved and loaded weights of a module whose `arch` holds its constructor's arguments."""

    arch: dict[str, Any]  # what the network is; not how it runs (checkpointing, kernels)

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Draw all parameters again; see `layers.draw_parameters`."""
        for module in self.modules():
            self.draw(module, generator)

    def draw(self, module: nn.Module, generator: torch.Generator | None = None) -> None:
        """Draw the parameters that one of the modules in here itself has."""
        draw_parameters(module, generator)

    @torch.no_grad()
    def materialise(self, generator: torch.Generator, state: State) -> Iterator[tuple[str, nn.Module]]:
        """Give a model on the meta device memory and values on the CPU: a module after the other, yielded by name.

        The values are those of `init_weights` on the whole model, and of `state` where it has them: to the last bit,
        whatever is done with a module in between.
        """
        for place, module in self.named_modules():
            own = dict(module.named_parameters(recurse=False))
            for name, empty in own.items():
                real = nn.Parameter(torch.empty_like(empty, device="cpu"), requires_grad=empty.requires_grad)
                setattr(module, name, real)
            self.draw(module, generator)
            for name in own:
                if (full := f"{place}.{name}".lstrip(".")) in state:
                    getattr(module, name).copy_(state[full])
            yield place, module

    def save_pretrained(
        self,
        folder: str | Path,
        state: State | None = None,
        streams: Sequence[str] = ("video", "image"),
    ) -> None:
        """Write config.json and model.safetensors into `folder`, which must hold neither.

        `state` replaces the module's own state dict where its parameters are spread over ranks. `streams` are those
        that were trained: what only clips train is derived from the images' weights when an image-only model is loaded.
        """
        folder = Path(folder)
        for name in (CONFIG, TENSORS):
            if (folder / name).exists():
                raise UserError(f"{folder / name} exists: choose another folder or remove it first")
        state = self.state_dict() if state is None else state
        tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
        model = type(self).__name__
        config = {"format": FORMAT, "model": model, "streams": list(streams), "arch": self.arch}
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
            write_tensors(folder / TENSORS, tensors, {"format": "pt"})

    @classmethod
    def from_pretrained(cls, path: str | Path, **overrides: Any) -> Self:
        """A model with the weights at `path`; prints what was loaded.

        `path` is what `init_from` takes: a run's folder, a checkpoint's, a folder of weights, or a file of others
        (docs/weights.md).
        `overrides` are constructor arguments that win over the file's: another `window` resizes the bias tables.
        """
        weights = read_weights(Path(path))
        own = inspect.signature(cls).parameters.values()
        accepted = {p.name for p in own if p.kind is not p.VAR_KEYWORD} | {f.name for f in fields(SwinArch)}
        unknown = weights.arch.keys() - accepted - NOT_EVERYWHERE
        if unknown:
            raise UserError(f"{path} was written by another version: its {CONFIG} has {', '.join(sorted(unknown))}")
        arch = {key: value for key, value in weights.arch.items() if key in accepted} | overrides
        if lacking := [p.name for p in own if p.default is p.empty and p.name in accepted - arch.keys()]:
            raise UserError(f"{path} is not a {cls.__name__}: to start one from it, pass {', '.join(lacking)}")
        model = cls(**arch)
        print(load_weights(model, weights))
        return model


def load_init(model: PretrainedMixin, path: str | Path, head: bool = True) -> LoadReport:
    """Start `model` (BEVT, VideoSwin or VideoClassifier) from what `path` means, as `from_pretrained`.

    A classifier keeps the file's head only where it names the same classes. Without `head` a BEVT's head, over visual
    tokens, keeps its initialisation: for a tokenizer of another vocabulary.

    Raises UserError where the file is missing, of another architecture, or was trained with other `image_windows`.
    """
    state, report = fit_init(model, path, head)
    model.load_state_dict(state, strict=False)
    return report


def fit_init(model: PretrainedMixin, path: str | Path, head: bool = True) -> tuple[State, LoadReport]:
    """What `load_init` would copy, by parameter name, and its report. The model may be on the meta device."""
    weights = read_weights(Path(path))
    return _fit(model, weights if head else _without_target_head(weights))


def load_tensors(model: nn.Module, tensors: State) -> LoadReport:
    """Start `model`, which has an `arch` as ours, from tensors in our names or those of a layout that is read.

    Raises UserError as `load_init`.
    """
    names = stripped(tensors)
    stem = names.get("patch_embed.proj.weight")
    if stem is None or stem.ndim != 2:
        return load_weights(model, replace(from_state(names), source=Path("the state dict")))
    parts = tuple(PARTS)
    state = {name if name.startswith(parts) else ENCODER + name: value for name, value in names.items()}
    return load_weights(model, Weights(state, {"window": infer_window(state)}, source=Path("the state dict")))


def read_weights(path: Path) -> Weights:
    """Read what `path` means (`folders.weights_of`): a folder of ours, of DeepSpeed or of Hugging Face, or a file."""
    path = weights_of(path)
    if path.name == TENSORS and "model" in (_read_config(path.parent / CONFIG) or {}):
        path = path.parent  # the file of a folder of ours
    try:
        return replace(_read(path), source=path)
    except UserError as error:
        raise UserError(f"{path} {error}") from error


def _read(path: Path) -> Weights:
    if not path.is_dir():
        return _read_others(path)
    if _read_config(path / CONFIG) is None:
        if (engine := deepspeed_folder(path)) is not None:
            return _read_engine(engine)
        if (path / TENSORS).is_file() and "model_type" in _json(path / CONFIG):
            return _read_others(path / TENSORS)
    return _read_folder(path)


def _read_folder(folder: Path) -> Weights:
    config = _read_config(folder / CONFIG)
    if config is None or not (folder / TENSORS).is_file():
        raise UserError(f"is not a model folder: it needs {TENSORS} and a {CONFIG} of this project")
    return _of_config(config, read_file(folder / TENSORS), folder)


def _of_config(config: dict[str, Any], state: State, source: Path) -> Weights:
    """Tensors in our names, and the config.json that says what they are of."""
    if missing := {"model", "streams", "arch"} - config.keys():
        raise UserError(f"has a {CONFIG} without {', '.join(sorted(missing))}: write it again with save_pretrained")
    if config["model"] == "VideoSwin":
        state = {ENCODER + name.removeprefix(ENCODER): value for name, value in state.items()}
    fresh, still = tuple(config.get("fresh", ())), config.get("still", False)
    return without_untrained(Weights(state, config["arch"], {}, fresh, source=source, still=still), config["streams"])


def _read_others(path: Path) -> Weights:
    """A file of others; a config.json of ours next to it may state the spatial window, where the file does not."""
    config, checkpoint = _read_config(path.parent / CONFIG), read_file(path)
    note, state = contained(checkpoint)
    weights = from_state(stripped(state), tuple(config["arch"]["window"][1:]) if config else None)
    return replace(weights, notes=(*weights.notes, note) if note else weights.notes)


def stripped(state: State) -> State:
    """Names without wrappers' prefixes. Raises UserError where two tensors would have one name."""
    names = Counter(map(strip, state))
    if twice := [name for name, number in names.items() if number > 1]:
        raise UserError(f"holds several networks: {', '.join(twice[:3])} and others appear more than once")
    return {strip(name): value for name, value in state.items()}


def _read_engine(folder: Path) -> Weights:
    """DeepSpeed's folder: of a run of ours where the weights of that checkpoint lie next to it, or of anybody's."""
    state = read_deepspeed(folder)
    near = (parent / WEIGHTS / CONFIG for parent in (folder, *folder.parents[:2]))
    config = next(filter(None, map(_read_config, near)), None)
    if config is not None:
        return _of_config(config, {name.removeprefix("module."): value for name, value in state.items()}, folder)
    return from_state(stripped(state))


def _read_config(path: Path) -> dict[str, Any] | None:
    """A config.json of ours, or None: folders of weights often hold somebody else's."""
    config = _json(path)
    return config if config.get("format") == FORMAT else None


def _json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is none."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def load_weights(model: nn.Module, weights: Weights) -> LoadReport:
    """Copy into `model` what `weights` has for it."""
    state, report = _fit(model, weights)
    model.load_state_dict(state, strict=False)
    return report


def _fit(model: nn.Module, weights: Weights) -> tuple[State, LoadReport]:
    """What `weights` has for `model`, strictly, with bias tables fitted to the model's window; and the report."""
    weights = _without_other_parts(model, weights)
    state, unused = dict(weights.state), dict(weights.unused)
    if not any(name.startswith(ENCODER) for name, _ in model.named_parameters()):
        state = {name.removeprefix(ENCODER): value for name, value in state.items()}
    _check_arch(model.arch, weights)
    resized = _fit_tables(state, weights, tuple(model.arch["window"]))
    state |= resized
    fresh = _check_names(model.state_dict(), state, weights)
    return state, LoadReport(weights.source, tuple(state), tuple(resized), tuple(fresh), unused, tuple(weights.notes))


def _without_other_parts(model: nn.Module, weights: Weights) -> Weights:
    """`weights` without the parts that `model` does not have, and without a classifier of other classes."""
    own = [part for part in PARTS if any(name.startswith(part) for name, _ in model.named_parameters())]
    reasons = {part: reason for part, reason in PARTS.items() if part not in own}
    fresh = weights.may_be_fresh
    if HEAD in own:
        fresh += (HEAD,)
        if other := _other_classes(model.arch, weights.arch):
            reasons[HEAD] = other
    unused = {name: reason for part, reason in reasons.items() for name in weights.state if name.startswith(part)}
    state = {name: value for name, value in weights.state.items() if name not in unused}
    return replace(weights, state=state, unused=weights.unused | unused, may_be_fresh=fresh)


def _without_target_head(weights: Weights) -> Weights:
    """`weights` without the head of pretraining, and without its size."""
    unused = {name: "init_head=false: the head starts fresh" for name in weights.state if name.startswith(TARGET_HEADS)}
    state = {name: value for name, value in weights.state.items() if name not in unused}
    arch = {key: value for key, value in weights.arch.items() if key not in HEAD_SIZES}
    fresh = (*weights.may_be_fresh, *TARGET_HEADS)
    return replace(weights, state=state, arch=arch, unused=weights.unused | unused, may_be_fresh=fresh)


def _other_classes(ours: dict[str, Any], theirs: dict[str, Any]) -> str | None:
    """Why the file's classifier is of no use to the model, or None."""
    if "num_classes" not in theirs:
        return None
    if theirs["num_classes"] != ours["num_classes"]:
        return f"classifier of {theirs['num_classes']} classes, the model has {ours['num_classes']}"
    names = [tuple(arch.get("classes", ())) for arch in (ours, theirs)]
    return "classifier of other classes, as many as the model's" if all(names) and names[0] != names[1] else None


def _check_arch(arch: dict[str, Any], weights: Weights) -> None:
    plain = lambda value: list(value) if isinstance(value, tuple) else value  # noqa: E731
    wanted, given = ({"norm": "pre", **sizes} for sizes in (arch, weights.arch))  # only those that differ name it
    predicted = [[what for key, what in HEAD_SIZES.items() if key in sizes] for sizes in (wanted, given)]
    if all(predicted) and predicted[0] != predicted[1]:
        (now,), (before,) = predicted
        raise UserError(
            f"{weights.source} was trained to predict {before}, this model predicts {now}: start the head fresh with"
            " init_head=false"
        )
    for key, theirs in given.items():
        ours = wanted.get(key)
        if key not in wanted or key in MAY_DIFFER or plain(ours) == plain(theirs):
            continue
        fresh_head = ", or start the head fresh with init_head=false" if key in HEAD_SIZES else ""
        raise UserError(
            f"{weights.source} has {key}={plain(theirs)}, this model {key}={plain(ours)}: make them agree{fresh_head}"
        )


def _fit_tables(state: State, weights: Weights, target: Size3) -> State:
    """The bias tables of `state` for window `target`, where that is not the checkpoint's own."""
    source = tuple(weights.arch["window"])
    if source == target:
        return {}
    tables = {name: table for name, table in state.items() if name.endswith(TABLE)}
    try:
        return {name: fit_table(table, source, target, weights.still) for name, table in tables.items()}
    except UserError as error:
        raise UserError(f"{weights.source} {error}") from error


def _check_names(own: State, state: State, weights: Weights) -> list[str]:
    """Names of `own` that stay fresh. Raises UserError unless the rest agrees by name and shape."""
    fresh = [name for name in own if name not in state]
    whole = tuple(part for part in weights.may_be_fresh if not any(name.startswith(part) for name in state))
    missing = [name for name in fresh if not name.startswith(whole)]  # a part starts fresh as a whole, or not
    unknown = [name for name in state if name not in own]
    shapes = [n for n in state if n in own and state[n].shape != own[n].shape]
    for problem, names in (("lacks", missing), ("has unknown", unknown), ("has other shapes for", shapes)):
        if names:
            raise UserError(f"{weights.source} is not of this model: it {problem} {listed(names)}")
    return fresh
