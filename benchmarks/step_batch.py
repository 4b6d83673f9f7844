"""The configuration of a benchmark's step, and batches of random images that stay on the device."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from bevt_ds.batch import Batch, Stream
from bevt_ds.config.recipes import demo, joint_swin_b
from bevt_ds.config.samples import DataConfig, MaskConfig
from bevt_ds.config.schema import Config
from bevt_ds.config.targets import TokenizerConfig
from bevt_ds.data.masks import masked_frames, row_index
from bevt_ds.data.plan import StreamId, StreamPlan
from bevt_ds.rng import sample_key


def base_configuration(model: str, clips: int, images: int, micro_batches: int = 1, ids: int | None = None) -> Config:
    """The demo's run for `tiny`, else joint_swin_b's with another backbone; a tokenizer that needs no file.

    clips, images: of a micro-batch. micro_batches: of a step, over all ranks. ids: size of the vocabulary, if not the
    recipe's: 64 for `tiny`, else 8192.
    """
    recipe = demo() if model == "tiny" else joint_swin_b()
    sizes = {"micro_clips": clips, "micro_images": images}
    sizes |= {"global_clips": clips * micro_batches, "global_images": images * micro_batches}
    tokenizer = TokenizerConfig(name="random_projection", vocab_size=ids or recipe.tokenizer.vocab_size)
    backbone, train = replace(recipe.model, name=model), replace(recipe.train, **sizes)
    return replace(recipe, model=backbone, tokenizer=tokenizer, train=train)


def resident_batch(
    clips: int, images: int, frames: int, size: int, seed: int = 0, mask: MaskConfig | None = None
) -> Batch:
    """A micro-batch that is a whole step: `clips` of `frames` x `size` x `size` pixels, and `images`."""
    data = DataConfig(frames=frames, size=size, token_size=size // 2, mask=mask or MaskConfig())
    draw = torch.Generator().manual_seed(seed)
    video = _stream(StreamId.VIDEO, data, clips, draw) if clips else None
    return Batch(video, _stream(StreamId.IMAGE, data, images, draw) if images else None)


def _stream(kind: StreamId, data: DataConfig, count: int, draw: torch.Generator) -> Stream:
    plan = StreamPlan(kind, [count], data, seed=0, global_size=count)
    masks, time = plan.masks(0), (data.frames,) if kind.kind == "video" else ()
    index, frames = row_index(masks, plan.frames_per_cell), masked_frames(masks, plan.frames_per_cell).sum()
    return Stream(
        pixels=torch.randn(count, 3, *time, data.size, data.size, generator=draw),
        view=torch.rand(frames, 3, data.token_size, data.token_size, generator=draw),
        mask=torch.from_numpy(masks.copy()),
        rows=torch.from_numpy(index.rows),
        cells=torch.from_numpy(index.cells),
        token_rows=torch.from_numpy(index.token_rows),
        sample_keys=torch.tensor([sample_key(plan.seed, plan.stream, 0, slot) for slot in range(count)]),
        count=int(masks.sum()) * plan.frames_per_cell,
    )


def all_frames(batch: Batch) -> Batch:
    """The same batch with a view of every frame, so that all are tokenized, and the same targets.

    A frame without a masked position, of which the loader makes no view, shows the one before it.
    """
    streams = (batch.video, batch.image)
    return Batch(*(None if s is None else replace(s, **_unskipped(s)) for s in streams))


def _unskipped(stream: Stream) -> dict[str, Tensor]:
    masked = stream.mask.flatten(-2).any(-1).flatten()
    frames_per_cell = stream.pixels[0, 0].shape[:-2].numel() // stream.mask[0].shape[:-2].numel()
    last = masked.repeat_interleave(frames_per_cell).cumsum(0).sub_(1).clamp_min_(0)
    return {"view": stream.view.index_select(0, last), "token_rows": stream.rows.clamp_min(0)}
