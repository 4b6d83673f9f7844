"""`accelerate`: models of other libraries give the same outputs and gradients, on random weights.

Sizes are awkward on purpose: maps that are padded, windows wider than the map, shifts on one axis only.
"""

import copy

import pytest
import timm
import torch
from monai.networks.nets.swin_unetr import SwinTransformer as MonaiSwin
from timm.models.swin_transformer import SwinTransformer as TimmSwin
from torch import nn
from torchvision.models.swin_transformer import (
    PatchMergingV2,
    ShiftedWindowAttention,
    SwinTransformer,
    SwinTransformerBlockV2,
)
from torchvision.models.video.swin_transformer import SwinTransformer3d
from transformers import SwinConfig, SwinModel

from bevt_ds import kernels

SMALL = {"embed_dim": 32, "depths": [2, 2], "num_heads": [2, 4]}


def torchvision_swin(**options):
    return SwinTransformer([4, 4], **SMALL, window_size=[4, 4], num_classes=5, stochastic_depth_prob=0.4, **options)


def monai(axes):
    sizes = {"in_chans": 1, "window_size": (3,) * axes, "patch_size": (2,) * axes, "spatial_dims": axes}
    return MonaiSwin(embed_dim=16, depths=[2, 2, 2, 2], num_heads=[1, 2, 4, 8], drop_path_rate=0.4, **sizes)


MODELS = {  # -> model, shape of its input, how many attentions it has
    "torchvision": (torchvision_swin, (2, 3, 36, 28), 4),
    "torchvision-v2": (
        lambda: torchvision_swin(block=SwinTransformerBlockV2, downsample_layer=PatchMergingV2),
        (2, 3, 36, 28),
        4,
    ),
    "torchvision-3d": (
        lambda: SwinTransformer3d([2, 4, 4], **SMALL, window_size=[4, 4, 3], num_classes=5, stochastic_depth_prob=0.4),
        (2, 3, 6, 36, 28),
        4,
    ),
    "timm": (
        lambda: TimmSwin(
            img_size=(36, 28), **SMALL, window_size=4, num_classes=5, drop_path_rate=0.4, strict_img_size=False
        ),
        (2, 3, 36, 28),
        4,
    ),
    "hugging-face": (
        lambda: SwinModel(SwinConfig(image_size=36, **SMALL, window_size=4, drop_path_rate=0.4)),
        (2, 3, 36, 36),
        4,
    ),
    "monai-2d": (lambda: monai(2), (1, 1, 64, 48), 8),
    "monai-3d": (lambda: monai(3), (1, 1, 32, 32, 32), 8),
}


def tensor_of(out):
    """One tensor from what the libraries return."""
    out = getattr(out, "last_hidden_state", out)
    return torch.cat([x.flatten() for x in out]) if isinstance(out, list) else out


def outputs(model, x):
    """The output, and the gradients of its weighted sum with regard to the input and every parameter by name.

    Blocks that drop whole branches (drop path) drop the same ones in every call.
    """
    model.zero_grad()
    torch.manual_seed(1)
    x = x.clone().requires_grad_()
    out = tensor_of(model(x)).float() if x.dtype == torch.float32 else tensor_of(model(x))
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device=out.device).view_as(out)
    (out * weights).sum().backward()
    return {"output": out.detach(), "input": x.grad} | {
        name: p.grad for name, p in model.named_parameters() if p.grad is not None
    }


def randomised(name):
    """A model whose bias tables and norms are random too, for evaluation, and its input."""
    build, shape, attentions = MODELS[name]
    model = build().eval()
    for parameter in model.parameters():
        if parameter.ndim < 3:
            nn.init.normal_(parameter, std=0.2)
    return model, torch.randn(shape), attentions


@pytest.mark.parametrize("name", MODELS)
def test_accelerated_models_give_the_same_outputs_and_gradients(name):
    model, x, attentions = randomised(name)
    model, x = model.double(), x.double()
    plain = copy.deepcopy(model)
    report = kernels.accelerate(model, provider="torch")
    assert (len(report.replaced), report.left) == (attentions, {})
    state = model.state_dict()
    assert state.keys() == plain.state_dict().keys()
    assert all(torch.equal(state[key], value) for key, value in plain.state_dict().items())
    results = []
    for training in (True, False):
        plain.train(training), model.train(training)
        expected, actual = outputs(plain, x), outputs(model, x)
        assert expected.keys() == actual.keys() and len(actual) > 20
        for key, value in expected.items():
            bound = 1e-10 * value.abs().max().clamp_min(1e-6)
            assert (actual[key] - value).abs().max() <= bound, (key, training)
        results.append(actual["output"])
    assert not torch.equal(*results)  # in training branches were dropped


