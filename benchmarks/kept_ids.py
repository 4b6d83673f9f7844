"""What kept ids save of a training step on a CPU: a step of the demo with its tokenizer, and with ids from files.

`python -m benchmarks.kept_ids --folder runs/kept-ids`: the demo's network and batch on a few drawn clips and images,
one crop each, with three tokenizers: the demo's, `vq` as `recipe=vq_in1k` has it, and `dalle`, these two with random
weights, which take as long as trained ones. Steps with and without kept ids alternate in one process. CPU seconds, of
decode workers too: they hardly depend on how busy the machine is, as a step's time would.
"""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.common import RESULTS, append_row, machine, provenance
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


def shards(folder: Path) -> Path:
    """A shard of drawn clips and one of images."""
    if not (folder / "shards").exists():
        draw(folder / "media", CLIPS, IMAGES)
        for kind in ("video", "image"):
            pack(folder / "media", folder / "shards", kind, kind)
    return folder / "shards"


def config_of(name: str, folder: Path) -> Config:
    """The demo on these shards, with its ids kept."""
    base, where = demo(), shards(folder)
    patterns = {f"{kind}s": f"{where}/{kind}-*.tar" for kind in ("video", "image")}
    data = replace(base.data, **patterns, eval_videos="", eval_images="", crops=1)
    return replace(base, data=data, tokenizer=tokenizer_of(name, folder), tokens=str(folder / f"ids-{name}"))


def cpu_seconds(loader: Loader) -> float:
    """Of this process and of the loader's workers."""
    ticks = 0
    for pid in loader.worker_pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])  # user, system
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def step_seconds(config: Config, targets: Targets, model: BEVT, count: int) -> float:
    """CPU seconds of one step, over so many."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    with Loader(config) as loader:
        for step in range(WARM + count):
            if step == WARM:
                began = cpu_seconds(loader)
            batch = targets.fill(next(loader))
            optimizer.zero_grad()
            model(batch).loss.backward()
            optimizer.step()
        return (cpu_seconds(loader) - began) / count


def row_of(name: str, folder: Path, rounds: int, count: int) -> dict[str, Any]:
    """One tokenizer: CPU seconds of making the ids of a clip's and of an image's crop, and of a step each way."""
    config = config_of(name, folder)
    before = time.process_time()
    made = not Path(config.tokens).exists() and make_tokens(config) == 0
    making = time.process_time() - before if made else None
    targets = open_targets(config, CPU, torch.float32)
    options = asdict(config.model)
    model = create_model(options.pop("name"), **targets.head, **options).train()
    times: dict[str, list[float]] = {"made": [], "kept": []}
    for _ in range(rounds):
        times["made"].append(step_seconds(replace(config, tokens=""), targets, model, count))
        times["kept"].append(step_seconds(config, targets, model, count))
    sizes = {kind: path.stat().st_size for kind in ("video", "image") for path in Path(config.tokens).glob(f"{kind}-*")}
    saved = 1 - median(times["kept"]) / median(times["made"])
    row = {
        "tokenizer": name,
        **times,
        "saved": saved,
        "making": making,
        "bytes": sizes,
        "clips": CLIPS,
        "images": IMAGES,
    }
    return row | {"steps": count, "provenance": provenance("cpu") | machine()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/kept-ids"))
    parser.add_argument("--tokenizers", nargs="+", default=["random_projection", "vq", "dalle"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4, help="of each round and way")
    parser.add_argument("--out", type=Path, default=RESULTS / "kept-ids.jsonl")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for name in arguments.tokenizers:
        append_row(arguments.out, row_of(name, arguments.folder.resolve(), arguments.rounds, arguments.steps))


if __name__ == "__main__":
    main()
