import json
import os

import pytest

from titans_pretrain.parallel.whereabouts import Whereabouts
from titans_pretrain.train import heartbeat
from titans_pretrain.train.directory import RunDirectory
from titans_pretrain.train.heartbeat import Heartbeat
from titans_pretrain.train.lease import Lease


class Left(BaseException):
    """Stands for the end of the process."""


@pytest.fixture
def make(tmp_path, monkeypatch):
    """``make(rank)``: a rank's heartbeat and what it complains of; ends are raised."""

    def leave(code):
        raise Left(code)

    monkeypatch.setattr(heartbeat, "leave", leave)
    monkeypatch.setattr(heartbeat, "POLL_SECONDS", 0.0)

    def of(rank):
        place, complaints = Whereabouts(), []
        lease = Lease(tmp_path / ".lock", "one", 4)
        made = Heartbeat(RunDirectory(tmp_path), rank, place, lease, complaints.append)
        return made, place, complaints

    return of


def test_a_beat_tells_start_place_and_time_and_takes_the_last_one_s_place(make, tmp_path):
    made, place, _ = make(3)
    made._beat()
    place.enter("backward", step=7, micro_batch=1)
    made._beat()
    record = heartbeat.read(RunDirectory(tmp_path))[3]
    told = {"start": "one", "attempt": 4, "rank": 3, "pid": os.getpid(), "step": 7}
    told |= {"phase": "backward", "told": "backward, step 7, micro-batch 1"}
    assert record.items() >= told.items()
    assert record.keys() == told.keys() | {"host", "time"}


def test_a_shorter_record_leaves_nothing_of_the_longer_one(tmp_path):
    run = RunDirectory(tmp_path)
    for told in ("x" * 500, "y"):
        heartbeat.write(run, {"rank": 0, "told": told})
    assert heartbeat.read(run) == {0: {"rank": 0, "told": "y"}}


def test_what_cannot_be_read_is_left_out(tmp_path):
    run = RunDirectory(tmp_path)
    assert heartbeat.read(run) == {}
    heartbeat.write(run, {"rank": 10})
    heartbeat.write(run, {"rank": 2})
    (run.heartbeat / "rank-1.json").write_text("{")
    (run.heartbeat / "notes.json").write_text("{}")
    assert list(heartbeat.read(run)) == [2, 10]


def test_a_directory_that_takes_no_record_ends_no_rank(make, tmp_path):
    (tmp_path / "heartbeat").write_text("no directory")
    made, _, complaints = make(0)
    made._beat()
    assert complaints == []


@pytest.mark.parametrize("rank", [0, 1])
def test_every_rank_of_a_fenced_start_ends_and_writes_nothing(make, tmp_path, rank):
    made, _, complaints = make(rank)
    (tmp_path / ".lock").write_text(json.dumps({"start": "two", "attempt": 5, "pid": 1}))
    with pytest.raises(Left) as caught:
        made._run()
    assert caught.value.args == (1,)
    assert complaints[0].startswith("error: this start is over: attempt 5, process 1 on ")
    assert not (tmp_path / "heartbeat").exists()


def test_a_rank_that_was_frozen_looks_at_once_who_has_the_run(make, monkeypatch):
    made, _, _ = make(1)
    times = iter([0.0, 1.0, 1.0 + heartbeat.FROZEN_SECONDS])
    monkeypatch.setattr(heartbeat.time, "monotonic", lambda: next(times))
    seen = []

    def look():
        seen.append(True)
        if len(seen) == 2:
            made.end()

    monkeypatch.setattr(made, "_end_if_fenced", look)
    made._run()
    assert len(seen) == 3  # at the first beat, after the gap and at the end, not in between
    assert next(times, None) is None


def test_the_last_record_says_where_the_run_ended(make, tmp_path, monkeypatch):
    monkeypatch.setattr(heartbeat, "POLL_SECONDS", 600.0)
    monkeypatch.setattr(heartbeat, "END_SECONDS", 60.0)
    made, place, _ = make(2)
    made.start()
    place.enter("ending", step=9)
    made.end()
    record = heartbeat.read(RunDirectory(tmp_path))[2]
    assert (record["phase"], record["step"]) == ("ending", 9)


def test_a_directory_is_made_only_where_there_is_none(tmp_path, monkeypatch):
    run = RunDirectory(tmp_path)
    heartbeat.write(run, {"rank": 0, "told": "x"})

    def refuse(self, **how):
        raise AssertionError

    monkeypatch.setattr("pathlib.Path.mkdir", refuse)
    heartbeat.write(run, {"rank": 0, "told": "y"})
    assert heartbeat.read(run)[0]["told"] == "y"
