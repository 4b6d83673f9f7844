"""CUDA graphs of the encoder, with a stand-in for what captures: memory that stays, fallbacks, the comparison."""

from types import SimpleNamespace

import pytest
import torch

from benchmarks.step_batch import resident_batch
from bevt_ds import BEVT
from bevt_ds.config.graphs import why_without_graphs
from bevt_ds.errors import UserError
from bevt_ds.model.tokenizers import RandomProjectionTokenizer, tokenize
from bevt_ds.runtime.graphs import WARM_UP, Captured, Graphs, make_graphs

SIZES = {"embed_dim": 32, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 4, 8), "window": (2, 2, 2), "vocab_size": 16}


class Stand:
    """Repeats what it "captured" by running it again into the same memory, as a graph does."""

    def __init__(self, spoil=0.0):
        self.captures, self.replays, self.spoil = 0, 0, spoil

    def warm_up(self, run):
        run()

    def capture(self, *runs):
        return [self._captured(run) for run in runs]

    def _captured(self, run):
        self.captures += 1
        result = run()

        def replay():
            self.replays += 1
            for own, new in zip(result, run(), strict=True):
                if own is not None:
                    own.copy_(new * (1 + self.spoil))

        return replay, result


class Refusing(Stand):
    """Nothing can be captured."""

    def capture(self, *runs):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")


def replayed_layer():
    """A layer, what captures it, its graphs, and a call of it that gives the sum of its outputs."""
    layer, stand = torch.nn.Linear(3, 3), Stand()
    graphs = Graphs("on", stand, lambda holds: holds, print)
    return layer, stand, graphs, lambda: graphs("layer", lambda x: [layer(x)], [torch.ones(2, 3)], layer)[0].sum()


def make_network():
    torch.manual_seed(0)
    return BEVT(**SIZES, drop_path=0.3, kernels="torch").train()


def batches(count, clips=2):
    """Batches of two clips and two images, with targets."""
    made = (resident_batch(clips, 2, 2, 64, seed) for seed in range(count))
    return [tokenize(RandomProjectionTokenizer(16), batch) for batch in made]


def train(model, data, optimizer, accumulate=2):
    """The losses, and the gradient of every step."""
    losses, gradients = [], []
    for first in range(0, len(data), accumulate):
        for batch in data[first : first + accumulate]:
            loss = model(batch).loss
            loss.backward()
            losses.append(loss.item())
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        optimizer.step()
        optimizer.zero_grad()
    return losses, gradients


def run(replay, data):
    """Train, "resume" from the weights in between, train on."""
    model = make_network()
    model.encoder.replay = replay
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    first = train(model, data[:6], optimizer)
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()})
    second = train(model, data[6:], torch.optim.AdamW(model.parameters(), lr=1e-2))
    return [a + b for a, b in zip(first, second, strict=True)]


def test_training_with_graphs_gives_the_bits_of_training_without():
    """Two streams that share the encoder, two micro-steps a step, drop path, weights loaded half-way."""
    data, stand, said = batches(10), Stand(), []
    losses, gradients = run(Graphs("auto", stand, lambda holds: holds, said.append), data)
    expected, expected_gradients = run(None, data)
    assert losses == expected
    for own, other in zip(gradients, expected_gradients, strict=True):
        assert len(own) == len(other) and all(map(torch.equal, own, other))
    replayed = len(data) - WARM_UP
    assert stand.captures == 4, "forward and backward of each stream"
    assert stand.replays == 4 * replayed + 4, "and once for the comparison"
    assert said == []


def test_gradients_of_parameters_do_not_lie_in_the_memory_of_the_graph():
    """The next micro-step overwrites that memory, while the sum of gradients must stay."""
    layer, _, graphs, call = replayed_layer()
    for _ in range(WARM_UP + 1):
        layer.zero_grad()
        call().backward()
    before = layer.weight.grad.clone()
    call().backward()
    call().backward()
    assert torch.equal(layer.weight.grad, 3 * before)
    (captured,) = graphs._captured.values()
    assert layer.weight.grad.data_ptr() not in [x.data_ptr() for x in captured.results if x is not None]


def test_each_shape_is_captured_on_its_own_and_an_odd_one_is_not():
    """A shape that comes seldom is run as written; evaluation always is."""
    model, stand = make_network(), Stand()
    model.encoder.replay = Graphs("auto", stand, lambda holds: holds, print)
    usual, odd = batches(1)[0], batches(1, clips=1)[0]
    for batch in [usual] * (WARM_UP + 1) + [odd] * WARM_UP:
        model(batch).loss.backward()
    assert stand.captures == 4
    replays = stand.replays
    model.eval()(usual)
    with torch.no_grad():
        model.train()(usual)
    assert stand.replays == replays
    model(odd).loss.backward()
    assert stand.captures == 6, "the clips' other shape; that of the images is there"


