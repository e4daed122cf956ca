import os
import socket
from datetime import timedelta

import pytest
import torch.distributed as dist

from titans_pretrain.errors import TitansError
from titans_pretrain.parallel import rendezvous
from titans_pretrain.parallel.rendezvous import MissingRanks, meet


@pytest.fixture
def rank(monkeypatch):
    """``rank(number, ranks)``: this process is that rank of a start that has no other ranks."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)

    monkeypatch.setattr(rendezvous, "LINGER_SECONDS", 0.0)

    def be(number, ranks, **more):
        seconds = 3 if ranks > 1 else 60
        monkeypatch.setattr(rendezvous, "PATIENCE", timedelta(seconds=seconds))
        names = {"RANK": number, "WORLD_SIZE": ranks, "MASTER_PORT": port}
        for name, value in (names | {"MASTER_ADDR": "127.0.0.1"} | more).items():
            monkeypatch.setenv(name, str(value))
        return port

    return be


def test_ranks_that_do_not_come_are_named_with_their_hosts(rank):
    rank(0, 4)
    with pytest.raises(MissingRanks) as caught:
        meet(lambda: ["n1", "n1", "n2"])
    named = "rank 1 on n1, rank 2 on n2, rank 3 on an unknown host did not come within "
    assert caught.value.what.startswith(named)
    assert (caught.value.rank, caught.value.host, caught.value.exit_code) == (1, "n1", 75)


def test_a_rank_that_finds_no_rank_0_says_where_it_looked(rank):
    rank(1, 2)
    with pytest.raises(TitansError, match=r"rank 1 cannot reach rank 0 at 127\.0\.0\.1:") as caught:
        meet(tuple)
    assert caught.value.exit_code == 1


def test_the_last_rank_lets_all_go_on(rank):
    rank(0, 1)
    store = meet(tuple)
    assert store.get("titans/rank-0").decode() == socket.gethostname()


def test_the_patience_with_late_ranks_can_be_given(rank):
    rank(0, 2)
    with pytest.raises(MissingRanks, match=r"did not come within 0\.0166667 minutes"):
        meet(tuple, timedelta(seconds=1))


def test_a_port_that_another_process_has_is_told(rank):
    port = rank(0, 1)
    with socket.socket(socket.AF_INET6) as other:
        other.bind(("::", port))
        other.listen()
        with pytest.raises(TitansError, match=f"rank 0 cannot listen at port {port}: another"):
            meet(tuple)


class Store:
    """Stands for the store of a start whose ranks in ``here`` came; None where it is gone."""

    def __init__(self, here):
        self._here = here

    def check(self, keys):
        if self._here is None:
            raise dist.DistNetworkError("gone")
        return keys[0] in {f"titans/rank-{rank}" for rank in self._here}


@pytest.mark.parametrize(
    ("own", "here", "told"),
    [
        (0, {0, 2}, 1),
        (1, {1, 2}, 0),
        (2, {0, 2}, None),
        (2, None, None),
    ],
)
def test_the_lowest_rank_that_came_tells_who_is_missing(rank, own, here, told):
    rank(own, 3)
    error = rendezvous._missing(Store(here), 3, timedelta(seconds=1), lambda: ["n0", "n1", "n2"])
    assert error.rank == told
    assert error.host == ("" if told is None else f"n{told}")


def test_ranks_that_came_at_the_last_moment_are_not_missing(rank):
    rank(0, 2)
    assert rendezvous._missing(Store({0, 1}), 2, timedelta(seconds=1), tuple) is None


def test_a_restart_by_torchrun_does_not_meet_the_keys_of_the_last(rank):
    port = rank(0, 2, TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RESTART_COUNT="1")
    kept = dist.TCPStore("127.0.0.1", port, 1, is_master=True, wait_for_workers=False)
    for key, value in {"rank-0": "h", "rank-1": "h", "arrived": "2", "all": ""}.items():
        kept.set(f"titans/{key}", value)
        kept.set(f"titans/0/titans/{key}", value)
    with pytest.raises(MissingRanks, match="rank 1 on an unknown host did not come"):
        meet(tuple)


def test_a_launcher_s_socket_is_taken_whoever_else_would_have_its_port(rank, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        handed = os.dup(listener.fileno())
        rank(0, 1, MASTER_PORT=listener.getsockname()[1])
        monkeypatch.setenv("TITANS_LISTENER", str(handed))
        store = meet(tuple)
    assert store.get("titans/rank-0").decode() == socket.gethostname()
    assert "TITANS_LISTENER" not in os.environ
