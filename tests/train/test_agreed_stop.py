"""Who asked for a stop where a signal and the user's file come together."""

from types import SimpleNamespace

import pytest

from titans_pretrain.train.directory import RunDirectory
from titans_pretrain.train.outcome import Outcome
from titans_pretrain.train.stopping import Stopping

SAVES = SimpleNamespace(begun=None, whole=None, slowest=None, under_way=lambda: None)


@pytest.fixture
def run(tmp_path):
    return RunDirectory(tmp_path)


def stopping(run, signal):
    made = Stopping(SimpleNamespace(name=signal, terminated=None), run)
    assert made.flags[0] == (signal is not None or run.stop.exists())
    return made


@pytest.mark.parametrize(
    ("signal", "file", "asked_by", "reason"),
    [
        (None, True, "file", "the file `stop`"),
        ("SIGTERM", False, "signal", "SIGTERM on rank 0"),
        ("SIGTERM", True, "file", "the file `stop` and SIGTERM on rank 0"),
    ],
)
def test_the_users_wish_is_told_beside_a_signal(run, signal, file, asked_by, reason):
    if file:
        run.stop.touch()
    stop = stopping(run, signal).agree(0, SAVES)
    assert (stop.asked_by, stop.reason) == (asked_by, reason)


@pytest.mark.parametrize(
    ("outcome", "asked_by", "left"),
    [("stopped", "signal", True), ("stopped", "file", False), ("done", "", False)],
)
def test_a_file_that_did_not_end_the_run_is_left_for_the_next_start(run, outcome, asked_by, left):
    made = stopping(run, None)
    run.stop.touch()  # while the state is saved
    run.save.touch()
    made.consume(Outcome(outcome, "", asked_by, 7, 7, "now", 1.0))
    assert run.stop.exists() == left
    assert not run.save.exists()


@pytest.mark.parametrize(("saved", "left"), [("no", True), ("before", False), ("now", False)])
def test_a_wish_to_save_outlasts_a_stop_that_does_not_save(run, saved, left):
    made = stopping(run, None)
    run.save.touch()
    made.consume(Outcome("stopped", "", "signal", 7, 6, saved, 0.0))
    assert run.save.exists() == left