@pytest.mark.parametrize(
    ("stand", "agree", "reason"),
    [
        (Refusing(), True, "it cannot be captured (operation not permitted when stream is capturing)"),
        (Stand(spoil=1e-3), True, "its numbers are not those of the ordinary pass"),
        (Stand(spoil=float("nan")), True, "its numbers are not those of the ordinary pass"),
        (Stand(), False, "another rank cannot"),
    ],
    ids=["refused", "other numbers", "nan", "another rank"],
)
def test_what_cannot_be_relied_on_is_not_replayed(stand, agree, reason):
    """auto says so once and trains on, to the same bits; on is an error."""
    data, said = batches(4), []
    switched = make_network()
    switched.encoder.replay = Graphs("auto", stand, lambda holds: holds and agree, said.append)
    losses, _ = train(switched, data, torch.optim.AdamW(switched.parameters()))
    plain = make_network()
    assert losses == train(plain, data, torch.optim.AdamW(plain.parameters()))[0]
    assert len(said) == 1
    assert said[0].startswith("train.graphs=auto: the encoder (swin windows) is not replayed")
    assert reason in said[0]
    strict = make_network()
    strict.encoder.replay = Graphs("on", stand, lambda holds: holds and agree, print)
    with pytest.raises(UserError, match="train.graphs=on: the encoder"):
        train(strict, data, torch.optim.AdamW(strict.parameters()))


def test_parameters_that_have_moved_are_captured_again():
    layer, stand, _, call = replayed_layer()
    for _ in range(WARM_UP + 2):
        call().backward()
    assert stand.captures == 2
    layer.weight.data = layer.weight.data.clone() + 1
    assert call().item() == pytest.approx(layer(torch.ones(2, 3)).sum().item())
    assert stand.captures == 4


def test_backward_pass_of_an_earlier_forward_pass_is_an_error():
    """Its memory is taken: a gradient would be another batch's."""
    _, _, _, call = replayed_layer()
    for _ in range(WARM_UP + 1):
        call().backward()
    first, _ = call(), call()
    with pytest.raises(RuntimeError, match="an earlier forward pass"):
        first.backward()


def test_unused_parameters_and_outputs_have_no_gradient_or_zero():
    """As without graphs: None where autograd gives None."""
    used, unused = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
    both = torch.nn.ModuleList([used, unused])
    x = torch.ones(2, 3, requires_grad=True)
    captured = Captured(lambda x: [used(x), 2 * x], [x], list(both.parameters()), Stand())
    outputs, gradients = captured.passes([x.detach()], [torch.ones(2, 3), None])
    assert torch.equal(outputs[1], 2 * x)
    assert torch.allclose(gradients[0], used.weight.sum(0).expand(2, 3))
    assert gradients[3:] == [None, None]


def plain(**changes):
    """A run that may have graphs, but for the changes."""
    model = SimpleNamespace(compile=False, checkpointing=False)
    vars(model).update({name: changes.pop(name) for name in ("compile", "checkpointing") if name in changes})
    return {"switch": "auto", "model": model, "stage": 2, "device": "cuda", "world": 1} | changes


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"switch": "on", "world": 8}, None),
        ({"switch": "off"}, "train.graphs=off"),
        ({"device": "cpu"}, "a cpu has none"),
        ({"stage": 3}, "ZeRO stage 3"),
        ({"compile": True}, "model.compile"),
        ({"checkpointing": True}, "model.checkpointing"),
        ({"world": 2}, "2 ranks"),
    ],
)
def test_rules_by_which_a_run_has_no_graphs(changes, reason):
    found = why_without_graphs(**plain(**changes))
    assert found is None if reason is None else found.startswith(reason)


def test_graphs_on_where_there_can_be_none_is_refused():
    ranks = SimpleNamespace(device=torch.device("cpu"), world=1, is_main=True, all_hold=bool)
    config = SimpleNamespace(model=plain()["model"], train=SimpleNamespace(graphs="on"))
    with pytest.raises(UserError, match="train.graphs=on: a cpu has none. Use train.graphs=auto or off"):
        make_graphs(config, 2, ranks)
    config.train.graphs = "auto"
    assert make_graphs(config, 2, ranks) is None
