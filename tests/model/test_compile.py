"""torch.compile of blocks and tokenizers: the same values and names, one graph for all that is alike."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from benchmarks.step_batch import resident_batch
from bevt_ds import BEVT, Batch, create_model
from bevt_ds.model.layers import Block
from bevt_ds.model.tokenizers import DalleTokenizer, RandomProjectionTokenizer, tokenize
from bevt_ds.model.video_swin import VideoSwin, compile_blocks


@pytest.fixture(autouse=True)
def fresh_dynamo():
    """No graphs of other tests, and none left for them."""
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = limit


def test_compiled_blocks_compute_the_same():
    """Features and gradients with drop-path; the backend runs torch's own kernels, so only the tracing is tested."""
    torch.manual_seed(0)
    sizes = {"embed_dim": 32, "depths": (4, 1), "num_heads": (1, 2), "window": (2, 2, 2), "drop_path": 0.5}
    plain, compiled = VideoSwin(**sizes).double(), VideoSwin(**sizes).double()
    compiled.load_state_dict(plain.state_dict())
    counter = CompileCounterWithBackend("aot_eager")
    compile_blocks(compiled, backend=counter, fullgraph=True)
    clip, keys = torch.randn(2, 3, 4, 32, 32, dtype=torch.float64), torch.arange(2)
    results = [model(clip, keys) for model in (plain, compiled)]
    torch.testing.assert_close(*results)
    weights = torch.randn_like(results[0])
    for features in results:
        (features * weights).sum().backward()
    assert counter.frame_count == 4, "first, other plain and shifted blocks of the first stage, the block of the second"
    compiled_grads = dict(compiled.named_parameters())
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(compiled_grads[name].grad, parameter.grad, msg=name)


def test_compile_switch_compiles_every_block(small_bevt):
    """And nothing else: names and state stay as they are."""
    plain, compiled = small_bevt(), small_bevt(compile=True)
    assert plain.state_dict().keys() == compiled.state_dict().keys()
    assert plain.arch == compiled.arch
    for module in compiled.modules():
        assert (module._compiled_call_impl is not None) == isinstance(module, Block)


def small_tokenizers() -> list[nn.Module]:
    """Both kinds, for 16 ids; DALL-E's with weights as it draws them."""
    dalle, draw = DalleTokenizer(n_hid=8, vocab_size=16), torch.Generator().manual_seed(0)
    for weight in dalle.parameters():
        if weight.ndim == 4:
            nn.init.normal_(weight, std=weight[0].numel() ** -0.5, generator=draw)
    return [dalle, RandomProjectionTokenizer(16)]


@pytest.mark.parametrize("tokenizer", small_tokenizers(), ids=["dalle", "random_projection"])
def test_compiled_tokenizer_gives_the_same_ids(tokenizer):
    """The number of frames with a masked cell changes with every micro-batch: two graphs, the second for any number."""
    images = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    expected = [tokenizer.encode(images[:n]) for n in (6, 4, 5, 3)]
    counter = CompileCounterWithBackend("aot_eager")
    tokenizer.compile(backend=counter, fullgraph=True)
    assert all(tokenizer.encode(images[: len(ids)]).equal(ids) for ids in expected)
    assert counter.frame_count == 2


def loss_and_gradients(model: BEVT, batch: Batch) -> dict[str, Tensor]:
    loss = model(batch).loss
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.slow
@pytest.mark.timeout(2400)  # some hundred kernels of C++
def test_training_step_through_inductor():
    """What `model.compile` does to ids, loss and every gradient: errors are at most twice those of eager fp32."""
    batch = resident_batch(1, 2, 8, 128)
    for tokenizer in small_tokenizers():
        expected = tokenize(tokenizer, batch)
        tokenizer.compile()
        actual = tokenize(tokenizer, batch)
        assert actual.video.targets.equal(expected.video.targets)
        assert actual.image.targets.equal(expected.image.targets)
    make = partial(create_model, "tiny", depths=(1, 1, 1, 1), vocab_size=16, drop_path=0.1)
    plain, compiled, exact = make(), make(compile=True), make().double()
    for model in (compiled, exact):
        model.load_state_dict(plain.state_dict())
    eager, ours = (loss_and_gradients(model, actual) for model in (plain, compiled))
    for name, truth in loss_and_gradients(exact, actual.cast(torch.float64)).items():
        eager_error, our_error = ((result[name] - truth).norm() for result in (eager, ours))
        floor = 2**-20 * truth.norm()  # eight roundings of fp32
        assert our_error <= 2 * eager_error + floor, name
