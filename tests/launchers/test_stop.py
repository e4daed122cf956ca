"""``titans stop``: this run's jobs and no others, with a save or at once."""

import threading
import time

import pytest
from run_files import RunFiles, ToldSlurm, job

from launchers import slurm_command, stop
from titans_pretrain import cli
from titans_pretrain.errors import TitansError, UserError


@pytest.fixture
def run(tmp_path):
    return RunFiles(tmp_path / "demo")


@pytest.fixture
def slurm(monkeypatch):
    return ToldSlurm(monkeypatch)


@pytest.fixture
def chain(run, slurm):
    """A run at step 60, saved at 50, whose job runs, with stages before and after."""
    run.metrics(60)
    run.save(50)
    run.start("b")
    for name, stage in (("6", "prepare"), ("7", "train"), ("8", "export"), ("9", "eval")):
        run.job(name, stage)
    slurm.jobs = [
        job("6_1", "COMPLETED"),
        job("7", "RUNNING"),
        job("8", "PENDING"),
        job("9", "PENDING"),
    ]
    return run


def test_a_running_job_is_asked_and_what_waits_is_cancelled_last_stage_first(chain, slurm, capsys):
    assert cli.main(["stop", str(chain.path)]) == 0
    assert slurm.cancelled == ["9", "8"]
    assert (chain.path / "stop").is_file()
    out = capsys.readouterr().out
    assert "cancelled job 9 (eval), which waited" in out
    assert "asked job 7 to stop: the run saves after the step under way" in out
    assert f"to go on with it: titans submit {chain.path}/config.yaml --resume" in out


def test_a_job_that_waits_is_cancelled_and_no_trigger_is_left(run, slurm):
    run.job("7")
    slurm.jobs = [job("7", "PENDING")]
    assert stop.stop(run.path) == 0
    assert slurm.cancelled == ["7"]
    assert not (run.path / "stop").exists()


def test_a_job_that_has_not_begun_to_train_is_asked_too(run, slurm):
    run.job("7")
    slurm.jobs = [job("7", "RUNNING")]
    stop.stop(run.path)
    assert slurm.cancelled == []
    assert (run.path / "stop").exists()


def test_an_array_of_another_stage_is_cancelled_as_one(run, slurm, capsys):
    run.job("6", "prepare")
    slurm.jobs = [job("6_0", "RUNNING"), job("6_1", "RUNNING"), job("6_2", "PENDING")]
    stop.stop(run.path)
    assert slurm.cancelled == ["6"]
    assert not (run.path / "stop").exists()


def test_a_foreign_job_of_the_same_number_is_left_alone(run, slurm, capsys):
    run.job("7")
    run.attempt(1, job="7", next_job="8")
    slurm.jobs = [job("7", "RUNNING", "somebody-elses"), job("8", "PENDING", "somebody-elses")]
    assert stop.stop(run.path, now=True) == 0
    assert slurm.cancelled == []
    assert "nobody runs" in capsys.readouterr().out


def test_at_once_cancels_and_tells_what_is_lost(chain, slurm, capsys):
    assert cli.main(["stop", "--now", str(chain.path)]) == 0
    assert slurm.cancelled == ["9", "8", "7"]
    assert not (chain.path / "stop").exists()
    assert "steps 51 to 60 are lost, and any after them" in capsys.readouterr().out


def test_ranks_without_a_job_are_asked_by_the_trigger_only(run, monkeypatch, capsys):
    monkeypatch.setattr(slurm_command, "available", lambda: False)
    run.start("b")
    with pytest.raises(UserError, match="no job of SLURM holds the ranks") as error:
        stop.stop(run.path, now=True)
    assert "node0, node1" in error.value.where
    assert not (run.path / "stop").exists()
    assert stop.stop(run.path) == 0
    assert (run.path / "stop").exists()
    out = capsys.readouterr().out
    assert "asked ranks outside of SLURM" in out
    assert f"to go on with it: titans train {run.path}/config.yaml --resume" in out


def test_a_run_that_nobody_runs_is_told_and_an_old_trigger_is_taken_away(run, slurm, capsys):
    run.metrics(60)
    run.save(60)
    (run.path / "stop").touch()
    assert cli.main(["stop", str(run.path)]) == 0
    assert not (run.path / "stop").exists()
    told = f"nobody runs {run.path}: ended, saved at step 60 of 100\n"
    assert capsys.readouterr().out == told


def test_slurm_that_does_not_answer_stops_nothing_silently(run, slurm):
    run.job("7")
    slurm.answers = False
    with pytest.raises(TitansError, match="SLURM does not answer"):
        stop.stop(run.path)
    assert not (run.path / "stop").exists()


def test_waiting_ends_with_the_run_and_takes_an_unheard_trigger_away(
    chain, slurm, monkeypatch, capsys
):
    monkeypatch.setattr(stop, "POLL_SECONDS", 0.01)
    thread = threading.Thread(target=lambda: stop.stop(chain.path, wait=True), daemon=True)
    thread.start()
    deadline = time.monotonic() + 120
    while not (chain.path / "stop").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert thread.is_alive()
    chain.outcome("b", "stopped")
    time.sleep(0.1)
    assert thread.is_alive()
    slurm.jobs = [job("7", "FAILED")]
    thread.join(120)
    assert not thread.is_alive()
    assert not (chain.path / "stop").exists()
    assert "ended: stopped, saved at step 50 of 100" in capsys.readouterr().out


def test_a_directory_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="is no run's directory"):
        stop.stop(tmp_path)
