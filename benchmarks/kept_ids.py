"""What kept ids save of a training step on a CPU: a step of the demo with its tokenizer, and with ids from files.

`python -m benchmarks.kept_ids --folder runs/kept-ids`: the demo's network and batch on a few drawn clips and images,
one crop each, with three tokenizers: the demo's, `vq` as `recipe=vq_in1k` has it, and `dalle`, these two with random
weights, which take as long as trained ones. Steps with and without kept ids alternate in one process. CPU seconds, of
decode workers too: they hardly depend on how busy the machine is, as a step's time would.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.common import RESULTS, add_row, command_line, cpu_seconds, cpu_seconds_of, family, in_turns
from bevt_ds.config.recipes import demo, vq_in1k
from bevt_ds.config.schema import Config
from bevt_ds.config.targets import TokenizerConfig
from bevt_ds.data.loader import Loader
from bevt_ds.model.bevt import BEVT
from bevt_ds.model.presets import create_model
from bevt_ds.model.tokenizers.dalle import DalleTokenizer
from bevt_ds.shards.pack import pack
from bevt_ds.shards.synthetic.draw import draw
from bevt_ds.train.targets import Targets, open_targets
from bevt_ds.train.tokenizing import make_tokenizer
from bevt_ds.train.tokens import make_tokens

CLIPS, IMAGES = 8, 24
WARM = 3  # steps that are not measured
CPU = torch.device("cpu")


def tokenizer_of(name: str, folder: Path) -> TokenizerConfig:
    """A tokenizer, its weights written where it has any."""
    torch.manual_seed(0)
    if name == "dalle" and not (folder / "dalle.safetensors").exists():
        save_file(DalleTokenizer().state_dict(), folder / "dalle.safetensors")
    if name == "vq" and not (folder / "vq").exists():
        make_tokenizer(vq_in1k().model).save_pretrained(folder / "vq")
    weights = {"dalle": "dalle.safetensors", "vq": "vq"}.get(name)
    return TokenizerConfig(name, str(folder / weights)) if weights else demo().tokenizer


def config_of(name: str, folder: Path) -> Config:
    """The demo on shards of drawn clips and images, with its ids kept."""
    base, kinds = demo(), ("video", "image")
    if not (folder / "shards").exists():
        draw(folder / "media", CLIPS, IMAGES)
        for kind in kinds:
            pack(folder / "media", folder / "shards", kind, kind)
    patterns = {f"{kind}s": f"{folder}/shards/{kind}-*.tar" for kind in kinds}
    data = replace(base.data, **patterns, eval_videos="", eval_images="", crops=1)
    return replace(base, data=data, tokenizer=tokenizer_of(name, folder), tokens=str(folder / f"ids-{name}"))


def step_seconds(config: Config, targets: Targets, model: BEVT, count: int) -> float:
    """CPU seconds of one step, over so many."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    with Loader(config) as loader:
        for step in range(WARM + count):
            if step == WARM:
                began = cpu_seconds_of(family())
            batch = targets.fill(next(loader))
            optimizer.zero_grad()
            model(batch).loss.backward()
            optimizer.step()
        return (cpu_seconds_of(family()) - began) / count


def row_of(name: str, folder: Path, rounds: int, count: int) -> dict[str, Any]:
    """One tokenizer: CPU seconds of making the ids of a clip's and of an image's crop, and of a step each way."""
    config = config_of(name, folder)
    making = None if Path(config.tokens).exists() else cpu_seconds(lambda: make_tokens(config))
    targets = open_targets(config, CPU, torch.float32)
    options = asdict(config.model)
    model = create_model(options.pop("name"), **targets.head, **options).train()
    ways = {"made": replace(config, tokens=""), "kept": config}
    times = in_turns({way: partial(step_seconds, own, targets, model, count) for way, own in ways.items()}, rounds)
    sizes = {kind: path.stat().st_size for kind in ("video", "image") for path in Path(config.tokens).glob(f"{kind}-*")}
    saved = 1 - median(times["kept"]) / median(times["made"])
    row = {"tokenizer": name, **times, "saved": saved, "making": making, "bytes": sizes}
    return row | {"clips": CLIPS, "images": IMAGES, "steps": count}


def main() -> None:
    parser = command_line(__doc__, rounds=3, out=RESULTS / "kept-ids.jsonl")
    parser.add_argument("--folder", type=Path, default=Path("runs/kept-ids"))
    parser.add_argument("--tokenizers", nargs="+", default=["random_projection", "vq", "dalle"])
    parser.add_argument("--steps", type=int, default=4, help="of each round and way")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for name in arguments.tokenizers:
        add_row(arguments.out, row_of(name, arguments.folder.resolve(), arguments.rounds, arguments.steps))


if __name__ == "__main__":
    main()
