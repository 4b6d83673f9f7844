"""Whether all ranks still have the same weights: a checksum of each parameter, compared where the host waits anyway.

At ZeRO stages 0 to 2 every rank has all parameters and makes the same of them, so that a rank which differs has a
fault: of memory, of a link or of a kernel. At stage 3 there is nothing twice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from bevt_ds.errors import UserError
from bevt_ds.exit_codes import NON_FINITE
from bevt_ds.runtime.distributed import Ranks
from bevt_ds.runtime.engine import Engine

WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes
SHOWN = 3  # names in a message


class RanksDifferError(UserError):
    """The ranks of a run no longer have the same weights."""

    exit_code = NON_FINITE


def require_agreement(engine: Engine, ranks: Ranks, step: int) -> None:
    """Compare the weights after `step` between the ranks. Collective; waits for the device.

    Raises:
        RanksDifferError: on all ranks, where one differs.
    """
    if ranks.world > 1 and engine.stage < 3:
        require_same(dict(engine.module.named_parameters()), ranks, step)


def require_same(parameters: Mapping[str, Tensor], ranks: Ranks, step: int) -> None:
    """The same of these parameters."""
    sums = checksums(parameters.values())
    if len(set(ranks.gather(int(sums.sum())))) == 1:
        return
    by_rank = [tuple(own) for own in ranks.gather(sums.tolist())]
    raise RanksDifferError(describe(list(parameters), by_rank, step))


def checksums(parameters: Iterable[Tensor]) -> Tensor:
    """One number for each parameter, int64 on its device, that changes with any bit: the sum of its words, modulo 2^64.

    Of integers, so that it does not depend on the order in which a device adds.
    """
    return torch.stack([p.detach().view(WORDS[p.element_size()]).sum(dtype=torch.int64) for p in parameters])


def describe(names: Sequence[str], by_rank: Sequence[Sequence[int]], step: int) -> str:
    """One line: which ranks differ from most of the others, and in which parameters. by_rank: checksums."""
    (usual, most), *_ = Counter(map(tuple, by_rank)).most_common()
    odd = [rank for rank, own in enumerate(by_rank) if tuple(own) != usual]
    different = [name for i, name in enumerate(names) if any(by_rank[rank][i] != usual[i] for rank in odd)]
    more = f" and {len(different) - SHOWN} more" if len(different) > SHOWN else ""
    who = f"rank {odd[0]}" if len(odd) == 1 else f"ranks {', '.join(map(str, odd))}"
    others = "the others" if most > len(odd) else f"rank {list(map(tuple, by_rank)).index(usual)}"
    unsure = "" if most > len(odd) else " (it cannot be said which of them is right)"
    return (
        f"after step {step} the weights of {who} differ from those of {others}{unsure}, in"
        f" {', '.join(different[:SHOWN])}{more}: nothing is saved. A fault of memory, of a link or of a kernel: look"
        " at the machine of that rank, then continue from the last checkpoint with resume=auto."
    )
