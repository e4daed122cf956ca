"""What is refused before an attempt, and how the one before it is closed."""

import fcntl
import time
from dataclasses import replace

import pytest
from attempt_parts import JOB, allocation, attempt, checkpoint, made, slurm_job

from launchers import history, nodes, opening, policy, slurm_command, slurm_utils
from launchers.slurm_utils import SlurmError
from titans_pretrain.errors import TitansError, UserError
from titans_pretrain.files import write_json
from titans_pretrain.train import heartbeat


def test_outside_of_a_job_an_attempt_is_refused(tmp_path):
    with pytest.raises(UserError, match="no job of SLURM") as error:
        opening.checked_allocation(made(tmp_path), {})
    assert "titans submit" in error.value.fix
    assert "titans train" in error.value.fix


@pytest.mark.parametrize(
    "given", [{"SLURM_TASKS_PER_NODE": "4"}, {"SLURM_TASKS_PER_NODE": "2(x3)"}, {}]
)
def test_an_allocation_must_be_that_of_the_run(tmp_path, given):
    config = made(tmp_path)
    if not given:
        assert opening.checked_allocation(config, JOB).tasks == 4
        return
    with pytest.raises(UserError) as error:
        opening.checked_allocation(config, JOB | given)
    assert "--nodes=2 --ntasks-per-node=2" in error.value.fix


def test_a_mesh_that_the_ranks_do_not_fill_is_refused(tmp_path):
    with pytest.raises(UserError, match="3 ranks"):
        opening.checked_allocation(made(tmp_path, nodes=3, ranks_per_node=1), JOB)


@pytest.mark.parametrize("state", ["RUNNING", "SUSPENDED", "CONFIGURING"])
def test_an_attempt_at_work_is_left_alone(run, known, state):
    history.claim(run.path, attempt(job="5"))
    known["5"] = slurm_job(id="5", state=state, name=allocation().name)
    with pytest.raises(UserError, match="job 5 on a1"):
        opening.close_open(run, allocation(), 9)
    assert history.attempts(run.path) == [attempt(job="5")]


@pytest.mark.parametrize(
    "state", ["", "PENDING", "COMPLETING", "NODE_FAIL", "TIMEOUT", "CANCELLED"]
)
def test_an_attempt_whose_job_is_over_gets_its_end(run, known, state):
    history.claim(run.path, attempt(job="5"))
    if state:
        known["5"] = slurm_job(id="5", state=state)
    (closed,) = opening.close_open(run, allocation(), 9)
    assert history.attempts(run.path) == [closed]
    assert closed.verdict == "killed"
    assert closed.ended is not None


def test_an_attempt_of_another_job_does_not_count_for_a_new_submission(run, known):
    history.claim(run.path, attempt(job="5"))
    before = opening.close_open(run, allocation(), 9)
    assert policy.fruitless(before, "7") == 0
    assert policy.fruitless(before, "5") == 1


def test_a_job_started_again_closes_its_own_last_attempt_and_no_later_one(run, known):
    known["7"] = slurm_job(state="RUNNING", restarts=1)
    history.claim(run.path, attempt())
    with pytest.raises(UserError):
        opening.close_open(run, allocation(), 9)
    (closed,) = opening.close_open(run, allocation(SLURM_RESTART_COUNT="1"), 9)
    assert closed.next_job == "7"
    history.claim(run.path, replace(attempt(2), restart=2))
    with pytest.raises(UserError):
        opening.close_open(run, allocation(SLURM_RESTART_COUNT="1"), 9)


def test_while_slurm_does_not_answer_nobody_is_taken_for_dead(run, monkeypatch):
    def silent(job):
        raise SlurmError("no answer")

    monkeypatch.setattr(slurm_utils, "job", silent)
    history.claim(run.path, replace(attempt(job="5"), begun=time.time()))
    with pytest.raises(SlurmError):
        opening.close_open(run, allocation(), 9)
    assert history.attempts(run.path)[0].ended is None


@pytest.fixture
def forgotten(known, monkeypatch):
    """A job that only an accounting that fails may remember."""

    def broken(job):
        raise SlurmError("sacct: no connection")

    monkeypatch.setattr(slurm_utils, "job", broken)


def test_an_attempt_of_long_ago_without_a_sign_of_life_is_over_whatever_slurm_says(run, forgotten):
    history.claim(run.path, attempt(job="5"))
    (closed,) = opening.close_open(run, allocation(), 9)
    assert closed.verdict == "killed"


