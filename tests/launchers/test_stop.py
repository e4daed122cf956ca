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


def test_evaluations_of_checkpoints_go_on_and_are_not_waited_for(chain, slurm, capsys):
    chain.job("10", "eval-50")
    slurm.jobs = [job("10", "RUNNING")]
    chain.outcome("b", "stopped")
    assert stop.stop(chain.path, now=True, wait=True) == 0
    assert slurm.cancelled == []
    out = capsys.readouterr().out
    assert "job 10 evaluates a checkpoint and goes on; scancel 10 ends it" in out
    assert f"nobody runs {chain.path}" in out


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


@pytest.mark.parametrize("name", ["titans-pretrain", "anything"])
def test_a_job_that_was_queued_by_hand_is_the_runs_by_its_attempt(run, slurm, name, capsys):
    run.job("5")
    run.attempt(1, job="7", name=name)
    slurm.jobs = [job("5", "COMPLETED"), job("7", "RUNNING", name)]
    assert stop.stop(run.path) == 0
    assert (run.path / "stop").exists()
    assert "asked job 7 to stop" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("known", "left"),
    [([], True), ([job("7", "RUNNING", "renamed")], True), ([job("7", "FAILED", "mine")], False)],
)
def test_an_old_trigger_stays_while_an_attempt_may_be_at_work(run, slurm, known, left):
    run.job("5")
    run.attempt(1, job="7", name="mine")
    slurm.jobs = known
    (run.path / "stop").touch()
    assert stop.stop(run.path) == 0
    assert (run.path / "stop").exists() == left


def test_an_old_trigger_stays_beside_attempts_that_cannot_be_read(run, slurm):
    run.attempt(1)
    (run.path / "attempts/attempt-1.json").write_text("{")
    (run.path / "stop").touch()
    stop.stop(run.path)
    assert (run.path / "stop").exists()


def test_a_waiting_job_that_begins_meanwhile_is_asked_and_not_killed(run, slurm, capsys):
    run.job("7")
    run.job("8", "export")
    slurm.jobs = [job("7", "PENDING"), job("8", "PENDING")]
    slurm.beginning = ["7"]
    stop.stop(run.path)
    assert slurm.cancelled == ["8"]
    assert (run.path / "stop").exists()
    out = capsys.readouterr().out
    assert "cancelled job 7" not in out
    assert "asked job 7 to stop" in out


@pytest.mark.parametrize("now", [False, True])
def test_what_begins_meanwhile_and_is_to_end_is_cancelled_then(run, slurm, now, capsys):
    run.job("6", "prepare")
    slurm.jobs = [job("6", "PENDING")]
    slurm.beginning = ["6"]
    stop.stop(run.path, now=now)
    assert slurm.cancelled == ["6"]
    assert "cancelled job 6 (prepare), which ran; what it has finished" in capsys.readouterr().out


def test_at_once_a_job_that_is_queued_meanwhile_is_cancelled_too(chain, slurm, monkeypatch):
    chain.attempt(1, job="7", next_job="10")
    slurm.coming = [job("10", "PENDING")]
    touched = []
    slurm_cancel = stop.slurm_utils.cancel

    def cancel(name, **more):
        touched.append((chain.path / "stop").exists())
        slurm_cancel(name, **more)

    monkeypatch.setattr(stop.slurm_utils, "cancel", cancel)
    stop.stop(chain.path, now=True)
    assert slurm.cancelled == ["9", "8", "7", "10"]
    assert all(touched)
    assert not (chain.path / "stop").exists()


@pytest.fixture
def elsewhere(run, monkeypatch):
    """The run, on a machine without SLURM's commands."""
    monkeypatch.setattr(slurm_command, "available", lambda: False)
    return run


def queued(run):
    run.job("7")


def starting(run):
    run.job("7")
    run.attempt(1, job="7")


def requeued(run):
    run.attempt(1, job="7", ended=200.0, verdict="killed", action="requeue", next_job="7")


def submitted_again(run):
    run.attempt(1, job="7", ended=200.0, verdict="stopped", action="end")
    run.job("7")
    run.job("8")


@pytest.mark.parametrize("state", [queued, starting, requeued, submitted_again])
def test_without_slurms_commands_a_run_that_may_begin_is_asked(elsewhere, state, capsys):
    run = elsewhere
    state(run)
    with pytest.raises(UserError, match="SLURM's commands are not here"):
        stop.stop(run.path, now=True)
    assert not (run.path / "stop").exists()
    assert stop.stop(run.path) == 0
    assert (run.path / "stop").exists()
    out = capsys.readouterr().out
    assert "asked its job, if SLURM starts one, to stop" in out
    assert "nobody runs" not in out


def test_without_slurms_commands_waiting_ends_when_the_request_is_heard(elsewhere, monkeypatch):
    run = elsewhere
    queued(run)
    monkeypatch.setattr(stop, "POLL_SECONDS", 0.01)
    thread = threading.Thread(target=lambda: stop.stop(run.path, wait=True), daemon=True)
    thread.start()
    deadline = time.monotonic() + 120
    while not (run.path / "stop").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.1)
    assert thread.is_alive()
    (run.path / "stop").unlink()
    thread.join(120)
    assert not thread.is_alive()


def test_without_slurms_commands_a_run_that_has_ended_is_not_asked(elsewhere, capsys):
    run = elsewhere
    run.job("7")
    run.attempt(1, job="7", ended=200.0, verdict="done", action="finish")
    stop.stop(run.path)
    assert not (run.path / "stop").exists()
    assert "nobody runs" in capsys.readouterr().out


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
