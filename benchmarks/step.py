"""Times a whole training step, the original's and ours, and says where the time goes.

    python -m benchmarks.step                        # Swin-B, 8 clips and 64 images on a GPU; small on a CPU
    python -m benchmarks.step --model swin_t --providers eager ours
    python -m benchmarks.step --profile              # host and device by part, launches, idle share, a trace
    python -m benchmarks.step --cases shards --videos 'k400/*.tar' --image-shards 'in1k/*.tar'

A step is tokenizer, forward, backward, clipping and update. Four cases: a batch of noise that stays on the device; the
same without the tokenizer; a step of fine-tuning on such a batch; and batches of real shards through the loader, for
which drawn ones stand in where none are given. Providers take turns step by step, so that other load on the machine
affects all alike; only with shards each has a loader and a time of its own. One that fails leaves a row with its
reason, and the others go on; where it is ours, the command ends with status 1.

Rows go to step-DEVICE.jsonl; a page and a plot are made of those of the newest commit. Compare ratios within one run:
on a CPU those of CPU seconds, which a busy machine disturbs least.
"""

from __future__ import annotations

import argparse
import gc
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import repeat
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tqdm import tqdm

from bevt_ds.batch import Batch
from bevt_ds.config.schema import Config, FinetuneConfig
from bevt_ds.data.loader import Loader
from bevt_ds.errors import UserError
from bevt_ds.model.arch import SwinArch
from bevt_ds.runtime.engine_setup import start_ranks
from bevt_ds.runtime.flops import clip_parts, image_parts, peak_flops, training_flops
from bevt_ds.runtime.tokenizer_graph import SETTLED
from bevt_ds.shards.synthetic.draw import ensure_demo_shards

from . import pages, report
from .common import RESULTS, append_row, ceilings, provenance, quantiles, reason, rows_of
from .step_batch import resident_batch
from .step_finetune import FINETUNING, FinetuneSetting, finetuning_configuration, labelled_batch
from .step_goals import WITH_GRAPHS
from .step_parts import profile_step
from .step_profile import write_profile
from .step_providers import CPU_PROVIDERS, PROVIDERS, RIVALS, Setting, Step, configuration

CASES = ("resident", "no tokenizer", "fine-tuning", "shards")
FEW = ("eager", "ours")  # providers of the cases beyond the first; graphs too, but with shards
MAY_FAIL = {*RIVALS, WITH_GRAPHS}  # graphs have not been captured on a GPU yet
WARM_UP, SHARD_STEPS = {"cuda": SETTLED + 1, "cpu": 2}, {"cuda": 20, "cpu": 4}  # graphs are there after SETTLED
BATCH = {"tiny": (4, 16)}  # clips and images a step on a CPU, by model; else one clip and four images
GPU_BATCH = (8, 64)


@dataclass(frozen=True)
class Case:
    """What is timed. `facts` go into its rows; `flops` counts the training FLOPs of a step on a batch."""

    name: str
    clips: int
    images: int
    facts: dict[str, str]
    flops: Callable[[Any], int]


@dataclass
class Entry:
    """A provider under way."""

    name: str
    step: Step
    state_mb: float | None  # weights, optimizer's state and what else stays between steps
    wall_ms: list[float] = field(default_factory=list)
    cpu_ms: list[float] = field(default_factory=list)
    peak_mb: float | None = None


def step_flops(setting: Setting, batch: Batch) -> int:
    """Training FLOPs of one step: masked head, no recomputation, no tokenizer."""
    arch, data = setting.arch(), setting.config.data
    swin, vocabulary, macs = SwinArch.of(arch), arch["vocab_size"], 0
    for stream, count in ((batch.video, clip_parts), (batch.image, image_parts)):
        if stream is not None:
            lengths = (data.frames, data.size) if count is clip_parts else (data.size,)
            macs += count(swin, vocabulary, *lengths, 0).total() * len(stream.pixels)
            macs += stream.count * swin.width * vocabulary
    return training_flops(macs)


