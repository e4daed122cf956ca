import fcntl
import json
import os

import pytest

from titans_pretrain.errors import UserError
from titans_pretrain.train import lease
from titans_pretrain.train.lease import Fenced, Lease, attempt_number


@pytest.fixture
def make(tmp_path):
    """``make(start, attempt)``: a start's lease of one run, given back after the test."""
    made = []

    def lease_of(start, attempt=0):
        made.append(Lease(tmp_path / ".lock", start, attempt))
        return made[-1]

    yield lease_of
    for one in made:
        one.release()


@pytest.mark.parametrize(("held", "wants"), [(0, 0), (0, 5), (2, 2), (3, 2), (2, 0)])
def test_a_run_that_is_held_is_refused_unless_by_an_earlier_attempt(make, tmp_path, held, wants):
    make("one", held).take()
    with pytest.raises(UserError, match="another process is training this run: ") as caught:
        make("two", wants).take()
    assert f"process {os.getpid()} on {os.uname().nodename}" in caught.value.what
    assert caught.value.where == str(tmp_path)
    make("one", held).check()


def test_a_run_that_was_given_back_is_anyone_s(make):
    earlier = make("one")
    earlier.take()
    earlier.release()
    make("two").take()
    with pytest.raises(Fenced):
        earlier.check()


def test_a_later_attempt_takes_over_and_the_earlier_one_is_fenced(make):
    earlier, later = make("one", 1), make("two", 2)
    earlier.take()
    earlier.check()
    later.take()
    later.check()
    assert earlier.successor().startswith("attempt 2, process ")
    with pytest.raises(Fenced, match=r"attempt 2, process .* has taken the run over") as caught:
        earlier.check()
    assert caught.value.exit_code == 1


def test_a_fenced_holder_that_gives_back_frees_nothing(make):
    earlier, later = make("one", 1), make("two", 2)
    earlier.take()
    later.take()
    earlier.release()
    with pytest.raises(UserError, match="attempt 2"):
        make("three", 1).take()


def test_other_ranks_see_who_holds_the_run_without_holding_it(make):
    make("one", 1).take()
    make("one", 1).check()
    with pytest.raises(Fenced):
        make("two", 2).check()


@pytest.mark.parametrize("content", [None, "", "{", "[]", "{}"])
def test_a_lock_that_names_nobody_fences_nobody(make, tmp_path, content):
    if content is not None:
        (tmp_path / ".lock").write_text(content)
    make("one", 1).check()


def test_a_start_without_a_name_is_never_fenced(make):
    make("one").take()
    make("").check()


def test_the_lock_tells_who_holds_it(make, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    make("one", 3).take()
    assert json.loads((tmp_path / ".lock").read_text()) == {
        "start": "one", "attempt": 3, "job": "77", "host": os.uname().nodename, "pid": os.getpid()
    }  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_without_locks_the_later_start_has_the_run(make, monkeypatch):
    def no_locks(handle, how):
        raise OSError("no locks")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    earlier, later = make("one"), make("two")
    earlier.take()
    later.take()
    later.check()
    with pytest.raises(Fenced):
        earlier.check()


def test_a_lock_that_another_start_replaced_meanwhile_is_looked_at_again(make, monkeypatch):
    other, locked = make("two"), lease._lock

    def after_another(handle):
        monkeypatch.setattr(lease, "_lock", locked)
        other.take()
        return locked(handle)

    monkeypatch.setattr(lease, "_lock", after_another)
    with pytest.raises(UserError, match="another process is training this run"):
        make("one").take()


@pytest.mark.parametrize("text", ["x", "-1", "1.5", "\u0661"])
def test_an_attempt_that_is_no_number_is_refused(text):
    with pytest.raises(UserError, match="TITANS_ATTEMPT"):
        attempt_number({"TITANS_ATTEMPT": text})


def test_the_attempt_s_number_is_that_of_the_environment():
    assert attempt_number({"TITANS_ATTEMPT": "12"}) == 12
    assert attempt_number({}) == 0
