"""The hang watch in processes of their own, with limits of a second."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hanging_rank import START

from titans_pretrain.parallel.whereabouts import Whereabouts
from titans_pretrain.train import watch
from titans_pretrain.train.directory import RunDirectory
from titans_pretrain.train.lease import Lease

SCRIPT = Path(__file__).parent / "hanging_rank.py"


@pytest.fixture
def start(tmp_path):
    """``start("asleep", "receiving")``: the processes of two ranks that hang so."""
    started = []
    ranks = {str(rank): {"host": "here", "pid": rank} for rank in range(2)}
    (tmp_path / "ranks.json").write_text(json.dumps(ranks))

    def begin(*ways):
        for rank, how in enumerate(ways):
            arguments = [str(tmp_path), str(rank), str(len(ways)), how]
            process = subprocess.Popen(
                [sys.executable, str(SCRIPT), *arguments],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            started.append(process)
        for process in started:
            assert process.stdout.readline() == "stuck\n"
        return started

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def outcome(process):
    _, complaints = process.communicate(timeout=20)
    return process.returncode, complaints


@pytest.mark.parametrize("how", ["asleep", "spinning"])
def test_a_rank_that_hangs_is_named_and_all_ranks_end_resumable(start, tmp_path, how):
    began = time.monotonic()
    outcomes = [outcome(process) for process in start("receiving", how)]
    assert time.monotonic() - began < 10
    assert [code for code, _ in outcomes] == [75, 75]
    told = outcomes[0][1]
    assert told.startswith("error: step 3 hangs: rank 1 on ")
    assert "waits for no other rank\nwhere: rank 1 on " in told
    assert "rank 0 on " in told
    assert "forward, step 3, micro-batch 0, waits for rank 1 at model.layers.0" in told
    assert "hanging_rank.py" in told.split("stack of rank 1, innermost call first:")[1]
    assert outcomes[1][1] == ""
    kept = json.loads((tmp_path / "error.json").read_text())
    assert (kept["rank"], kept["exit_code"]) == (1, 75)
    assert [record["rank"] for record in kept["ranks"]] == [0, 1]
    assert sorted(path.name for path in (tmp_path / "hang").iterdir()) == [
        "rank-0.json",
        "rank-1.json",
    ]


def test_a_stopped_process_leaves_no_record_and_is_named(start):
    waiting, stopped = start("receiving", "asleep")
    stopped.send_signal(signal.SIGSTOP)
    code, told = outcome(waiting)
    assert code == 75
    assert told.startswith("error: step 3 hangs: rank 1 on here is silent: ")
    assert "where: rank 1 on here, process 1: no record" in told


def test_the_lowest_rank_that_is_left_tells_it(start):
    stopped, waiting = start("asleep", "receiving")
    stopped.send_signal(signal.SIGSTOP)
    code, told = outcome(waiting)
    assert code == 75
    assert told.startswith("error: step 3 hangs: rank 0 on here is silent: ")


def test_a_failure_that_the_hang_brings_about_does_not_hide_it(start):
    outcomes = [outcome(process) for process in start("asleep", "failing")]
    assert [code for code, _ in outcomes] == [75, 75]
    assert outcomes[0][1].startswith("error: step 3 hangs: rank 0 on ")


def test_a_job_that_was_suspended_did_not_hang(start):
    processes = start("asleep", "asleep")
    for process in processes:
        process.send_signal(signal.SIGSTOP)
    time.sleep(2)
    for process in processes:
        process.send_signal(signal.SIGCONT)
    time.sleep(0.4)
    assert [process.poll() for process in processes] == [None, None]


def test_what_cannot_be_written_is_told_all_the_same(start, tmp_path):
    (tmp_path / "hang").write_text("no directory")
    (process,) = start("asleep")
    code, told = outcome(process)
    assert code == 75
    assert told.startswith("error: rank 0 hangs: forward, step 3, micro-batch 0; what the other ")


def test_a_full_disk_does_not_hide_who_hangs(start):
    (process,) = start("full")
    code, told = outcome(process)
    assert code == 75
    assert told.startswith("error: step 3 hangs: rank 0 on ")
    assert told.count("error: ") == 1


def test_an_error_file_that_cannot_be_written_does_not_hide_who_hangs(start, tmp_path):
    (tmp_path / ".error.json").mkdir()
    (process,) = start("asleep")
    name = f"..error-{START}.json.{os.uname().nodename}.{process.pid}"
    (tmp_path / ".error.json").rename(tmp_path / name)
    code, told = outcome(process)
    assert code == 75
    assert told.startswith("error: step 3 hangs: rank 0 on ")


def test_a_rank_ends_when_another_one_of_its_start_failed(start, tmp_path):
    error = tmp_path / "error.json"
    (process,) = start("patient")
    for other in ({"start": "before", "rank": 1}, {"start": START, "rank": 0}, [], {}):
        error.write_text(json.dumps(other))
        time.sleep(0.2)
    error.write_text("{")
    time.sleep(0.5)
    assert process.poll() is None
    error.write_text(json.dumps({"start": START, "rank": 1, "exit_code": 2, "what": "no file"}))
    assert outcome(process) == (2, "rank 1 failed: no file\n")


@pytest.fixture
def make_watch(tmp_path):
    """``make_watch(seconds)``: the watch of the first of two ranks, and what it complains of."""

    def make(seconds=0):
        complaints = []
        made = watch.Watch(
            RunDirectory(tmp_path),
            0,
            2,
            Whereabouts(),
            lease=Lease(tmp_path / ".lock", START),
            seconds=seconds,
            complain=complaints.append,
        )
        return made, complaints

    return make


def test_records_of_other_starts_do_not_count_and_broken_ones_are_told_once(make_watch, tmp_path):
    watching, complaints = make_watch()
    hang = tmp_path / "hang"
    hang.mkdir()
    for rank, text in enumerate(('{"start": "before", "rank": 0}', "{", "{}")):
        (hang / f"rank-{rank}.json").write_text(text)
    assert watching._records() == watching._records() == {}
    (complaint,) = complaints
    assert complaint.startswith(f"the watch cannot read {hang}/rank-1.json: ")
    (hang / "rank-1.json").write_text(json.dumps({"start": START, "rank": 1}))
    assert watching._records() == {1: {"start": START, "rank": 1}}


def test_by_default_a_frozen_rank_is_told_within_a_minute():
    polls = 2 * watch.POLL_SECONDS + watch.POLL_SECONDS / 4  # to notice, and after the last record
    assert watch.LEAST_SECONDS + watch.GATHER_SECONDS + polls < 60 - 5
    assert watch.LEAST_SECONDS == 35  # as config.py and docs/training.md say


def test_limits_follow_from_the_slowest_recent_work_of_its_kind(make_watch, monkeypatch):
    now = 0.0
    monkeypatch.setattr(watch.time, "monotonic", lambda: now)

    (watching, _), (fixed, _) = make_watch(0), make_watch(20)
    assert watching.limit("step") == 1800  # the first may compile
    assert fixed.limit("step") == 20
    for seconds in (8.0, 6.0, 1.0):
        watching.begin("step")
        fixed.begin("step")
        now += seconds
    watching.begin("validation")
    fixed.begin("validation")
    assert watching.limit("step") == 80
    assert fixed.limit("step") == 20
    assert watching.limit("saving") == fixed.limit("saving") == 1800
    for _ in range(20):
        watching.begin("step")
        now += 0.5
    watching.begin("saving")
    assert watching.limit("step") == 35
