import errno
import fcntl
import json
import os
import time

import pytest

from titans_pretrain.errors import TitansError, UserError
from titans_pretrain.train import heartbeat, lease
from titans_pretrain.train.directory import RunDirectory
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


@pytest.mark.parametrize(("held", "wants"), [(0, 0), (0, 5), (2, 2), (2, 0)])
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
    with pytest.raises(UserError, match="another process is training this run: attempt 2"):
        make("three", 2).take()


def test_other_ranks_see_who_holds_the_run_without_holding_it(make):
    make("one", 2).take()
    make("one", 2).check()
    for attempt in (0, 1, 2):
        with pytest.raises(Fenced):
            make("two", attempt).check()


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


@pytest.mark.parametrize("wants", [1, 2])
def test_an_attempt_that_a_later_one_followed_is_refused_though_the_lock_is_free(make, wants):
    later = make("two", 3)
    later.take()
    later.release()
    with pytest.raises(UserError, match=f"attempt {wants} comes after a later one: attempt 3, "):
        make("one", wants).take()
    make("three").take()  # by hand, once the attempts are over


@pytest.fixture
def without_locks(monkeypatch):
    """A file system that cannot lock."""

    def no_locks(handle, how):
        raise OSError(errno.EOPNOTSUPP, "no locks")

    monkeypatch.setattr(fcntl, "flock", no_locks)


def beat(tmp_path, start, age):
    record = {"rank": 0, "start": start, "time": time.time() - age}
    heartbeat.write(RunDirectory(tmp_path), record)


@pytest.mark.parametrize(("held", "wants"), [(0, 0), (2, 2), (2, 0), (0, 2)])
def test_without_locks_signs_of_life_keep_the_run(make, tmp_path, without_locks, held, wants):
    holder = make("one", held)
    holder.take()
    beat(tmp_path, "one", age=1)
    with pytest.raises(UserError, match="another process is training this run"):
        make("two", wants).take()
    holder.check()
    beat(tmp_path, "one", age=lease.FRESH_SECONDS + 1)
    make("two", wants).take()
    with pytest.raises(Fenced):
        holder.check()


def test_without_locks_a_later_attempt_takes_the_run_and_an_earlier_one_does_not(
    make, tmp_path, without_locks
):
    make("one", 1).take()
    beat(tmp_path, "one", age=1)
    make("two", 2).take()
    with pytest.raises(UserError, match="attempt 1 comes after a later one"):
        make("three", 1).take()


@pytest.mark.parametrize("name", ["outcome.json", "error.json"])
def test_without_locks_a_start_that_told_its_end_keeps_nothing(make, tmp_path, without_locks, name):
    make("one").take()
    beat(tmp_path, "one", age=1)
    (tmp_path / name).write_text('{"start": "one"}')
    make("two").take()


def test_a_lock_that_fails_otherwise_is_told(make, monkeypatch):
    def failing(handle, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", failing)
    with pytest.raises(TitansError, match="cannot lock the run: No locks available"):
        make("one").take()


def test_a_later_attempt_that_an_earlier_one_replaced_puts_its_own_file_back(make):
    first, second, third = make("one", 1), make("two", 2), make("three", 3)
    first.take()
    third.take()
    second._put_own()  # it had looked before the third came
    second.check()
    other_rank = make("three", 3)
    other_rank.check()
    third.check()
    third.check()
    with pytest.raises(Fenced, match="attempt 3"):
        second.check()
    with pytest.raises(UserError, match="another process"):
        make("four", 3).take()


def refuse_writing(monkeypatch, *modes):
    def refusing(path, mode="r", **how):
        if mode in modes:
            raise PermissionError(errno.EACCES, "Permission denied")
        return open(path, mode, **how)

    monkeypatch.setattr(lease, "open", refusing, raising=False)


def test_someone_else_s_lock_is_looked_at_and_replaced_where_the_directory_allows(
    make, monkeypatch
):
    held = make("one", 1)
    held.take()
    refuse_writing(monkeypatch, "a+")
    with pytest.raises(UserError, match="another process is training"):
        make("two", 1).take()
    make("three", 2).take()


@pytest.mark.parametrize("modes", [("a+", "r"), ("x",)])
def test_a_lock_that_may_not_be_replaced_is_told_with_its_owner(make, tmp_path, monkeypatch, modes):
    (tmp_path / ".lock").touch()
    refuse_writing(monkeypatch, *modes)
    owner = (tmp_path / ".lock").owner()
    with pytest.raises(UserError, match=f"the run's lock is {owner}'s") as caught:
        make("one").take()
    assert caught.value.where == str(tmp_path / ".lock")


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
