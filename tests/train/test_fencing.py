"""Of two starts of a run only the later attempt goes on, whatever the other one does."""

import contextlib
import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from run_command import end

from titans_pretrain.checkpoint.format import read_state
from titans_pretrain.checkpoint.load import read_tensors

FAULTS = str(Path(__file__).parent / "faults")
PATIENCE = 200
LAST = 12


def wait_for(condition, process):
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def send(pids, number):
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


@pytest.fixture
def start(tmp_path):
    """``start(run, attempt, fault)``: the command as an attempt; ended after the test."""
    begun = []

    def begin(run, attempt, fault="none:0:0"):
        begun.append(
            run.start(
                "--ranks",
                "2",
                "--resume",
                PYTHONPATH=FAULTS,
                TITANS_ATTEMPT=str(attempt),
                TITANS_FAULT=fault,
                TITANS_MARK=str(tmp_path / f"mark-{attempt}"),
            )
        )
        return begun[-1], tmp_path / f"mark-{attempt}"

    yield begin
    for process in begun:
        send([process.pid], signal.SIGCONT)
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    "fault",
    [
        "save-freeze-naming:0:6",
        pytest.param("save-freeze-writing:0:6", marks=pytest.mark.slow),
        pytest.param("save-freeze-writing:1:6", marks=pytest.mark.slow),
    ],
)
def test_what_a_frozen_start_writes_after_its_thaw_changes_nothing(make_run, start, fault):
    settings = {"train": {"steps": LAST}, "checkpoint": {"every": 3, "keep": 9}}
    straight, broken = make_run("straight", **settings), make_run("broken", **settings)
    assert straight.train("--ranks", "2")[0] == 0

    old, mark = start(broken, 1, fault)
    wait_for(mark.exists, old)
    frozen = [old.pid, *broken.processes()]
    send(frozen, signal.SIGSTOP)
    assert broken.steps_saved() == [3]

    new, mark = start(broken, 2, "save-wait:0:9")
    wait_for(mark.exists, new)
    ranks = broken.processes()
    send(frozen, signal.SIGCONT)
    assert old.wait(PATIENCE) == 1
    code, _, told = broken.train("--ranks", "1", "--resume", TITANS_ATTEMPT="2")
    assert code == 2  # not a later attempt
    assert told.startswith("error: another process is training this run: attempt 2, process ")
    mark.unlink()
    code, out, told = end(new)
    assert (code, told) == (0, "")
    assert "resuming from " in out

    assert broken.timeless() == straight.timeless()
    assert broken.steps_saved() == straight.steps_saved() == [3, 6, 9, LAST]
    for step in (3, 6, 9, LAST):
        places = [run.directory / "checkpoints" / f"step-{step}" for run in (straight, broken)]
        states = [read_state(place) for place in places]
        assert states[0] == states[1]
        expected, found = (dict(read_tensors(place, "")) for place in places)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert (broken.directory / "checkpoints" / "latest").read_text() == f"step-{LAST}\n"
    assert not list((broken.directory / "checkpoints").glob(".*"))
    assert not (broken.directory / "error.json").exists()
    assert broken.processes() == ranks
    outcome = json.loads((broken.directory / "outcome.json").read_text())
    assert (outcome["outcome"], outcome["attempt"]) == ("done", 2)
    beats = [json.loads(path.read_text()) for path in (broken.directory / "heartbeat").iterdir()]
    assert {beat["attempt"] for beat in beats} == {2}