def pretraining_case(name: str, setting: Setting) -> Case:
    """Steps of pretraining."""
    config, (clips, images) = setting.config, (setting.config.train.micro_clips, setting.config.train.micro_images)
    facts = {
        "model": config.model.name,
        "batch": f"{clips} clips {images} images",
        "pixels": f"{config.data.frames}x{config.data.size}x{config.data.size}",
        "vocabulary": f"{config.tokenizer.vocab_size} ids",
        "tokenizer": setting.tokenizer,
        "dtype": str(setting.dtype),
    }
    return Case(name, clips, images, facts, partial(step_flops, setting))


def finetuning_case(setting: FinetuneSetting) -> Case:
    """Steps of fine-tuning."""
    config, clips = setting.config, setting.config.train.micro_clips
    facts = {
        "model": config.model.name,
        "batch": f"{clips} clips",
        "pixels": f"{config.data.frames}x{config.data.size}x{config.data.size}",
        "vocabulary": f"{setting.classes} classes",
        "tokenizer": "none",
        "dtype": str(setting.dtype),
    }
    return Case("fine-tuning", clips, 0, facts, lambda batch: setting.step_flops())


def synchronise(device: str) -> None:
    """Wait for the GPU, if there is one."""
    if device == "cuda":
        torch.cuda.synchronize()


def held_bytes(device: str) -> int:
    """Bytes of a GPU that are taken between steps; of a graph's pool all, for no one else can have them. CPU: 0."""
    if device != "cuda":
        return 0
    pools = [s for s in torch.cuda.memory_snapshot() if tuple(s.get("segment_pool_id", (0, 0))) != (0, 0)]
    return torch.cuda.memory_allocated() + sum(s["total_size"] - s["allocated_size"] for s in pools)


