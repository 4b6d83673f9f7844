"""Layers that fuse more into an nn.Linear or an nn.LayerNorm are no kinds of them: tools that replace those by class
(LoRA, bitsandbytes, torchao) compute what the network computed."""

import pytest
import torch
from torch import nn

from bevt_ds.model.bevt import BEVT
from bevt_ds.model.classifier import VideoClassifier
from bevt_ds.model.layers import LinearGelu, LMHead, SumNorm, draw_parameters

ARCH = {"embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 4, 8), "window": (2, 2, 2)}


class Adapted(nn.Module):
    """As LoRA's layer: around the layer that it adapts, which it knows by nothing but its class."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, x):
        return nn.functional.linear(x, self.weight, self.bias)


def plain_norm(norm: nn.LayerNorm) -> nn.LayerNorm:
    """torch's own, with the weights and the eps of `norm`."""
    plain = nn.LayerNorm(norm.normalized_shape, eps=norm.eps)
    plain.load_state_dict(norm.state_dict())
    return plain


def replaced(model: nn.Module) -> list[str]:
    """Replace each nn.Linear and nn.LayerNorm by what its class says it is; their names."""
    names = []
    for path, parent in list(model.named_modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear | nn.LayerNorm):
                setattr(parent, name, (Adapted if isinstance(child, nn.Linear) else plain_norm)(child))
                names.append(f"{path}.{name}".lstrip("."))
    return names


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_replacing_layers_by_their_class_changes_no_output(norm):
    model = VideoClassifier(num_classes=5, norm=norm, **ARCH).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    clips = torch.randn(1, 3, 4, 64, 64)
    with torch.no_grad():
        before = model(clips)
        names = replaced(model)
        after = model(clips)
    kinds = {name.rsplit(".", 1)[-1] for name in names}
    assert {"qkv", "proj", "fc2", "reduction", "head"} <= kinds and "fc1" not in kinds
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)


def test_state_dict_and_seeded_values_are_those_of_a_linear_and_a_layer_norm():
    """So that checkpoints fit, and a seed gives the weights that it gave when these were their subclasses."""
    pairs = (
        (lambda: LinearGelu(6, 10, "auto"), lambda: nn.Linear(6, 10)),
        (lambda: LMHead(6, 10, "auto"), lambda: nn.Linear(6, 10)),
        (lambda: SumNorm(6, "auto"), lambda: nn.LayerNorm(6)),
    )
    for ours, theirs in pairs:
        states = []
        for make in (ours, theirs):
            torch.manual_seed(0)
            layer = make()
            constructed = {name: value.clone() for name, value in layer.state_dict().items()}
            draw_parameters(layer, torch.Generator().manual_seed(1))
            states.append((constructed, layer.state_dict(), torch.rand(1)))
        torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)


def test_a_head_over_tokens_is_no_linear_layer():
    """It gives losses where it gets targets."""
    model = BEVT(**ARCH, vocab_size=16)
    assert not isinstance(model.lm_head, nn.Linear)
    assert {"lm_head.weight", "lm_head.bias", "encoder.layers.0.blocks.0.mlp.fc1.bias"} <= model.state_dict().keys()
