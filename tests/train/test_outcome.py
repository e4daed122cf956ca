import os

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
    def refuse(self, **how):
        raise PermissionError

    triggers = Triggers(RunDirectory(tmp_path))
    monkeypatch.setattr("pathlib.Path.stat", refuse)
    triggers.look()
    assert (triggers.stop, triggers.save) == (False, False)


@pytest.fixture
def triggers(tmp_path, monkeypatch):
    """Look at every call."""
    monkeypatch.setattr("titans_pretrain.train.triggers.SECONDS", 0.0)
    made = Triggers(RunDirectory(tmp_path))
    (tmp_path / "save").touch()
    made.look()
    return made


def test_the_file_save_goes_once_the_checkpoint_is_whole_and_asks_for_no_second_one(
    triggers, tmp_path
):
    assert triggers.save
    triggers.serve_save(5, 4)
    triggers.look()
    triggers.saved(4)
    assert not triggers.save
    assert (tmp_path / "save").exists()
    triggers.saved(5)
    assert not (tmp_path / "save").exists()


def test_a_state_that_is_whole_already_answers_save_at_once(triggers, tmp_path):
    triggers.serve_save(5, 5)
    assert not (tmp_path / "save").exists()
    assert not triggers.save


def test_a_save_that_is_asked_for_again_meanwhile_is_another_one(triggers, tmp_path):
    triggers.serve_save(5, None)
    os.utime(tmp_path / "save", ns=(1, 1))
    triggers.look()
    assert triggers.save
    triggers.saved(5)
    assert (tmp_path / "save").exists()
    triggers.serve_save(6, 5)
    triggers.saved(6)
    assert not (tmp_path / "save").exists()
