"""Images of predictions: decoded guesses in hidden cells, the reconstruction as the ceiling, no leak of the target."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from bevt_ds import Batch
from bevt_ds.batch import denormalised
from bevt_ds.eval.visualize import CEILING, GUESS, HIDDEN, SEEN, draw, predict, stream_panels
from bevt_ds.model.tokenizers import RandomProjectionTokenizer, tokenize


class Grey:
    """Ids are levels of brightness: 0 to 15."""

    vocab_size = 16

    def encode(self, frames):
        return (F.avg_pool2d(frames.mean(1), 8) * 15.99).long()

    def decode(self, ids):
        return (ids / 15.0)[:, None].expand(-1, 3, -1, -1).repeat_interleave(8, -1).repeat_interleave(8, -2)


@pytest.fixture
def clips(make_stream):
    """One clip of 4 frames whose last two have hidden cells, with the tokenizer's view; `other`: what hides there."""

    def build(other: bool = False):
        draw = torch.Generator().manual_seed(0)
        mask = torch.zeros(1, 2, 4, 4, dtype=torch.bool)
        mask[0, 1, 1:3, 0:3] = True
        pixels, view = torch.randn(1, 3, 4, 64, 64, generator=draw), torch.rand(1, 4, 3, 32, 32, generator=draw)
        cells = mask.repeat_interleave(2, 1)[:, None].repeat_interleave(16, -1).repeat_interleave(16, -2)
        if other:
            pixels, view = torch.where(cells, -pixels, pixels), 1 - view
        return make_stream(pixels, mask, view=view), cells[0, 0].numpy()

    return build


def test_hidden_cells_show_the_decoded_guess_and_the_others_the_input(clips):
    stream, cells = clips()
    tokenizer = Grey()
    stream = tokenize(tokenizer, Batch(stream, None)).video
    guess = torch.arange(64).remainder(16)
    panels = stream_panels("video", stream, guess, 1, tokenizer)
    decoded = tokenizer.decode(guess.view(4, 4, 4)).repeat_interleave(2, -1).repeat_interleave(2, -2)
    for t, panel in enumerate(panels):
        seen = denormalised(stream.pixels[0])[t]
        expected = np.where(cells[t][..., None], decoded[t].movedim(0, -1).numpy(), seen)
        np.testing.assert_allclose(panel.views[GUESS], expected, atol=1e-6)
    assert all((p.views[CEILING] == HIDDEN).all() for p in panels[:2]), "nothing hidden, no view"
    for t, panel in enumerate(panels[2:]):
        own = tokenizer.decode(tokenizer.encode(stream.view[t : t + 1]))[0].movedim(0, -1)
        ceiling = own.repeat_interleave(2, 0).repeat_interleave(2, 1).numpy()
        np.testing.assert_array_equal(panel.views[CEILING], ceiling)


def test_nothing_of_what_is_hidden_enters_the_guess(clips, small_bevt):
    """Other content in the hidden cells: the same guesses are shown; reconstruction and verdict are not the same."""
    engine = SimpleNamespace(module=small_bevt().eval())
    shown = []
    for other in (False, True):
        stream = tokenize(Grey(), Batch(clips(other)[0], None)).video
        with torch.no_grad():
            shown.append(stream_panels("video", stream, predict(engine, stream, 16), 1, Grey()))
    for one, two, hidden in zip(*shown, clips()[1], strict=True):
        np.testing.assert_array_equal(one.views[GUESS], two.views[GUESS])
        assert (one.views[SEEN] != two.views[SEEN]).any() == hidden.any()
    assert (shown[0][3].views[CEILING] != shown[1][3].views[CEILING]).any()


def test_guess_is_an_id_of_the_tokenizer_even_if_the_head_has_more(clips, small_bevt):
    model = small_bevt(vocab_size=24).eval()
    torch.nn.init.constant_(model.lm_head.bias[20:], 99.0)
    with torch.no_grad():
        assert predict(SimpleNamespace(module=model), clips()[0], 16).max() < 16


@pytest.mark.parametrize("tokenizer", [Grey(), RandomProjectionTokenizer(16)])
def test_image_has_two_rows_more_where_the_tokenizer_decodes(tokenizer, clips, small_bevt, tmp_path):
    ranks = SimpleNamespace(is_main=True)
    engine = SimpleNamespace(ranks=ranks, module=small_bevt().eval(), evaluating=torch.no_grad, dtype=torch.float32)
    draw(engine, tokenize(tokenizer, Batch(clips()[0], None)), tmp_path / "samples.png", tokenizer)
    rows = round(Image.open(tmp_path / "samples.png").height / 180)
    assert rows == (5 if isinstance(tokenizer, Grey) else 3)
