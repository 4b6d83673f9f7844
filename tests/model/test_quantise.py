"""Quantisers: the nearest code, averages over ranks, dead codes, the gradient, and finite scalars against a search."""

from __future__ import annotations

import threading
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F

from bevt_ds import UserError
from bevt_ds.model.tokenizers.quantise import FSQ, EMACodebook


def vectors(number: int, dim: int = 4, seed: int = 0) -> torch.Tensor:
    return torch.randn(number, dim, generator=torch.Generator().manual_seed(seed))


def fresh(ids: int = 6, dim: int = 4, **options: float) -> EMACodebook:
    quantiser = EMACodebook(ids, dim, **options)
    quantiser.init_weights(torch.Generator().manual_seed(1))
    return quantiser


def alone(value: torch.Tensor) -> torch.Tensor:
    return value


def test_codebook_takes_the_nearest_code_by_angle_and_passes_the_gradient():
    quantiser, x = fresh().eval(), vectors(20).requires_grad_()
    out = quantiser(x)
    nearest = torch.cdist(F.normalize(x), quantiser.codebook).argmin(-1)
    assert torch.equal(out.ids, nearest)
    torch.testing.assert_close(out.codes, quantiser.codebook[nearest])
    torch.testing.assert_close(out.distance, (F.normalize(x) - quantiser.codebook[nearest]).square().sum())
    out.codes.sum().backward()
    through, x.grad = x.grad, None
    F.normalize(x).sum().backward()
    torch.testing.assert_close(through, x.grad)


def test_codes_move_to_the_average_of_what_chose_them():
    """Two steps by hand: sums' = 0.9 sums + 0.1 (sum of the vectors), codes of unit length; unused codes stay."""
    quantiser, sums = fresh(decay=0.9, patience=100), None
    quantiser.idle.zero_()
    sums = quantiser.codebook.clone()
    for seed in (0, 1):
        x = F.normalize(vectors(5, seed=seed))
        ids = (x @ quantiser.codebook.T).argmax(-1)
        expected = torch.stack([0.9 * sums[v] + 0.1 * x[ids == v].sum(0) for v in range(6)])
        quantiser(vectors(5, seed=seed))
        quantiser.update(alone, 0, 1, seed=0)
        sums = expected
        torch.testing.assert_close(quantiser.codebook, F.normalize(sums, dim=-1))
        assert torch.equal(quantiser.idle == 0, torch.bincount(ids, minlength=6) > 0)


def test_dead_codes_are_put_where_vectors_are():
    """Codes that no vector has chosen for longer than `patience` steps; at the beginning that is every unused one."""
    quantiser, x = fresh(patience=2), F.normalize(vectors(40))
    quantiser(x)
    used = quantiser(x).ids.unique()
    quantiser.forget()
    quantiser(x)
    quantiser.update(alone, 0, 1, seed=3)
    distance = torch.cdist(quantiser.codebook, x).amin(-1)
    others = torch.ones(6, dtype=torch.bool).index_fill(0, used, False)
    assert distance[others].max() < 1e-3 if others.any() else True
    quantiser.idle.fill_(0)
    quantiser.codebook[0] = quantiser.sums[0] = -F.normalize(x.mean(0), dim=0)
    quantiser.sums[0] *= 1000  # nothing chooses it, and it would stay for long
    far = x[(x @ quantiser.codebook.T).argmax(-1) != 0]
    for step in range(3):
        assert torch.cdist(quantiser.codebook[:1], far).min() > 1e-3, step
        quantiser(far)
        quantiser.update(alone, 0, 1, seed=step)
    assert torch.cdist(quantiser.codebook[:1], far).min() < 1e-3


def test_ranks_that_share_a_batch_have_the_codes_of_one_rank():
    """Counts, sums and idle times are of the global batch, and every rank ends with the same codes."""
    first, barrier, parts = fresh(ids=8, patience=1), threading.Barrier(2, timeout=60), [None, None]
    first.idle.fill_(0)
    ranks = [deepcopy(first), deepcopy(first)]

    def total(rank: int):
        def add(value: torch.Tensor) -> torch.Tensor:
            parts[rank] = value
            barrier.wait()
            summed = parts[0] + parts[1]
            barrier.wait()
            return summed

        return add

    def work(rank: int) -> None:
        ranks[rank](vectors(12)[rank::2])
        ranks[rank].update(total(rank), rank, 2, seed=5)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    first(vectors(12))
    first.update(alone, 0, 1, seed=5)
    for name, value in first.named_buffers():
        one, two = (dict(r.named_buffers())[name] for r in ranks)
        torch.testing.assert_close(one, value)
        assert torch.equal(one, two)


def test_codebook_is_left_alone_by_a_step_that_is_not_finite():
    quantiser = fresh()
    before = deepcopy(quantiser.state_dict())
    quantiser(torch.full((3, 4), float("nan")))
    quantiser.update(alone, 0, 1, seed=0)
    assert all(torch.equal(value, before[name]) for name, value in quantiser.state_dict().items())


def test_codebook_stays_fp32_in_a_network_of_16_bits():
    """An average of 16 bits would not move: DeepSpeed puts a whole network into bf16."""
    quantiser = fresh()
    codes = quantiser.codebook.clone()
    assert quantiser.bfloat16().codebook.dtype == torch.float32 and torch.equal(quantiser.codebook, codes)
    assert quantiser(vectors(3).bfloat16()).codes.dtype == torch.float32


@pytest.mark.parametrize("levels", [(8, 8, 8, 4, 4), (3, 5, 2), (7,)])
def test_fsq_takes_the_nearest_point_of_its_grid(levels):
    """Every id has a code of its own in [-1,1], and a vector takes the one nearest to its bounded self."""
    quantiser = FSQ(levels)
    ids = torch.arange(quantiser.vocab_size)
    codes = quantiser.lookup(ids)
    assert codes.unique(dim=0).shape == (len(ids), len(levels)) and codes.abs().max() <= 1
    out = quantiser(3 * vectors(500, len(levels)))
    torch.testing.assert_close(quantiser.lookup(out.ids), out.codes)
    for axis, count in enumerate(levels):
        grid = quantiser.lookup(ids)[:, axis].unique()
        assert len(grid) == count
        x = torch.zeros(300, len(levels))
        x[:, axis] = torch.linspace(-6, 6, 300)
        chosen = quantiser(x).codes[:, axis]
        assert (chosen.diff() >= 0).all() and torch.equal(chosen.unique(), grid), "monotonous, and all levels reached"
    assert (quantiser(torch.zeros(1, len(levels))).codes == 0).all()


def test_fsq_passes_a_gradient_and_has_nothing_to_keep():
    quantiser, x = FSQ((4, 5)), vectors(6, 2).requires_grad_()
    out = quantiser(x)
    out.codes.sum().backward()
    assert (x.grad > 0).all() and out.distance == 0
    assert not list(quantiser.state_dict())
    with pytest.raises(UserError, match="at least two"):
        FSQ((4, 1))
