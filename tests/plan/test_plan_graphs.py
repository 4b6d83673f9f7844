"""The memory of CUDA graphs in a plan: by hand for one layer, and where a run has graphs."""

from dataclasses import replace

import torch
from torch import nn

from bevt_ds.config.recipes import finetune_demo, joint_swin_b, small
from bevt_ds.plan.graphs import graph_bytes
from bevt_ds.plan.planning import activations, canonical, chunk_bytes, memory_of
from bevt_ds.plan.targets import cost_of
from bevt_ds.runtime.tokenizer_graph import FRAMES


class OneLayer(nn.Module):
    """8 channels to 8, as an encoder."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Module()
        self.encoder.layers = nn.Linear(8, 8, bias=False)

    def forward(self, x):
        return self.encoder.replay("layer", lambda x: [self.encoder.layers(x)], (x,), self.encoder.layers)[0]


def test_graphs_keep_inputs_outputs_and_gradients():
    """x, its gradient, the output and its gradient: 4 x 8 numbers of 4 bytes; the weight's gradient: 8 x 8."""
    with torch.device("meta"):
        model, x = OneLayer(), torch.empty(4, 8, requires_grad=True)
    assert graph_bytes(model, x) == 4 * (4 * 4 * 8 + 8 * 8)


def graphs_of(config, switch="on", stage=2, world=1):
    """(bytes of graphs or None, peak) of the recipe with train.graphs=`switch`."""
    config = replace(config, train=replace(config.train, graphs=switch))
    memory = memory_of(config, {"zero_optimization": {"stage": stage}}, world, 1)
    return memory.parts.get("graphs"), memory.peak


def test_a_plan_counts_graphs_where_the_run_has_them():
    """The rule is the run's. They keep at least what the encoder keeps of a micro-batch for its backward pass."""
    for config in (small(), finetune_demo()):
        none, without = graphs_of(config, "off")
        kept, peak = graphs_of(config)
        stages = [size for part, size in activations(canonical(config)).saved.items() if part.startswith("stage")]
        assert none is None and kept > sum(stages) and peak == without + kept
        assert graphs_of(config, "auto")[0] == kept  # no DALL-E here, whose chunk would count
        assert graphs_of(config, "auto", world=2)[0] is None
        assert graphs_of(config, "on", world=2)[0] == kept
        assert graphs_of(config, "auto", stage=3)[0] is None


def test_a_plan_counts_a_chunk_of_the_tokenizers_graph():
    """Its activations of one frame, times the frames of a chunk; no other tokenizer has a graph."""
    config = joint_swin_b()
    assert config.tokenizer.name == "dalle"
    assert chunk_bytes(config) == FRAMES * cost_of(config).memory(0, 1)[1] > 0
    assert chunk_bytes(small()) == chunk_bytes(finetune_demo()) == 0
