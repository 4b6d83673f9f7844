"""Which tokenizers there are, by name: ours, and those that installed packages add. No torch is imported for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from bevt_ds.errors import UserError

GROUP = "bevt_ds.tokenizers"  # of entry points
OURS = ("dalle", "vq", "huggingface", "torchscript", "random_projection")


def added() -> dict[str, list[EntryPoint]]:
    """The entry points of other packages by name; a name that two packages use has two."""
    found: dict[str, list[EntryPoint]] = {}
    for point in entry_points(group=GROUP):
        found.setdefault(point.name, []).append(point)
    return found


def unknown_name(name: str) -> Iterator[str]:
    """Why there is no tokenizer of this name, if there is none, or more than one."""
    points = added()
    offers = [f"{point.value} of {point.dist.name if point.dist else '?'}" for point in points.get(name, [])]
    offers += ["bevt_ds itself"] * (name in OURS)
    if not offers:
        names = ", ".join([*OURS, *sorted(points)])
        yield f"no tokenizer named {name!r}: choose one of {names}"
    elif len(offers) > 1:
        yield f"tokenizer.name={name}: {' and '.join(offers)} use this name; uninstall all but one"


def builder(name: str) -> Callable[..., Any]:
    """What makes the tokenizer of another package.

    Raises:
        UserError: there is none of this name, or what its package names cannot be imported.
    """
    for problem in unknown_name(name):
        raise UserError(problem)
    (point,) = added()[name]
    try:
        return point.load()
    except (ImportError, AttributeError) as error:
        raise UserError(f"tokenizer.name={name}: its package names {point.value}, and {error}") from error
