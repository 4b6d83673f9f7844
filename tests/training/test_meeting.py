"""A rank that is killed before the ranks have met: the others end, with the code for it and one line."""

from __future__ import annotations

import pytest

from bevt_ds.exit_codes import RANK_LOST
from tests.training.preloaded import Forked
from tests.training.processes import environment, free_port


@pytest.mark.parametrize("rank", [0, 1])
def test_rank_that_no_other_meets_ends(rank):
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    lonely = Forked(["tests/training/lonely.py"], environment(**place, RANK=str(rank), LOCAL_RANK=str(rank)))
    said = lonely.communicate(240)[0]
    assert lonely.returncode == RANK_LOST, said
    where = f"127.0.0.1:{place['MASTER_PORT']}"
    assert f"error: rank {rank} has waited 3 s for all of 2 ranks to meet at {where}: one has ended" in said
    assert "Traceback" not in said
