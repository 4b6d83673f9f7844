"""Blocks through torch.compile: the same numbers and names, and one graph for all blocks that are alike."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from bevt_ds.model.layers import Block
from bevt_ds.model.video_swin import VideoSwin, compile_blocks


@pytest.fixture(autouse=True)
def fresh_dynamo():
    """No graphs of other tests, and none left for them."""
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = limit


def test_compiled_blocks_are_the_same_model():
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
    assert counter.frame_count == 3, "plain and shifted blocks of the first stage, the block of the second"
    compiled_grads = dict(compiled.named_parameters())
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(compiled_grads[name].grad, parameter.grad, msg=name)


def test_the_switch_compiles_every_block(small_bevt):
    """And nothing else: names and state stay as they are."""
    plain, compiled = small_bevt(), small_bevt(compile=True)
    assert plain.state_dict().keys() == compiled.state_dict().keys()
    assert plain.arch == compiled.arch
    for module in compiled.modules():
        assert (module._compiled_call_impl is not None) == isinstance(module, Block)
