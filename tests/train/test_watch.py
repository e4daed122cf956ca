"""The hang watch in processes of their own, with limits of a second."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from titans_pretrain.parallel.whereabouts import Whereabouts
from titans_pretrain.train import watch
from titans_pretrain.train.directory import RunDirectory

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
    assert "the watch cannot use" in told


def test_limits_follow_from_the_slowest_recent_work_of_its_kind(tmp_path, monkeypatch):
    now = 0.0
    monkeypatch.setattr(watch.time, "monotonic", lambda: now)

    def make(seconds):
        directory, whereabouts = RunDirectory(tmp_path), Whereabouts()
        return watch.Watch(directory, 0, 1, whereabouts, seconds=seconds, complain=print)

    watching, fixed = make(0), make(20)
    assert watching.limit("step") == 1800  # the first may compile
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
    assert watching.limit("step") == 45
