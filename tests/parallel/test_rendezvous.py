import socket
from datetime import timedelta

import pytest

from titans_pretrain.parallel import rendezvous
from titans_pretrain.parallel.rendezvous import MissingRanks, meet


@pytest.fixture
def rank(monkeypatch):
    """``rank(number, ranks)``: this process is that rank of a start that has no other ranks."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)

    def be(number, ranks):
        seconds = 3 if ranks > 1 else 60
        monkeypatch.setattr(rendezvous, "PATIENCE", timedelta(seconds=seconds))
        names = {"RANK": number, "WORLD_SIZE": ranks, "MASTER_PORT": port}
        for name, value in (names | {"MASTER_ADDR": "127.0.0.1"}).items():
            monkeypatch.setenv(name, str(value))

    return be


def test_ranks_that_do_not_come_are_named_with_their_hosts(rank):
    rank(0, 4)
    with pytest.raises(MissingRanks) as caught:
        meet(lambda: ["n1", "n1", "n2"])
    named = "rank 1 on n1, rank 2 on n2, rank 3 on an unknown host did not come within "
    assert caught.value.what.startswith(named)
    assert caught.value.exit_code == 1


def test_a_rank_that_finds_no_rank_0_says_where_it_looked(rank):
    rank(1, 2)
    with pytest.raises(MissingRanks, match=r"rank 1 cannot reach rank 0 at 127\.0\.0\.1:"):
        meet(tuple)


def test_the_last_rank_lets_all_go_on(rank):
    rank(0, 1)
    store = meet(tuple)
    assert store.get("titans/rank-0").decode() == socket.gethostname()
