"""`key=value` on the command line: from text to a changed `Config`, with messages that name the mistake."""

from __future__ import annotations

import difflib
import math
import typing
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from decimal import Decimal
from typing import Any, ClassVar, Literal, Protocol, TypeVar, get_args, get_origin

from bevt_ds.config.fields import Field
from bevt_ds.config.schema import Config, RunConfig, RunT
from bevt_ds.errors import UserError


class Section(Protocol):
    """A dataclass of the schema: a whole configuration or one section of it."""

    __dataclass_fields__: ClassVar[dict[str, Any]]


S = TypeVar("S", bound=Section)
ELSEWHERE = {  # what other programs call it, and what it is here
    **dict.fromkeys(("batch", "batch_size", "bs"), ("train.global_clips", "train.global_images")),
    **dict.fromkeys(("learning_rate", "base_lr"), ("optim.lr",)),
    **dict.fromkeys(("num_frames", "clip_len"), ("data.frames",)),
    **dict.fromkeys(("img_size", "image_size", "crop_size", "resolution"), ("data.size",)),
    "num_workers": ("data.workers",),
    "num_epochs": ("train.epochs",),
    "num_steps": ("train.steps",),
    "max_steps": ("train.steps",),
}


@dataclass(frozen=True)
class Leaf:
    """A field that holds a value: its dotted key, its type, and what stands with it in the schema."""

    key: str
    type: Any
    field: Field


def config_fields(cls: type[Section] = Config, prefix: str = "") -> Iterator[Leaf]:
    """Every leaf field of a config dataclass, depth first."""
    hints = typing.get_type_hints(cls, include_extras=True)
    for f in fields(cls):
        hint = hints[f.name]
        if is_dataclass(hint):
            yield from config_fields(hint, f"{prefix}{f.name}.")
        else:
            base, stated = get_args(hint)
            yield Leaf(prefix + f.name, base, stated if isinstance(stated, Field) else Field(stated))


def get_value(config: Section, key: str) -> Any:
    """The value at a dotted key."""
    value: Any = config
    for name in key.split("."):
        value = getattr(value, name)
    return value


def set_value(config: S, key: str, value: Any) -> S:
    """A copy of the config with the value at a dotted key replaced."""
    head, _, rest = key.partition(".")
    return replace(config, **{head: set_value(getattr(config, head), rest, value) if rest else value})


def parse_overrides(arguments: Iterable[str], kind: type[RunConfig] = Config) -> dict[str, str]:
    """`key=value` words to a dict of texts; the keys are those of the config dataclass `kind`.

    Raises:
        UserError: a word without `=`, an unknown key, or a key given twice.
    """
    known = {f.key for f in config_fields(kind)}
    found: dict[str, str] = {}
    for word in arguments:
        key, equals, text = word.partition("=")
        if not equals:
            raise UserError(f"{word!r} is not key=value. Write for example train.steps=100; --help lists the keys.")
        if key not in known:
            raise UserError(f"unknown key {key!r}. {_near(key, known)}")
        if key in found:
            raise UserError(
                f"{key} is given twice: {found[key]!r} and {text!r}. If the shell expanded braces, put quotes around"
                f" the whole word: '{key}=name-{{000000..000099}}.tar'."
            )
        found[key] = text
    return found


def apply_overrides(config: RunT, overrides: dict[str, str]) -> RunT:
    """The config with each override parsed to its field's type.

    Raises:
        UserError: a text that is not a value of the field's type.
    """
    types_by_key = {f.key: f.type for f in config_fields(type(config))}
    for key, text in overrides.items():
        config = set_value(config, key, parse_value(key, types_by_key[key], text))
    return config


def parse_value(key: str, kind: Any, text: str) -> Any:
    """One text as a value of `kind`: bool, int, float, str, a Literal, or a tuple of these."""
    if get_origin(kind) is tuple:
        items = [part.strip() for part in text.strip("()[] ").split(",") if part.strip()]
        kinds = get_args(kind)
        if len(items) != len(kinds):
            raise UserError(f"{key}={text}: expected {len(kinds)} values with commas between, got {len(items)}.")
        return tuple(parse_value(key, k, item) for k, item in zip(kinds, items, strict=True))
    if get_origin(kind) is Literal:
        allowed = {str(value): value for value in get_args(kind)}
        if text not in allowed:
            raise UserError(f"{key}={text}: expected one of {', '.join(allowed)}.")
        return allowed[text]
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise UserError(f"{key}={text}: expected true or false.")
        return text.lower() == "true"
    if kind is not str and not text.strip():
        raise UserError(f"{key}= has no value: expected {type_name(kind)}. Leave it out for the recipe's value.")
    try:
        return _whole(text) if kind is int else kind(text)
    except ValueError:
        raise UserError(f"{key}={text}: expected {type_name(kind)}.") from None


def _whole(text: str) -> int:
    """An int, also as 1e5 or 100000.0. ValueError: it is no whole number."""
    try:
        return int(text)
    except ValueError:
        if (number := Decimal(_number(text))) != number.to_integral_value():
            raise
        return int(number)


def _number(text: str) -> str:
    """The text of a finite number that a float can hold. ValueError: it is none."""
    if not math.isfinite(float(text)):
        raise ValueError(text)
    return text


def type_name(kind: Any) -> str:
    """A type as `--help` shows it: int, a|b, (int, int)."""
    if get_origin(kind) is Literal:
        return "|".join(map(str, get_args(kind)))
    if get_origin(kind) is tuple:
        return "(" + ", ".join(type_name(k) for k in get_args(kind)) + ")"
    return kind.__name__


def to_dict(config: Section) -> dict[str, Any]:
    """A config as plain dicts and lists, for JSON."""
    return {f.name: _plain(getattr(config, f.name)) for f in fields(config)}


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return to_dict(value)
    return list(value) if isinstance(value, tuple) else value


def from_dict(values: dict[str, Any], kind: type[RunT] = Config) -> RunT:
    """The inverse of `to_dict`, for the config dataclass `kind`.

    Raises:
        UserError: it was saved by another version, or by a program with another configuration.
    """
    return _build(kind, values)


def _build(kind: Any, value: Any) -> Any:
    if is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        unknown = set(value) - {f.name for f in fields(kind)}
        if unknown:
            raise UserError(
                f"the saved config has fields that {kind.__name__} does not know: {', '.join(sorted(unknown))}. Another"
                " version, or another program, wrote it."
            )
        return kind(**{name: _build(hints[name], item) for name, item in value.items()})
    return tuple(value) if isinstance(value, list) else value


def _near(key: str, known: set[str]) -> str:
    last = key.rpartition(".")[2]
    matches = [meant for meant in ELSEWHERE.get(last, ()) if meant in known]
    if matches:
        return f"{last} is called {' or '.join(matches)} here."
    matches = difflib.get_close_matches(key, known, n=3, cutoff=0.5)
    matches += [k for k in sorted(known) if k.rpartition(".")[2] == last and k not in matches]
    return f"Near: {', '.join(matches)}." if matches else "--help lists the keys."
