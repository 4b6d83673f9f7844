"""What `--help` prints: how to start a run, the recipes, and every field with its type, default and meaning."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping

from bevt_ds.config.fields import Field
from bevt_ds.config.parse import Leaf, config_fields, get_value, type_name
from bevt_ds.config.schema import RunConfig, TrainingConfig

NOT_NEGATIVE = Field("").bounds  # of every number that states no other bound
NUMBERS = "  Numbers are at least 0 unless another bound is given."
FREE = "  [free on resume]: may differ when a run is continued; the other fields may not."


def page(usage: str, recipes: Mapping[str, Callable[[], RunConfig]], config: RunConfig) -> str:
    """A whole help page: usage, the recipes if there are any, and every field with the defaults of `config`."""
    parts = [usage]
    if recipes:
        width = 2 + max(map(len, recipes))
        names = "\n".join(f"  {name:<{width}}{_first_line(make.__doc__)}" for name, make in recipes.items())
        parts.append(f"recipes:\n{names}\n")
    origin = f"of recipe={config.recipe}" if recipes else f"for weights of {config.recipe}"
    legend = [NUMBERS, FREE] if isinstance(config, TrainingConfig) else [NUMBERS]
    parts.append("\n".join([f"fields, with the defaults {origin}:", *legend, field_lines(config)]))
    return "\n".join(parts)


def field_lines(config: RunConfig) -> str:
    """Every field but the recipe: key, default as in `config`, type and bounds, and what it means."""
    resumes = isinstance(config, TrainingConfig)
    rows = []
    for leaf in config_fields(type(config)):
        if leaf.key != "recipe":
            mark = " [free on resume]" if resumes and leaf.field.resume == "free" else ""
            value = _show(get_value(config, leaf.key))
            rows.append(f"  {leaf.key}={value}  <{_allowed(leaf)}>{mark}\n{_indent(leaf.field.help)}")
    return "\n".join(rows) + "\n"


def _allowed(leaf: Leaf) -> str:
    """The type and the bounds of a field: "int, at least 1, a multiple of 32"."""
    bounds = "" if leaf.field.bounds == NOT_NEGATIVE else leaf.field.bounds
    return ", ".join(part for part in (type_name(leaf.type), bounds, leaf.field.factor) if part)


def _first_line(text: str | None) -> str:
    return (text or "").strip().splitlines()[0]


def _show(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _indent(text: str) -> str:
    return textwrap.indent(textwrap.fill(text, 100), " " * 6)
