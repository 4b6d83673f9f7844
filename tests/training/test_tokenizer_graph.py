"""The tokenizer as a graph, with a stand-in for the capture: chunks, the comparison, fallbacks."""

import weakref
from types import SimpleNamespace

import pytest
import torch

from benchmarks.step_batch import resident_batch
from bevt_ds.batch import Batch
from bevt_ds.errors import UserError
from bevt_ds.model.tokenizers import DalleTokenizer, RandomProjectionTokenizer, tokenize
from bevt_ds.runtime.tokenizer_graph import FRAMES, SETTLED, ReplayedTokenizer
from bevt_ds.train.pretraining import replay_tokenizer
from bevt_ds.train.targets import IdTargets
from tests.training.test_graphs import Refusing, Stand


class Ids(Stand):
    """Of one pass alone, whose result is one tensor. `others`: how many ids of a replay are others."""

    def __init__(self, others=0):
        super().__init__()
        self.others, self.held = others, []

    def _captured(self, run):
        self.captures += 1
        ids = run()

        def replay():
            self.replays += 1
            ids.copy_(run())
            ids.view(-1)[: self.others] += 1

        self.held += [weakref.ref(replay), weakref.ref(ids)]
        return replay, ids


def make_tokenizer() -> DalleTokenizer:
    tokenizer, draw = DalleTokenizer(n_hid=4, vocab_size=32), torch.Generator().manual_seed(0)
    for parameter in tokenizer.parameters():
        torch.nn.init.normal_(parameter, std=0.5, generator=draw)
    return tokenizer


