"""`bevt tokens`: the ids of all crops of a run's shards, made once, by what makes a run's batches and targets.

Nothing is said from rank to rank: rank r of n takes every n-th of the shards whose file is missing. A file is written
whole or not at all, so that one that is there is never made again.
"""

from __future__ import annotations

import glob
import os
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import bevt_ds
from bevt_ds.batch import DTYPES, Batch
from bevt_ds.config.command_line import parse_arguments, run
from bevt_ds.config.help import page
from bevt_ds.config.parse import apply_overrides
from bevt_ds.config.recipes import PRETRAINING, get_recipe, recipe_for
from bevt_ds.config.schema import Config
from bevt_ds.config.validate import require_inputs, validate
from bevt_ds.data.ledger import StageTimes
from bevt_ds.data.limits import BadSample, DecoderFailed
from bevt_ds.data.loader import fingerprint_of
from bevt_ds.data.open_stream import Source, decoder_of, open_reader, open_resources
from bevt_ds.data.plan import PlanEntry, SampleOrder, StreamId, StreamPlan
from bevt_ds.data.reading.members import Member, Shard
from bevt_ds.data.reading.remote import redacted
from bevt_ds.data.stream import PendingBatch, Resources, StreamReader
from bevt_ds.data.tokens import Contract, contract_of, open_all, place_of, require_own_names, shape_of, write_ids
from bevt_ds.data.view_reader import Reasons
from bevt_ds.disk import make_folder, writing
from bevt_ds.errors import UserError
from bevt_ds.exit_codes import FOUND_FAULTS
from bevt_ds.model.tokenizers import Tokenizer, tokenize
from bevt_ds.progress import progress_bar
from bevt_ds.runtime.distributed import Ranks, ranks_of
from bevt_ds.shards.synthetic.draw import draw_what_is_read
from bevt_ds.train.targets import open_targets

USAGE = """\
usage: bevt tokens [recipe=NAME] [key=value ...] data.crops=K tokens=DIR

The tokenizer's ids of K crops of each sample, in a file of DIR for each shard. Give the words of the pretraining that
is to read them, which then makes no ids. The same command continues a stopped one.

  bevt tokens recipe=joint_swin_b 'data.videos=k400-{000000..000099}.tar' 'data.images=in1k-{000000..000127}.tar' \\
      tokenizer.weights=encoder.pkl data.crops=4 tokens=ids
  torchrun --nproc-per-node 8 -m bevt_ds.train.tokens recipe=joint_swin_b 'data.videos=k400-{000000..000099}.tar' \\
      'data.images=in1k-{000000..000127}.tar' tokenizer.weights=encoder.pkl data.crops=4 tokens=ids
      one process a GPU; each takes shards of its own
"""


def main(argv: Sequence[str]) -> int:
    """The whole command; returns the exit code."""
    arguments = parse_arguments(argv, default_recipe="demo", default_json="zero2")
    if arguments.wants_help:
        print(page(USAGE, PRETRAINING, get_recipe(arguments.recipe, Config)))
        return 0
    given = arguments.given(Config)
    config = validate(apply_overrides(recipe_for(arguments.recipe, Config, given), given))
    if not config.tokens or config.target != "ids":
        raise UserError("bevt tokens needs data.crops=K, how many crops a sample has, and tokens=DIR, where they go.")
    require_inputs(config)
    draw_what_is_read(config)
    return make_tokens(config)


def make_tokens(config: Config) -> int:
    """Write what is missing of this rank's files; returns the exit code.

    Raises:
        UserError: shards or a tokenizer that cannot be used, or a file that is there and is not this run's.
    """
    ranks = ranks_of(os.environ)
    make_folder(Path(config.tokens))
    tokenizer = open_targets(config, ranks.device, DTYPES[config.train.precision]).tokenizer
    streams = {
        StreamId.VIDEO: (config.data.videos, config.train.global_clips, config.train.micro_clips),
        StreamId.IMAGE: (config.data.images, config.train.global_images, config.train.micro_images),
    }
    left = [
        make_stream(Source(stream, shards, micro, micro), config, ranks, tokenizer)
        for stream, (shards, used, micro) in streams.items()
        if used
    ]
    return FOUND_FAULTS if any(left) and ranks.world == 1 else 0  # torchrun would end the other ranks with this one


