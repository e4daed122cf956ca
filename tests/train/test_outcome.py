import pytest

from titans_pretrain.train import outcome
from titans_pretrain.train.directory import RunDirectory
from titans_pretrain.train.lease import Fenced, Lease
from titans_pretrain.train.outcome import Outcome
from titans_pretrain.train.triggers import Triggers

STOPPED = Outcome("stopped", "stopped by SIGTERM", "signal", 7, 6, "no", 0.0)


def test_an_outcome_reads_back_with_its_start_and_attempt(tmp_path):
    run = RunDirectory(tmp_path)
    outcome.write(run, Lease(run.lock, "one", 3), STOPPED)
    kept = {"start": "one", "attempt": 3, "outcome": "stopped", "reason": "stopped by SIGTERM"}
    kept |= {"asked_by": "signal", "step": 7, "saved_step": 6, "saved": "no", "seconds": 0.0}
    assert outcome.read(run) == outcome.read(run, attempt=3) == kept
    assert outcome.read(run, attempt=4) is None


def test_a_fenced_start_tells_no_outcome(tmp_path):
    run = RunDirectory(tmp_path)
    Lease(run.lock, "two", 2).take()
    with pytest.raises(Fenced):
        outcome.write(run, Lease(run.lock, "one", 1), STOPPED)
    assert outcome.read(run) is None


@pytest.mark.parametrize("text", [None, "{", "[]"])
def test_what_is_no_outcome_reads_as_none(tmp_path, text):
    run = RunDirectory(tmp_path)
    if text is not None:
        run.outcome.write_text(text)
    assert outcome.read(run) is None


def test_a_run_s_files_are_looked_for_once_a_second(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("titans_pretrain.train.triggers.time.monotonic", lambda: now[0])
    run = RunDirectory(tmp_path)
    triggers = Triggers(run)
    triggers.look()
    run.stop.touch()
    run.save.touch()
    now[0] = 0.9
    triggers.look()
    assert (triggers.stop, triggers.save) == (False, False)
    now[0] = 1.0
    triggers.look()
    assert (triggers.stop, triggers.save) == (True, True)
    triggers.consume_save()
    triggers.consume_stop()
    assert list(tmp_path.iterdir()) == []
    assert (triggers.stop, triggers.save) == (False, False)


def test_a_directory_that_cannot_be_read_asks_for_nothing(tmp_path, monkeypatch):
    def refuse(self):
        raise PermissionError

    triggers = Triggers(RunDirectory(tmp_path))
    monkeypatch.setattr("pathlib.Path.exists", refuse)
    triggers.look()
    assert (triggers.stop, triggers.save) == (False, False)
