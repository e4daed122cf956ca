"""One attempt at work: its step, what follows its end, what SLURM is then asked."""

import sys
from dataclasses import replace

import pytest
from attempt_parts import allocation, attempt, made, slurm_job

from launchers import (
    checks,
    history,
    nodes,
    policy,
    preflight,
    resubmit,
    slurm_command,
    slurm_utils,
    supervisor,
)
from launchers.job_end import JobEnd
from launchers.slurm_utils import SlurmError
from launchers.steps import StepEnd
from launchers.supervisor import Supervisor
from titans_pretrain.files import write_json
from titans_pretrain.train.directory import RunDirectory

OF_RUN = checks.of_run
FAILED = policy.Outcome("failed", "why", progress=True)
HANG = policy.Outcome("hang", "why", progress=True, suspects=("a2",))
SPARE = {"a1": "idle", "a2": "mixed", "a3": "idle"}


@pytest.fixture
def supervised(tmp_path, known, asked, monkeypatch):
    """``supervised(job-section)``: attempt 1 at work, and the steps that it makes."""
    made_steps = []

    def record(command, environment, **more):
        made_steps.append(command)
        return type("Made", (), {"run": lambda self: StepEnd(1)})()

    monkeypatch.setattr(supervisor, "Step", record)
    monkeypatch.setattr(supervisor.step_number, "set_apart", lambda job, restarts: None)
    monkeypatch.setattr(supervisor.checks, "of_run", lambda config, path, **more: None)
    known["7"] = slurm_job(state="RUNNING", seconds_left=3600)

    def make(**job):
        config = made(tmp_path, preflight=False, preempt_seconds=5.0, **job)
        history.claim(tmp_path, attempt())
        path = tmp_path / "run.yaml"
        run = RunDirectory(tmp_path)
        end = JobEnd("7")
        return Supervisor(config, path, run, allocation(), attempt(), end, asked), made_steps

    return make


def test_ranks_in_a_container_run_its_python(supervised):
    image = {"runtime": "apptainer", "image": "/i.sif"}
    one, made_steps = supervised(container=image)
    assert one.outcome().verdict == "failed"
    (command,) = made_steps
    assert command[command.index("/i.sif") + 1] == "python3"
    assert sys.executable not in command


def test_a_rate_that_preflight_measured_stops_no_attempt(supervised, monkeypatch, capsys):
    one, made_steps = supervised()
    job = one.config.job.model_copy(update={"preflight": True})
    one = replace(one, config=one.config.model_copy(update={"job": job}))
    verdict = preflight.Verdict((), 100.0, 1.0)
    monkeypatch.setattr(preflight, "check", lambda *given, **more: verdict)
    monkeypatch.setattr(supervisor.checks, "of_run", OF_RUN)
    assert one.outcome().verdict == "failed"
    assert len(made_steps) == 1
    assert "job.signal_seconds: 120 is too short" in capsys.readouterr().out


def test_a_process_whose_job_was_given_away_meanwhile_trains_nothing(supervised, known):
    one, made_steps = supervised()
    known["7"] = slurm_job(state="RUNNING", restarts=1)
    assert one.outcome().verdict == "killed"
    assert made_steps == []


def test_while_slurm_does_not_answer_the_records_tell_whose_the_run_is(supervised, monkeypatch):
    def silent(job):
        raise SlurmError("no answer")

    one, made_steps = supervised()
    monkeypatch.setattr(slurm_utils, "job", silent)
    assert one.outcome().verdict == "failed"
    history.claim(one.directory.path, attempt(2, job="8"))
    assert one.outcome().verdict == "killed"
    assert len(made_steps) == 1


@pytest.fixture
def acted(monkeypatch):
    """What SLURM was asked to do next; ``refused`` holds what it does not do."""
    done = type("Acted", (), {"asked": [], "refused": set()})()

    def do(what):
        done.asked.append(what)
        if what in done.refused:
            raise SlurmError(f"{what} is not allowed")

    def resubmitted(run, path, exclude):
        do("resubmit")
        return "8"

    monkeypatch.setattr(resubmit, "requeue", lambda allocation, asked: do("requeue"))
    monkeypatch.setattr(resubmit, "resubmit", resubmitted)
    monkeypatch.setattr(resubmit, "move_dependents", lambda old, new, say: None)
    monkeypatch.setattr(resubmit, "script", lambda run: run / "train.sbatch")
    return done


def ends(one, outcome):
    decision = one.decide(outcome, [])
    one.end(outcome, decision)
    return decision