@pytest.mark.parametrize("sign", ["beat", "lock"])
def test_an_attempt_that_gives_signs_of_life_is_at_work_whatever_slurm_says(run, forgotten, sign):
    history.claim(run.path, attempt(job="5"))
    with open(run.lock, "w") as holder:
        if sign == "lock":
            fcntl.flock(holder, fcntl.LOCK_EX)
        else:
            heartbeat.write(run, {"attempt": 1, "rank": 0, "time": time.time()})
        with pytest.raises(UserError, match="at work"):
            opening.close_open(run, allocation(), 9)


def test_another_runs_job_that_has_its_id_by_now_keeps_no_attempt_open(run, known):
    history.claim(run.path, attempt(job="5", name="by-hand"))
    known["5"] = slurm_job(id="5", state="RUNNING", name="by-hand")
    with pytest.raises(UserError, match="at work"):
        opening.close_open(run, allocation(), 9)
    known["5"] = slurm_job(id="5", state="RUNNING", name="something-else")
    (closed,) = opening.close_open(run, allocation(), 9)
    assert closed.verdict == "killed"


def test_a_preemption_that_the_ranks_could_not_tell_of_is_told_by_slurm(run, known, monkeypatch):
    history.claim(run.path, attempt())
    monkeypatch.setattr(slurm_command, "call", lambda query: "300 200")
    (closed,) = opening.close_open(run, allocation(SLURM_RESTART_COUNT="1"), 9)
    assert (closed.verdict, closed.asked) == ("killed", "preempted")
    assert policy.fruitless([closed], "7") == 0


def test_a_stop_that_its_attempt_could_not_act_upon_ends_the_jobs_next_start_once(run, known):
    history.claim(run.path, attempt())
    told = {"attempt": 1, "outcome": "stopped", "asked_by": "file", "reason": "stop"}
    write_json(run.outcome, told)
    again = allocation(SLURM_RESTART_COUNT="1")
    before = opening.close_open(run, again, 9)
    assert opening.consume_stop(run, again, before)
    assert not opening.consume_stop(run, again, opening.close_open(run, again, 9))


def test_a_stop_of_the_users_does_not_end_what_they_submit_after_it(run, known):
    history.claim(run.path, attempt(job="5"))
    told = {"attempt": 1, "outcome": "stopped", "asked_by": "file", "reason": "stop"}
    write_json(run.outcome, told)
    assert not opening.consume_stop(run, allocation(), opening.close_open(run, allocation(), 9))


def test_what_a_killed_attempt_had_told_counts(run, known):
    history.claim(run.path, attempt())
    known["7"] = slurm_job(state="RUNNING", restarts=1)
    stop = {"attempt": 1, "outcome": "stopped", "asked_by": "signal", "reason": "SIGTERM"}
    write_json(run.outcome, stop)
    checkpoint(run, 4)
    run.metrics.write_text('{"step": 5}\n{"step": 6}\n{"ste')
    (closed,) = opening.close_open(run, allocation(SLURM_RESTART_COUNT="1"), 9)
    assert (closed.verdict, closed.asked) == ("stopped", "preempted")
    assert (closed.step_to, closed.lost_steps, closed.progress) == (4, 2, True)


def test_a_lost_node_is_the_suspect_of_a_killed_attempt(run, known, monkeypatch):
    monkeypatch.setattr(nodes, "states", lambda partition: {"a1": "idle", "a2": "down*"})
    history.claim(run.path, attempt())
    (closed,) = opening.close_open(run, allocation(SLURM_RESTART_COUNT="1"), 9)
    assert (closed.verdict, closed.suspects) == ("killed", ("a2",))


def test_no_attempt_begins_after_a_row_of_fruitless_ones(tmp_path):
    failed = attempt(step_to=0, ended=1.0, verdict="failed", reason="boom", next_job="7")
    with pytest.raises(TitansError, match=r"2 attempts in a row.*boom") as error:
        opening.refuse_fruitless([failed, failed], allocation(), made(tmp_path, restarts=2))
    assert error.value.exit_code == 1
    opening.refuse_fruitless([failed, failed], allocation(), made(tmp_path, restarts=3))


def test_a_row_that_the_time_limit_ended_is_refused_with_what_mends_it(tmp_path):
    late = attempt(step_to=0, ended=1.0, verdict="stopped", asked="limit", next_job="7")
    with pytest.raises(TitansError) as error:
        opening.refuse_fruitless([late, late], allocation(), made(tmp_path, restarts=2))
    assert "job.signal_seconds" in error.value.fix
