"""What `--help` prints: how to start a run, the recipes, and every field with its type, default and meaning."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping
from typing import Any

from bevt_ds.config.parse import config_fields, get_value, type_name
from bevt_ds.config.recipes import RECIPES, get_recipe

USAGE = """\
usage: deepspeed bevt_ds/pretrain.py [--deepspeed_config FILE] [recipe=NAME] [key=value ...]

Pretrain BEVT: masked image modelling, or joint masked image and video modelling, with discrete visual tokens.
`torchrun bevt_ds/pretrain.py ...` and `python bevt_ds/pretrain.py ...` work as well.

  deepspeed bevt_ds/pretrain.py --deepspeed_config ds_configs/zero2.json
      the demo: draws its own shards and learns from them, minutes on a CPU
  deepspeed bevt_ds/pretrain.py --deepspeed_config ds_configs/zero2.json recipe=image_swin_b \\
      'data.images=in1k-{000000..000127}.tar' tokenizer.weights=encoder.pkl output_dir=runs/stage1
      stage 1, images only
  deepspeed bevt_ds/pretrain.py --deepspeed_config ds_configs/zero2.json recipe=joint_swin_b \\
      'data.videos=k400-{000000..000099}.tar' 'data.images=in1k-{000000..000127}.tar' \\
      tokenizer.weights=encoder.pkl init_from=runs/stage1 output_dir=runs/joint
      stage 2, both streams

  --deepspeed_config FILE   engine knobs (default: ZeRO-2 as ds_configs/zero2.json); "auto" is filled in from the recipe
  --help                    this text; with recipe=NAME the defaults shown are that recipe's
"""


def help_text(recipe: str) -> str:
    """The help page of pretraining, with the defaults of one recipe."""
    return page(USAGE, RECIPES, get_recipe(recipe))


def page(usage: str, recipes: Mapping[str, Callable[[], Any]], config: Any) -> str:
    """A whole help page: usage, the recipes there are, and every field with the defaults of `config`."""
    width = 2 + max(map(len, recipes))
    names = "\n".join(f"  {name:<{width}}{_first_line(make.__doc__)}" for name, make in recipes.items())
    return f"{usage}\nrecipes:\n{names}\n\nfields, with the defaults of recipe={config.recipe}:\n{field_lines(config)}"


def field_lines(config: Any) -> str:
    """Every field but the recipe: key, default as in `config`, type, and what it means."""
    rows = []
    for f in config_fields(type(config)):
        if f.key != "recipe":
            rows.append(f"  {f.key}={_show(get_value(config, f.key))}  <{type_name(f.type)}>\n{_indent(f.help)}")
    return "\n".join(rows) + "\n"


def _first_line(text: str | None) -> str:
    return (text or "").strip().splitlines()[0]


def _show(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _indent(text: str) -> str:
    return textwrap.indent(textwrap.fill(text, 100), " " * 6)
