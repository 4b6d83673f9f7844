"""The step benchmark's eager baseline: same loss and gradients as the model from the same weights."""

import pytest
import torch

from benchmarks.eager_model import EagerBEVT
from benchmarks.eager_tokenizer import every_id, plain_logits
from benchmarks.step_batch import resident_batch
from benchmarks.step_finetune import EagerClassifier
from bevt_ds import BEVT, VideoClassifier
from bevt_ds.model.tokenizers import DalleTokenizer, RandomProjectionTokenizer, tokenize

SIZES = {"embed_dim": 32, "depths": (1, 2, 2, 2), "num_heads": (1, 2, 4, 8), "window": (2, 2, 2), "vocab_size": 16}


def both_models() -> tuple[BEVT, EagerBEVT]:
    """Ours, with biases and bias tables that matter, and the baseline with its weights; both in float64."""
    torch.manual_seed(0)
    ours = BEVT(**SIZES).double()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    eager = EagerBEVT(ours.arch).double()
    eager.load_weights(ours.state_dict())
    return ours, eager


@pytest.mark.parametrize(("clips", "images"), [(2, 3), (0, 2), (2, 0)])
def test_eager_baseline_has_equal_loss_and_gradients(clips, images):
    """In float64 to its rounding, though the original masks with -100 where we leave pairs out: exp(-100) is 4e-44."""
    ours, eager = both_models()
    batch = resident_batch(clips, images, frames=4, size=64, seed=1).cast(torch.float64)
    tokenizer = RandomProjectionTokenizer(SIZES["vocab_size"])
    loss = ours(tokenize(tokenizer, batch)).loss
    expected = eager(batch, every_id(tokenizer, batch))
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)  # we sum cross-entropies in float32
    loss.backward()
    expected.backward()
    theirs = dict(eager.named_parameters())
    assert theirs.keys() == dict(ours.named_parameters()).keys()
    scale = max(p.grad.abs().max() for p in theirs.values() if p.grad is not None)
    for name, parameter in ours.named_parameters():
        if theirs[name].grad is None:
            assert parameter.grad is None or not parameter.grad.any(), name
        else:
            grad = theirs[name].grad.view_as(parameter)
            torch.testing.assert_close(parameter.grad, grad, rtol=1e-6, atol=1e-7 * scale, msg=name)


def test_eager_classifier_has_equal_logits_and_gradients():
    """In float64 to its rounding, as above."""
    torch.manual_seed(0)
    sizes = {name: value for name, value in SIZES.items() if name != "vocab_size"}
    ours = VideoClassifier(5, **sizes).double()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    eager = EagerClassifier(ours.arch).double()
    eager.load_weights(ours.state_dict())
    clips, weights = torch.randn(2, 3, 4, 64, 64, dtype=torch.float64), torch.randn(2, 5, dtype=torch.float64)
    logits, expected = ours(clips), eager(clips)
    torch.testing.assert_close(logits, expected, rtol=1e-6, atol=1e-8)
    for output in (logits, expected):
        (output * weights).sum().backward()
    theirs = dict(eager.named_parameters())
    scale = max(p.grad.abs().max() for p in theirs.values())
    for name, parameter in ours.named_parameters():
        grad = theirs[name].grad.view_as(parameter)
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-6, atol=1e-7 * scale, msg=name)


def test_eager_tokenizer_gives_the_same_logits():
    torch.manual_seed(0)
    tokenizer = DalleTokenizer(n_hid=4, vocab_size=32)
    for parameter in tokenizer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    frames = torch.rand(3, 3, 32, 32)
    expected = tokenizer.logits(frames)
    assert expected.std() > 0.1
    error = (plain_logits(tokenizer, frames) - expected).abs().max() / expected.abs().max()
    assert error < 64 * torch.finfo(torch.float32).eps  # sums of 36 products, in another order where the layout differs