def make_stream(source: Source, config: Config, ranks: Ranks, tokenizer: Tokenizer) -> int:
    """The files of one kind. Returns how many of this rank's were not written."""
    kind, folder, unwritten, unreadable = source.stream.kind, config.tokens, 0, 0
    contract = contract_of(config, kind)
    with ExitStack() as resources:
        shared = open_resources(config.data, kind == "video", StageTimes(), resources, ranks.device)
        shards = shared.storage.shards(source.shards, kind)
        require_own_names(folder, [shard.path for shard in shards], kind)
        own, there = shards[ranks.rank :: ranks.world], lambda shard: place_of(folder, shard.path, kind).exists()
        missing = [shard for shard in own if not there(shard)]
        open_all(shared.storage, folder, [shard for shard in own if there(shard)], kind, contract)
        for found in made(missing, source, config, ranks, tokenizer, shared) if missing else ():
            unreadable += 0 if found.transient else len({row for row, _ in found.unreadable})
            unwritten += bool(found.transient)
            write(found, place_of(folder, found.shard.path, kind), contract, ranks)
    print(closing_line(kind, ranks, len(missing) - unwritten, unreadable, list(map(there, shards))), flush=True)
    if all(map(there, shards)):  # what a command that was killed had begun
        for shard in shards:
            place = place_of(folder, shard.path, kind)
            for path in place.parent.glob(f".{glob.escape(place.name)}.*"):
                path.unlink(missing_ok=True)
    return unwritten


def write(found: Made, path: Path, contract: Contract, ranks: Ranks) -> None:
    """Write a shard's file, unless another try may have what is missing of it."""
    if found.transient:
        print(f"{redacted(found.shard.path)}: not written, {found.transient}: run the command again", flush=True)
        return
    versions = {"bevt_ds": bevt_ds.__version__, "torch": torch.__version__, "device": ranks.device.type}
    with writing(path):
        write_ids(path, found.shard, found.ids, found.unreadable, contract, versions)


def closing_line(kind: str, ranks: Ranks, written: int, unreadable: int, there: Sequence[bool]) -> str:
    """What this rank did for a kind, and whether all files are there now."""
    who = f"rank {ranks.rank}: " if ranks.world > 1 else ""
    lost = f"; {unreadable} samples cannot be read, `unreadable` of a file's metadata says why" if unreadable else ""
    return f"{who}{kind}s: wrote {written} files{lost}; {sum(there)} of {len(there)} are there"


class FirstReasons(Reasons):
    """Reasons, and in `passing` the places (step, slot) whose reason may be gone at another try."""

    def __init__(self, stream: StreamId) -> None:
        super().__init__(stream)
        self.passing: set[tuple[int, int]] = set()

    def reject(self, entry: PlanEntry, member: Member, bad: BadSample, substitute: Member | None = None) -> None:
        """As Ledger's."""
        if bad.transient and not isinstance(bad, DecoderFailed) and not entry.attempt:
            self.passing.add((entry.step, entry.slot))
        super().reject(entry, member, bad, substitute)


@dataclass
class Made:
    """The ids of a shard's samples. transient: what kept a crop from being read, and may not come back."""

    shard: Shard
    ids: np.ndarray  # uint16 or int32 (N,K,T,h,w); 0 where there are none
    unreadable: dict[tuple[int, int], str]  # (sample, crop) -> why there are none
    transient: str = ""

    def note(self, planned: PlanEntry, own: PlanEntry, ids: np.ndarray, ledger: FirstReasons) -> None:
        """Take up a crop that was planned, unless `own` stands in for it."""
        place, first = (planned.member, planned.crop_number), planned.slot
        if not own.attempt:
            self.ids[place] = ids
            return
        while (planned.step, first) not in ledger.reasons:  # the first of its group has the reason
            first -= 1
        reason = self.unreadable[place] = ledger.reasons[planned.step, first]
        if (planned.step, first) in ledger.passing:
            self.transient = f"sample {self.shard.keys[planned.member]!r}: {reason}"


class ShardsInTurn(SampleOrder):
    """The shards as they are listed, each a window of its own."""

    def window_at(self, position: int) -> tuple[int, int]:
        """As SampleOrder's; there is one epoch."""
        return 0, int(np.searchsorted(np.cumsum(self.counts), position, side="right"))

    def shards_in(self, epoch: int, window: int) -> list[int]:
        """As SampleOrder's: a shard, and the next if there is one."""
        return list(range(window, min(window + 2, len(self.counts))))