def timed(entry: Entry, batches: Iterator[Batch], device: str) -> None:
    """One step, noted in the entry."""
    synchronise(device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    began, cpu = time.perf_counter(), time.process_time()
    entry.step(batches)
    synchronise(device)
    entry.wall_ms.append(1e3 * (time.perf_counter() - began))
    entry.cpu_ms.append(1e3 * (time.process_time() - cpu))
    if device == "cuda":
        entry.peak_mb = round(entry.state_mb + (torch.cuda.max_memory_allocated() - before) / 1e6, 1)


class Benchmark:
    """One device, one file of rows."""

    def __init__(self, path: Path, config: Config, seconds: float, finetune: FinetuneConfig | None = None):
        """finetune: of the case fine-tuning."""
        self.ranks, self.finetune = start_ranks(), finetune
        self.device, self.path, self.config, self.seconds = self.ranks.device.type, path, config, seconds
        self.source, self.limits = provenance(self.device), ceilings(self.device)
        self.failed: list[str] = []  # of ours

    def build(self, name: str, make: Callable[[], Step], batches: Iterator[Any]) -> Entry:
        """A provider after its first steps, which compile, tune and make the optimizer's state."""
        before = held_bytes(self.device)
        step = make()
        for _ in range(WARM_UP[self.device]):
            step(batches)
        synchronise(self.device)
        state = round((held_bytes(self.device) - before) / 1e6, 1) if self.device == "cuda" else None
        return Entry(name, step, state)

    def run(self, case: str, providers: Sequence[str], tokenizer: str) -> None:
        """All rows of a case."""
        few = [name for name in providers if name in FEW]
        if case == "shards":
            self.shards(few, tokenizer)
        elif case == "fine-tuning":
            self.finetuning([name for name in providers if name in FINETUNING])
        elif case == "resident":
            self.resident(case, providers, tokenizer)
        else:
            self.resident(case, [name for name in providers if name in (*FEW, WITH_GRAPHS)], "none")
        gc.collect()

    def resident(self, case: str, providers: Sequence[str], tokenizer: str) -> None:
        """All providers on a batch that stays on the device."""
        setting, data, train = Setting(self.config, tokenizer, self.ranks), self.config.data, self.config.train
        batch = resident_batch(train.micro_clips, train.micro_images, data.frames, data.size, 0, data.mask)
        makers = {name: partial(PROVIDERS[name], setting) for name in providers}
        self.in_turns(pretraining_case(case, setting), makers, batch.to(self.ranks.device))

    def finetuning(self, providers: Sequence[str]) -> None:
        """A fine-tuning step on a batch that stays on the device."""
        setting = FinetuneSetting(self.finetune, self.ranks)
        batch = labelled_batch(self.finetune, setting.classes).to(self.ranks.device)
        makers = {name: partial(FINETUNING[name], setting) for name in providers}
        self.in_turns(finetuning_case(setting), makers, batch)

    def in_turns(self, case: Case, makers: Mapping[str, Callable[[], Step]], batch: Any) -> None:
        """All providers step by step, on one batch."""
        entries: dict[str, Entry] = {}
        for name in tqdm(makers, desc=f"{case.name}: warming up"):
            with self.surviving(case, name, entries):
                entries[name] = self.build(name, makers[name], repeat(batch))
        began, rounds = time.perf_counter(), 0
        with tqdm(desc=case.name, unit="round") as bar:
            while entries and (rounds < 3 or time.perf_counter() - began < self.seconds):
                for name in list(entries):
                    with self.surviving(case, name, entries):
                        timed(entries[name], repeat(batch), self.device)
                rounds += 1
                bar.update()
        for name in list(entries):
            with self.surviving(case, name, entries):
                self.write(case, entries[name], batch, repeat(batch))

    @contextmanager
    def surviving(self, case: Case, name: str, entries: dict[str, Entry]) -> Iterator[None]:
        """Inside the block a provider may fail: it leaves a row with its reason, its memory, and the others."""
        try:
            yield
        except Exception as error:  # compilers raise whatever they like
            self.row(case, name, {"error": reason(error)})
            self.failed += [f"{case.name}, {name}"] * (name not in MAY_FAIL)
            entries.pop(name, None)
            gc.collect()

    def profile(self, provider: str, tokenizer: str, folder: Path) -> dict[str, Any]:
        """Write what host and device do in a step of one provider, on a batch that stays on the device."""
        setting, data, train = Setting(self.config, tokenizer, self.ranks), self.config.data, self.config.train
        batch = resident_batch(train.micro_clips, train.micro_images, data.frames, data.size, 0, data.mask)
        batches = repeat(batch.to(self.ranks.device))
        entry = self.build(provider, partial(PROVIDERS[provider], setting), batches)
        return write_profile(lambda: entry.step(batches), entry.step.marks, self.device, folder)

    def shards(self, providers: Sequence[str], tokenizer: str) -> None:
        """Each provider on a loader of its own, its wait for data included."""
        setting = Setting(self.config, tokenizer, self.ranks)
        case = pretraining_case("shards", setting)
        for name in providers:
            with self.surviving(case, name, {}):
                self.on_shards(case, name, partial(PROVIDERS[name], setting))
            gc.collect()

    def on_shards(self, case: Case, name: str, make: Callable[[], Step]) -> None:
        """One provider on batches of a loader."""
        with Loader(self.config, device=self.ranks.device) as loader:
            batches = iter(loader)
            entry = self.build(name, make, batches)
            loader.wait_seconds()
            for _ in tqdm(range(SHARD_STEPS[self.device]), desc=f"shards: {name}"):
                timed(entry, batches, self.device)
            waited = loader.wait_seconds() / (sum(entry.wall_ms) / 1e3)
            self.write(case, entry, next(batches), batches, data_wait_share=round(waited, 4))

    def write(self, case: Case, entry: Entry, batch: Any, batches: Iterator[Any], **more: float) -> None:
        """Times, rates, use of the peak and parts of one provider."""
        wall = quantiles(entry.wall_ms)
        flops_a_second = 1e3 * case.flops(batch) / wall.p50
        datasheet = peak_flops(self.source["device"])
        result = {
            **wall.in_ms(),
            "cpu_ms": round(median(entry.cpu_ms), 2),
            "steps": len(entry.wall_ms),
            "clips_per_s": round(1e3 * case.clips / wall.p50, 3),
            "images_per_s": round(1e3 * case.images / wall.p50, 3),
            "mfu": round(flops_a_second / self.limits["matmul_flop_s"], 4),
            "mfu_datasheet": round(flops_a_second / datasheet, 4) if datasheet else None,
            "peak_mb": entry.peak_mb,
        }
        parts = profile_step(lambda: entry.step(batches), entry.step.marks, self.device, wall.p50)
        self.row(case, entry.name, result | parts | more)

    def row(self, case: Case, provider: str, result: dict[str, Any]) -> None:
        """One row, on screen and on disk."""
        facts = {"op": "step", "case": case.name, "provider": provider, **case.facts}
        append_row(self.path, facts | result | {"ceilings": self.limits, "provenance": self.source})
        tqdm.write(f"{case.name}, {provider}: {result.get('p50_ms', result.get('error'))}")


def with_shards(config: Config, videos: str, images: str) -> Config:
    """The configuration with shards: those given, else drawn ones in the folder of temporary files."""
    if not (videos and images):
        folder = Path(tempfile.gettempdir()) / "bevt-step-benchmark"
        ensure_demo_shards(folder)
        videos, images = f"{folder}/train-video-*.tar", f"{folder}/train-image-*.tar"
    return replace(config, data=replace(config.data, videos=videos, images=images))


def main() -> None:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    models, tokenizers = ("tiny", "swin_t", "swin_s", "swin_b", "swin_l"), ("dalle", "random_projection", "none")
    parser.add_argument("--model", choices=models, default="swin_b" if gpu else "tiny")
    parser.add_argument("--clips", type=int, help="clips a step")
    parser.add_argument("--images", type=int, help="images a step")
    parser.add_argument("--ids", type=int, help="size of the vocabulary; default: 64 for tiny, else 8192")
    parser.add_argument("--tokenizer", choices=tokenizers, default="dalle" if gpu else "random_projection")
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, default=list(PROVIDERS) if gpu else CPU_PROVIDERS)
    parser.add_argument("--videos", default="", help="shards of videos; default: drawn ones")
    parser.add_argument("--image-shards", default="", help="shards of images; default: drawn ones")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--seconds", type=float, default=40.0 if gpu else 20.0, help="of timed rounds a case")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--profile", action="store_true", help="profile each provider (default: ours), write no rows")
    arguments = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    if not gpu:
        print("No GPU: a small step on the CPU. These numbers say nothing about the Triton kernels.")
    default = GPU_BATCH if gpu else BATCH.get(arguments.model, (1, 4))
    clips = default[0] if arguments.clips is None else arguments.clips
    images = default[1] if arguments.images is None else arguments.images
    config = configuration(arguments.model, clips, images, arguments.ids)
    if "shards" in arguments.cases and not arguments.profile:
        config = with_shards(config, arguments.videos, arguments.image_shards)
    path = rows_of("step", provenance("cuda" if gpu else "cpu")["device"], arguments.out)
    finetune = finetuning_configuration(arguments.model, clips or default[0])
    benchmark = Benchmark(path, config, arguments.seconds, finetune)
    if arguments.profile:
        for name in arguments.providers if arguments.providers != parser.get_default("providers") else ["ours"]:
            folder = path.with_name(f"{path.stem}-profile") / re.sub(r"\W+", "-", name)
            try:
                print(f"{folder}: {benchmark.profile(name, arguments.tokenizer, folder)}")
            except UserError as error:  # graphs that cannot be captured
                print(f"{folder}: not measured: {error}")
        return
    for case in arguments.cases:
        benchmark.run(case, arguments.providers, arguments.tokenizer)
    print(f"rows: {path}\n\n{pages.step_goal_table(report.newest(report.load(path)))}\n")
    if benchmark.failed:
        raise SystemExit(f"failed: {'; '.join(benchmark.failed)}; the reasons are in the rows")
    report.write(path)
    print("page and plot are next to the rows")


if __name__ == "__main__":
    main()