@pytest.mark.parametrize("name", MODELS)
def test_accelerated_models_under_autocast_are_as_exact_as_before(name, assert_as_exact):
    """Half-precision products around a float32 table; the backward pass runs outside autocast, as in training."""
    model, x, _ = randomised(name)
    fast, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    kernels.accelerate(fast, provider="torch")
    found = []
    for each in (fast, model, exact):
        with torch.autocast("cpu", torch.bfloat16, enabled=each is not exact):
            torch.manual_seed(1)
            out = tensor_of(each(x.to(next(each.parameters()).dtype)))
        out.double().square().sum().backward()
        table = next(p for n, p in each.named_parameters() if n.endswith(("bias_table", "cpb_mlp.0.weight")))
        found.append((out.detach().to(x.dtype if each is not exact else out.dtype), table.grad))
    assert_as_exact(*(out for out, _ in found), 3, "output")
    assert_as_exact(*(grad for _, grad in found), 3, "the bias table's gradient")


@pytest.mark.parametrize("name", ["torchvision-3d", "timm"])
def test_accelerated_block_is_one_graph_of_a_compiler(name):
    model, _, _ = randomised(name)
    report = kernels.accelerate(model, provider="torch")
    block = model.get_submodule(list(report.replaced)[1])  # shifted
    x = torch.randn(1, *(3,) * (name == "torchvision-3d"), 9, 7, 32)
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), block(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["torchvision-v2", "torchvision-3d", "hugging-face"])
def test_accelerated_attention_runs_the_kernels(name, device, assert_as_exact):
    """One replaced module of each way to make q, k and v, in the kernels' precision."""
    model, _, _ = randomised(name)
    names = iter(kernels.accelerate(copy.deepcopy(model), provider="triton").replaced)
    next(names)
    plain = model.get_submodule(next(names)).to(device)  # of a shifted block
    fast, exact = copy.deepcopy(plain), copy.deepcopy(plain).double()
    kernels.accelerate(fast, provider="triton")
    x = torch.randn(1, 54, 32) if name == "hugging-face" else torch.randn(1, *(2,) * (name[-2:] == "3d"), 9, 6, 32)
    size = ((9, 6),) if name == "hugging-face" else ()
    with torch.no_grad():
        found = [m(x.to(device, next(m.parameters()).dtype), *size) for m in (fast, plain, exact)]
    assert kernels.launch_counts()["window_attention_fwd_small_kernel"] == 1
    assert_as_exact(*(out[0] if size else out for out in found), 3, name)


def test_accelerated_timm_model_of_another_input_size_pads_after_the_roll():
    model = MODELS["timm"][0]().eval().double()
    model.set_input_size((44, 52))
    plain, x = copy.deepcopy(model), torch.randn(1, 3, 44, 52).double()
    kernels.accelerate(model)
    torch.testing.assert_close(model(x), plain(x), rtol=1e-10, atol=1e-10)


def test_accelerated_hugging_face_model_still_gives_attention_maps():
    model, x, _ = randomised("hugging-face")
    model.set_attn_implementation("eager")
    plain = copy.deepcopy(model)
    kernels.accelerate(model)
    expected, found = (m(x, output_attentions=True).attentions for m in (plain, model))
    assert len(expected) == len(found) > 0
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_accelerate_leaves_what_it_cannot_replace_and_says_why():
    model = nn.ModuleDict(
        {
            "drops": ShiftedWindowAttention(16, [4, 4], [0, 0], 1, attention_dropout=0.1),
            "narrow": ShiftedWindowAttention(16, [4, 4], [0, 0], 2),
            "wide windows": ShiftedWindowAttention(16, [40, 40], [0, 0], 1),
            "plain": nn.MultiheadAttention(16, 1),
            "version 2": timm.create_model("swinv2_cr_tiny_ns_224", img_size=64).stages[0].blocks[0].attn,
            "layer": nn.Linear(2, 2),
        }
    )
    report = kernels.accelerate(model)
    assert not report.replaced
    reasons = {
        "drops": "drops attention with probability 0.1",
        "narrow": "heads are 8 wide",
        "wide windows": "1600 tokens",
        "plain": "no replacement for torch.nn.modules.activation.MultiheadAttention",
        "version 2": "no replacement for timm.models.swin_transformer_v2_cr.WindowMultiHeadAttention",
    }
    assert report.left.keys() == reasons.keys()
    assert all(reason in report.left[name] for name, reason in reasons.items())
    assert all(f"left {name}: " in str(report) for name in reasons)


def test_accelerate_says_where_a_library_is_laid_out_otherwise():
    layer = MODELS["hugging-face"][0]().encoder.layers[0].blocks[0]
    del layer.attention.q_proj
    assert "another version of transformers.models.swin" in kernels.accelerate(layer).left[""]


def test_accelerating_twice_replaces_once():
    model = torchvision_swin()
    assert len(kernels.accelerate(model).replaced) == 4
    again = kernels.accelerate(model)
    assert not again.replaced and set(again.left.values()) == {"it runs the kernels already"}