@pytest.mark.parametrize("state", ["COMPLETING", "CANCELLED"])
def test_a_job_cancelled_while_its_end_was_put_down_does_not_come_back(
    supervised, known, acted, state
):
    one, _ = supervised()
    decision = ends(one, FAILED)
    assert decision.action == "requeue"
    known["7"] = slurm_job(state=state)
    assert one.act(decision) == 75
    assert acted.asked == []
    (record,) = history.attempts(one.directory.path)
    assert (record.action, record.next_job) == ("end", "")


@pytest.mark.parametrize(
    ("state", "reason", "action"),
    [
        ("COMPLETING", "", "end"),
        ("COMPLETING", "TimeLimit", "requeue"),
        ("SIGNALING", "", "requeue"),
        ("SUSPENDED", "", "requeue"),
        ("CANCELLED", "", "end"),
    ],
)
def test_only_a_job_that_slurm_is_ending_ends(supervised, known, acted, state, reason, action):
    one, _ = supervised()
    known["7"] = slurm_job(state=state, reason=reason)
    assert one.decide(FAILED, []).action == action


def test_a_refused_resubmission_is_a_requeue_and_the_reverse(supervised, acted, monkeypatch):
    monkeypatch.setattr(nodes, "states", lambda partition: SPARE)
    one, _ = supervised()
    decision = ends(one, HANG)
    assert decision.action == "resubmit"
    acted.refused.add("resubmit")
    assert one.act(decision) == 75
    assert acted.asked == ["resubmit", "requeue"]
    (record,) = history.attempts(one.directory.path)
    assert (record.action, record.next_job) == ("requeue", "7")
    acted.refused = {"requeue"}
    assert one.act(replace(decision, action="requeue")) == 75
    (record,) = history.attempts(one.directory.path)
    assert (record.action, record.next_job) == ("resubmit", "8")
    acted.refused.add("resubmit")
    with pytest.raises(SlurmError):
        one.act(decision)
    assert history.attempts(one.directory.path)[0].action == "end"


@pytest.mark.parametrize(("mode", "action"), [("CANCEL", "resubmit"), ("REQUEUE", "end")])
def test_a_job_that_is_preempted_for_good_is_submitted_again(
    supervised, known, acted, monkeypatch, mode, action
):
    facts = {"main": {"PreemptMode": mode}}
    monkeypatch.setattr(nodes.slurm_refusals, "partitions", lambda: facts)
    one, _ = supervised()
    known["7"] = slurm_job(state="COMPLETING")
    assert one.decide(FAILED, []).action == "end"
    monkeypatch.setattr(slurm_command, "call", lambda query: "1000 1200")
    assert one.decide(FAILED, []).action == action


def test_a_run_that_is_done_needs_no_answer_and_another_waits_for_it(supervised, monkeypatch):
    answers = [SlurmError("no answer"), SlurmError("no answer"), slurm_job(state="RUNNING")]
    one, _ = supervised()

    def hesitant(job):
        answer = answers.pop(0)
        if isinstance(answer, SlurmError):
            raise answer
        return answer

    monkeypatch.setattr(slurm_utils, "job", hesitant)
    monkeypatch.setattr(supervisor.time, "sleep", lambda seconds: None)
    assert one.decide(policy.Outcome("done", "all"), []).action == "finish"
    assert len(answers) == 3
    assert one.decide(FAILED, []).action == "requeue"
    assert answers == []


def test_a_proven_run_is_only_warned_of_a_slow_save(supervised, monkeypatch, capsys):
    monkeypatch.setattr(supervisor.checks, "of_run", OF_RUN)
    one, made_steps = supervised()
    write_json(one.directory.last_save, {"step": 2, "seconds": 500.0, "bytes": 1})
    assert one.outcome().verdict == "refused"
    assert made_steps == []
    history.write(one.directory.path, replace(attempt(), step_to=2, ended=1.0))
    assert one.outcome().verdict == "failed"
    assert len(made_steps) == 1
    assert "job.signal_seconds: 120 is too short" in capsys.readouterr().out


def test_ranks_are_told_the_end_at_which_they_are_killed(supervised, monkeypatch):
    one, _ = supervised()
    told = []

    def record(command, environment, **more):
        told.append(float(environment["TITANS_JOB_END"]))
        return type("Made", (), {"run": lambda self: StepEnd(1)})()

    monkeypatch.setattr(supervisor, "Step", record)
    one.outcome()
    assert told == [pytest.approx(one.job_end.limit() - supervisor.END_MARGIN_SECONDS, abs=2.0)]
