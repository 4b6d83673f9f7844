"""How the ranks of a run find each other where other runs are on the machine."""

from __future__ import annotations

import socket

import pytest

from bevt_ds import UserError
from bevt_ds.runtime.distributed import choose_rendezvous


@pytest.fixture
def taken():
    """A port that another program listens at."""
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        yield str(other.getsockname()[1])


def rank(number, world, port):
    return {"RANK": str(number), "WORLD_SIZE": str(world), "LOCAL_RANK": str(number), "MASTER_PORT": port}


def test_plain_python_is_rank_0_of_1():
    environment = {}
    choose_rendezvous(environment)
    assert environment["RANK"] == "0" and environment["WORLD_SIZE"] == "1"
    assert int(environment["MASTER_PORT"]) > 0


def test_a_single_rank_leaves_a_port_that_is_in_use(taken):
    environment = rank(0, 1, taken)
    choose_rendezvous(environment)
    assert environment["MASTER_PORT"] != taken


def test_several_ranks_at_a_port_in_use_are_told_the_remedy(taken):
    with pytest.raises(UserError, match=f"port {taken} .* --master_port"):
        choose_rendezvous(rank(0, 2, taken))


def test_other_ranks_and_torchruns_agent_keep_the_port(taken):
    for environment in (rank(1, 2, taken), {**rank(0, 1, taken), "TORCHELASTIC_USE_AGENT_STORE": "True"}):
        choose_rendezvous(environment)
        assert environment["MASTER_PORT"] == taken


def test_a_free_port_is_kept(taken):
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = str(probe.getsockname()[1])
    environment = rank(0, 2, port)
    choose_rendezvous(environment)
    assert environment["MASTER_PORT"] == port