class EveryCrop(StreamPlan):
    """Every crop of every sample once, in the order of the shards, all of it masked. A step is a micro-batch."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        """As StreamPlan's."""
        super().__init__(*arguments, **named)
        self.order = ShardsInTurn(self.order.counts, self.seed, self.stream, window=1)

    def window_at(self, step: int) -> tuple[int, int]:
        """As StreamPlan's."""
        return self.order.window_at(step * self.global_size // self.config.crops)

    def entry(self, step: int, slot: int, attempt: int = 0) -> PlanEntry:
        """As StreamPlan's."""
        sample, crop = divmod(step * self.global_size + slot, self.config.crops)
        _, shard = self.order.window_at(sample)
        member = sample - int(self.order.counts[:shard].sum())
        if attempt:
            shard, member = self.order.substitute(step, slot - slot % self.clips_per_sample, attempt)
        return PlanEntry(step, slot, attempt, shard, member, *self.fixed_crop(shard, member, crop))

    def steps(self) -> list[range]:
        """The slots of each step; the last may have fewer."""
        crops = self.order.total * self.config.crops
        return [range(min(self.global_size, crops - first)) for first in range(0, crops, self.global_size)]

    def _masks(self, step: int) -> np.ndarray:
        frames = (self.config.frames // self.frames_per_cell,) if self.kind == "video" else ()
        return np.ones((self.global_size, *frames, *self.grid), dtype=bool)


def made(
    shards: Sequence[Shard], source: Source, config: Config, ranks: Ranks, tokenizer: Tokenizer, shared: Resources
) -> Iterator[Made]:
    """The ids of each shard in turn, with a progress bar on rank 0."""
    kind, ledger, device = source.stream.kind, FirstReasons(source.stream), ranks.device
    decoder = decoder_of(source, shards, config, shared, device, fingerprint_of({source.stream: shards}))
    reader = open_reader(source, shards, config, shared, device, decoder, ledger, make_plan=EveryCrop)
    steps, shape = reader.plan.steps(), shape_of(contract_of(config, kind))
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.int32
    who = f"{kind}s, rank 0 of {ranks.world}" if ranks.world > 1 else f"{kind}s"
    options = {"desc": who, "total": len(steps), "unit": "batch", "leave": None, "disable": not ranks.is_main}
    now: Made | None = None
    for pending in progress_bar(ahead(reader, steps, config.data.prefetch), **options):
        for own, ids in zip(pending.entries, encoded(reader, pending, tokenizer, device), strict=True):
            planned = reader.plan.entry(own.step, own.slot)
            shard = shards[planned.shard]
            now = now or Made(shard, np.zeros((len(shard), *shape), dtype), {})
            now.note(planned, own, ids, ledger)
            if (planned.member, planned.crop_number) == (len(shard) - 1, shape[0] - 1):
                yield now
                now = None


def ahead(reader: StreamReader, steps: Sequence[range], prefetch: int) -> Iterator[PendingBatch]:
    """The micro-batches in order, so many of them begun ahead."""
    under_way: deque[PendingBatch] = deque()
    for step, slots in enumerate(steps):
        under_way.append(reader.begin(step, slots))
        if len(under_way) > prefetch:
            yield under_way.popleft()
    yield from under_way


def encoded(reader: StreamReader, pending: PendingBatch, tokenizer: Tokenizer, device: torch.device) -> np.ndarray:
    """The ids of a micro-batch, as training makes them: int64 (B,T,h,w). UserError: they are not in the vocabulary."""
    stream = tokenize(tokenizer, Batch(reader.finish(pending).to(device), None)).video
    masked, grid = stream.rows >= 0, stream.mask.shape[-2:]
    ids = torch.empty(int(masked.sum()), dtype=torch.int64, device=device)
    ids[stream.rows[masked]] = stream.targets[masked]
    if ids.min() < 0 or ids.max() >= tokenizer.vocab_size:
        raise UserError(f"the tokenizer gives ids outside of its vocabulary of {tokenizer.vocab_size:,}.")
    return ids.view(len(stream.mask), -1, *grid).cpu().numpy()


if __name__ == "__main__":
    run(main)
