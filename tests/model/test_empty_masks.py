"""Batches without a masked position, and targets outside the head's vocabulary."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from bevt_ds import Batch, UserError
from bevt_ds.eval.held_out import as_json, as_table, evaluate, shortfall
from bevt_ds.eval.visualize import draw
from bevt_ds.model.tokenizers import require_vocabulary, tokenize
from bevt_ds.model.tokenizers.dalle import DalleTokenizer
from bevt_ds.model.tokenizers.random_projection import RandomProjectionTokenizer
from bevt_ds.runtime.logging import StepSums, require_known_targets, step_metrics


@pytest.fixture
def unmasked(make_stream):
    """Builds a batch of these streams that masks nothing and whose targets are not filled."""

    def build(*streams: str) -> Batch:
        clip_mask, image_mask = (torch.zeros(n, 4, 4, dtype=torch.bool) for n in (4, 3))
        frames, views = torch.rand(2, 4, 3, 32, 32), torch.rand(3, 3, 32, 32)
        clips = make_stream(torch.randn(2, 3, 4, 64, 64), clip_mask.view(2, 2, 4, 4), view=frames, pad=0)
        images = make_stream(torch.randn(3, 3, 64, 64), image_mask, view=views, pad=0)
        return Batch(clips if "video" in streams else None, images if "image" in streams else None)

    return build


@pytest.fixture
def engine_of():
    """What evaluation needs of an engine, around a model on the CPU."""

    def wrap(model):
        ranks = SimpleNamespace(device=torch.device("cpu"), is_main=True)
        return SimpleNamespace(ranks=ranks, module=model, forward=model, evaluating=nullcontext, dtype=torch.float32)

    return wrap


@pytest.mark.parametrize("streams", [("video", "image"), ("video",), ("image",)])
def test_stream_without_masked_positions_has_loss_0_and_no_metrics(streams, small_bevt, unmasked):
    model = small_bevt(vocab_size=8)
    batch = tokenize(RandomProjectionTokenizer(8), unmasked(*streams))
    out = model(batch)
    out.loss.backward()
    assert out.loss == 0
    assert not any(p.grad is not None and p.grad.any() for p in model.parameters())
    assert step_metrics({name: float(value) for name, value in out.metrics.items()}) == {"loss": 0.0}


def test_other_stream_is_trained_as_if_alone(small_bevt, unmasked, small_batch):
    model = small_bevt()
    empty = tokenize(RandomProjectionTokenizer(16), unmasked("video"))
    both, alone = model(replace(small_batch, video=empty.video)), model(replace(small_batch, video=None))
    torch.testing.assert_close(both.loss, alone.loss)
    totals = {name: float(value) for name, value in both.metrics.items()}
    assert set(step_metrics(totals)) == {"loss", "loss_image", "acc_image"}


def test_tokenizers_accept_a_batch_without_a_masked_frame(unmasked):
    for tokenizer in (RandomProjectionTokenizer(16), DalleTokenizer(n_hid=8, vocab_size=16)):
        batch = tokenize(tokenizer, unmasked("video", "image"))
        assert batch.video.targets.tolist() == []
        assert batch.image.targets.tolist() == []


def test_held_out_summary_and_samples_without_masked_positions(small_bevt, unmasked, engine_of, tmp_path):
    engine, tokenizer = engine_of(small_bevt().eval()), RandomProjectionTokenizer(16)
    batch = unmasked("video", "image")
    summaries = evaluate(engine, tokenizer, [batch])
    assert summaries == {}
    assert as_json(summaries) == {}
    assert as_table(summaries, {}).count("\n") == 0
    assert shortfall(summaries, 0.0, {}) is None
    assert "no masked position was held out" in shortfall(summaries, 0.1, {})
    draw(engine, tokenize(tokenizer, batch), tmp_path / "samples.png", tokenizer)
    assert Image.open(tmp_path / "samples.png").width > 100


# Targets outside the vocabulary


class Wrong(RandomProjectionTokenizer):
    """A tokenizer that promises 16 ids and gives others too."""

    def encode(self, frames):
        return super().encode(frames).index_fill(0, torch.tensor([0]), 99)


def test_unknown_targets_are_counted_and_leave_the_weights_alone(small_bevt, small_batch):
    model = small_bevt()
    image = small_batch.image
    first, ignored = (replace(image, targets=image.targets.index_fill(0, torch.tensor([1]), t)) for t in (16, -100))
    gradients = []
    for stream in (first, ignored):
        model.zero_grad()
        out = model(Batch(None, stream))
        out.loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
        assert out.metrics["unknown_targets"] == (stream is first)
        assert out.loss.isnan() == (stream is first)
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_unknown_targets_of_a_step_without_a_log_line_reach_the_next_line():
    ranks = SimpleNamespace(sum=lambda values: values)
    sums = StepSums()
    sums.add({"unknown_targets": torch.tensor(3), "loss_video": torch.tensor(float("nan"))})
    after = StepSums(sums)
    after.add({"unknown_targets": torch.tensor(0), "loss_video": torch.tensor(2.0)})
    totals = after.totals(ranks)
    assert totals == {"unknown_targets": 3, "loss_video": 2}
    with pytest.raises(UserError, match="3 targets of step 7 are outside the head's vocabulary of 8,192 ids"):
        require_known_targets(totals, 8192, "of step 7")
    require_known_targets({"unknown_targets": 0}, 8192, "of step 7")


def test_held_out_targets_outside_the_vocabulary_are_an_error(small_bevt, make_stream, engine_of):
    mask = torch.ones(1, 4, 4, dtype=torch.bool)
    batch = Batch(None, make_stream(torch.randn(1, 3, 64, 64), mask, view=torch.rand(1, 3, 32, 32)))
    with pytest.raises(UserError, match="16 targets of the held-out shards are outside"):
        evaluate(engine_of(small_bevt().eval()), Wrong(16), [batch])


def test_tokenizer_with_more_ids_than_the_head_is_refused():
    require_vocabulary(RandomProjectionTokenizer(16), 16)
    with pytest.raises(UserError, match="the tokenizer has 17 ids, the model's head 16"):
        require_vocabulary(RandomProjectionTokenizer(17), 16)