def frames(count: int, side: int = 16, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def warmed(tokenizer, stand, switch="on", said=None, agree=bool) -> ReplayedTokenizer:
    """After the micro-steps in which it captures, and all ranks agree."""
    say = (said if said is not None else []).append
    replayed = ReplayedTokenizer(tokenizer, switch, stand, agree, say)
    for seed in range(SETTLED):
        replayed.encode(frames(5, seed=seed))
        replayed.after_micro_step()
    return replayed


def test_replayed_ids_are_those_of_the_tokenizer_for_any_number_of_frames():
    """One shape is captured; the last chunk is filled up, whatever the one before it held."""
    tokenizer, stand = make_tokenizer(), Ids()
    replayed = warmed(tokenizer, stand)
    assert (replayed.vocab_size, stand.captures, stand.replays) == (32, 1, 1), "captured and compared"
    for count in (1, FRAMES - 1, FRAMES, FRAMES + 1, 2 * FRAMES + 3):
        given, before = frames(count, seed=count), stand.replays
        ids = replayed.encode(given)
        assert ids.equal(tokenizer.encode(given)) and len(ids.unique()) > 1
        assert stand.replays - before == -(-count // FRAMES)
    kept = replayed.encode(frames(3))
    replayed.encode(frames(3, seed=9))
    assert kept.equal(tokenizer.encode(frames(3))), "later frames do not overwrite ids that were given out"


def test_frames_of_another_size_are_tokenized_as_written():
    tokenizer, stand = make_tokenizer(), Ids()
    replayed = warmed(tokenizer, stand)
    before = stand.replays
    assert replayed.encode(frames(2, side=24)).equal(tokenizer.encode(frames(2, side=24)))
    assert stand.replays == before
    with pytest.raises(UserError):
        replayed.encode(frames(2)[:, :2])


def test_a_run_has_the_graph_of_dalle_where_its_encoder_has_graphs():
    """Of kept ids nothing is encoded, so there would be nothing to capture, which `on` takes for an error."""
    ranks = SimpleNamespace(is_main=True, all_hold=bool)
    for replay, tokenizer, tokens, expected in (
        (print, make_tokenizer(), "", True),
        (None, make_tokenizer(), "", False),
        (print, RandomProjectionTokenizer(32), "", False),
        (print, make_tokenizer(), "ids", False),
    ):
        config = SimpleNamespace(train=SimpleNamespace(graphs="on"), tokens=tokens)
        engine = SimpleNamespace(ranks=ranks, module=SimpleNamespace(encoder=SimpleNamespace(replay=replay)))
        targets = IdTargets(tokenizer)
        replay_tokenizer(targets, engine, config)
        assert isinstance(targets.encoder, ReplayedTokenizer) == expected
        assert targets.tokenizer is tokenizer, "held-out samples are measured as ever"


@pytest.mark.parametrize(
    ("stand", "reason"),
    [(Refusing(), "it cannot be captured"), (Ids(others=3), "15.0% of its ids are others")],
    ids=["refused", "other ids"],
)
def test_a_graph_that_cannot_be_relied_on_is_not_replayed(stand, reason):
    """5 frames of 2x2 ids: 3 of 20 are 15 %. auto says so once and goes on; on is an error."""
    tokenizer, said = make_tokenizer(), []
    replayed = warmed(tokenizer, stand, "auto", said)
    assert len(said) == 1 and reason in said[0] and "without a graph" in said[0]
    assert replayed.encode(frames(4)).equal(tokenizer.encode(frames(4)))
    assert len(said) == 1
    with pytest.raises(UserError, match="train.graphs=on: the tokenizer is not replayed"):
        warmed(tokenizer, stand)


def test_a_graph_that_gives_other_ids_is_not_kept():
    """What holds a graph holds the memory of 16 frames on their way through the encoder."""
    good, bad = Ids(), Ids(others=3)
    kept, back = warmed(make_tokenizer(), good), warmed(make_tokenizer(), bad, "auto")
    assert [all(ref() is not None for ref in good.held), any(ref() is not None for ref in bad.held)] == [True, False]
    assert kept.encode(frames(4)).equal(back.encode(frames(4)))
    assert (good.captures, bad.captures) == (1, 1), "nor is another one made"


def test_all_ranks_replay_or_none_does(monkeypatch, capsys):
    """Rank 0 has a graph and rank 1 none: asked once, after the same micro-step, though rank 1 encoded in fewer."""
    batch, unmasked, asked = resident_batch(1, 1, 2, 32), Batch(None, None), []
    tokenizer = make_tokenizer()
    for switch in ("auto", "on"):
        for rank, stand in enumerate((Ids(), Refusing())):
            monkeypatch.setattr("bevt_ds.train.pretraining.CudaBackend", lambda stand=stand: stand)
            ranks = SimpleNamespace(is_main=rank == 0, all_hold=lambda holds: asked.append(holds) or False)
            engine = SimpleNamespace(ranks=ranks, module=SimpleNamespace(encoder=SimpleNamespace(replay=print)))
            targets = IdTargets(tokenizer)
            replay_tokenizer(targets, engine, SimpleNamespace(train=SimpleNamespace(graphs=switch), tokens=""))
            for step in range(SETTLED - 1):
                targets.fill(unmasked if rank == 1 and step == 0 else batch)
            assert len(asked) == rank and stand.replays == (rank == 0), "of the comparison"
            if switch == "on":
                with pytest.raises(UserError, match="another rank cannot|it cannot be captured"):
                    targets.fill(batch)
                continue
            for _ in range(3):
                assert targets.fill(batch).image.targets.equal(tokenize(tokenizer, batch).image.targets)
            assert stand.replays == (rank == 0)
        assert asked == [True, False]
        asked.clear()
    (line,) = capsys.readouterr().out.splitlines()
    assert line == "train.graphs=auto: the tokenizer is not replayed, another rank cannot: it goes on without a graph."


def test_where_nothing_is_encoded_there_is_no_graph():
    said = []
    replayed = ReplayedTokenizer(make_tokenizer(), "auto", Ids(), bool, said.append)
    for _ in range(SETTLED):
        replayed.after_micro_step()
    assert len(said) == 1 and f"nothing to capture in {SETTLED} micro-steps" in said[0]
    assert replayed.encode(frames(3)).shape == (3, 2, 2)
