"""One attempt's parts, without SLURM: what is refused, what is read, what is told."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest

from launchers import attempt as attempts
from launchers import (
    checks,
    history,
    job_end,
    job_text,
    judge,
    nodes,
    opening,
    policy,
    preflight,
    resubmit,
    slurm_command,
    slurm_utils,
    staging,
    step_number,
    steps,
    supervisor,
)
from launchers.asked import AskedToStop
from launchers.history import Attempt
from launchers.job_end import JobEnd
from launchers.judge import Situation
from launchers.preflight_types import Problem
from launchers.slurm_utils import SlurmError
from launchers.steps import Limits, Silence, Step, StepEnd
from launchers.supervisor import Supervisor
from titans_pretrain import config as run_config
from titans_pretrain.checkpoint import format as layout
from titans_pretrain.checkpoint import manifest
from titans_pretrain.data.storage import RemoteStorage, open_storage
from titans_pretrain.errors import TitansError, UserError
from titans_pretrain.files import write_json
from titans_pretrain.train import heartbeat
from titans_pretrain.train.directory import RunDirectory

MODEL = {
    "variant": "lmm",
    "vocab_size": 300,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "intermediate_size": 16,
    "memory_depth": 1,
    "chunk_size": 16,
    "num_persistent_tokens": 2,
}
OF_RUN = checks.of_run
JOB = {
    "SLURM_JOB_ID": "7",
    "SLURM_JOB_NODELIST": "a[1-2]",
    "SLURM_TASKS_PER_NODE": "2(x2)",
    "SLURM_JOB_PARTITION": "main",
}


def made(path, data=None, **job):
    tree = {
        "model": MODEL,
        "data": data or {"manifest": str(path / "data" / "manifest.json"), "sequence_length": 64},
        "train": {"steps": 9, "global_batch_size": 4, "learning_rate": 0.1},
        "run": {"directory": str(path)},
        "job": {"nodes": 2, "ranks_per_node": 2} | job,
    }
    if data:
        tree["data"]["sequence_length"] = 64
    return run_config.resolve(tree, source="a test")


def attempt(number=1, job="7", **more):
    return Attempt(number, job, 0, "a1", ("a1", "a2"), begun=100.0, **more)


def checkpoint(run, step):
    path = run.checkpoints / layout.step_name(step)
    path.mkdir(parents=True)
    index = {"format": layout.FORMAT, "files": [], "tensors": {}}
    files = [manifest.write_file(path, layout.TENSORS, json.dumps(index).encode())]
    manifest.write(path, files, {"format": layout.FORMAT, "step": step, "tensors": {}})
    return path


def slurm_job(**more):
    names = list(slurm_utils.Job.__dataclass_fields__)
    return slurm_utils.Job(**dict.fromkeys(names, "") | {"id": "7", "restarts": 0} | more)


@pytest.fixture
def run(tmp_path):
    return RunDirectory(tmp_path)


@pytest.fixture
def known(monkeypatch):
    """Jobs that SLURM knows, by id; all nodes are fine."""
    jobs = {}
    monkeypatch.setattr(slurm_utils, "job", jobs.get)
    monkeypatch.setattr(nodes, "states", lambda partition: {"a1": "idle", "a2": "mixed"})
    monkeypatch.setattr(slurm_command, "call", lambda query: "1000 N/A")
    return jobs


@pytest.fixture
def asked():
    before = {number: signal.getsignal(number) for number in AskedToStop.SIGNALS}
    yield AskedToStop()
    for number, handler in before.items():
        signal.signal(number, handler)


# before


@pytest.mark.parametrize(("body", "variable"), [("pretrain", "CONFIG"), ("sweep", "SWEEP")])
def test_a_signal_before_python_hears_it_does_not_end_the_job(tmp_path, body, variable):
    python = tmp_path / "python"
    code = (
        "import os, signal; from launchers.asked import AskedToStop; me = os.getpid(); "
        "os.kill(me, signal.SIGUSR1); asked = AskedToStop(); os.kill(me, signal.SIGUSR2); "
        "os.kill(me, signal.SIGHUP); "
        "print(asked.names)"
    )
    python.write_text(
        f"#!/bin/sh\nkill -USR1 $$\nkill -HUP $$\nexec {sys.executable} -c '{code}'\n"
    )
    python.chmod(0o755)
    given = {"TITANS_PYTHON": str(python), variable: "x", "SLURM_ARRAY_TASK_ID": "0"}
    given |= {"MODULES": "slow", "BASH_FUNC_module%%": "() { kill -USR1 $$; kill -USR2 $$; }"}
    done = subprocess.run(
        ["bash", job_text.READY / f"{body}.sbatch"],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(job_text.READY.parent)} | given,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "['SIGUSR2', 'SIGHUP']\n"), done.stderr


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


def allocation(**more):
    return slurm_utils.allocation(JOB | more)


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


@pytest.fixture
def begin(tmp_path, monkeypatch, asked):
    """``begin()``: ``titans attempt`` of the run in job 7."""
    path = tmp_path / "run.yaml"
    path.write_text(run_config.dump(made(tmp_path, preflight=False)))
    for name, value in JOB.items():
        monkeypatch.setenv(name, value)
    return lambda: attempts.run(path, asked)


def test_a_twin_leaves_the_running_attempt_its_stop(run, known, begin):
    history.claim(run.path, attempt(job="5", name="x"))
    known["5"] = slurm_job(id="5", state="RUNNING", name="x")
    run.stop.touch()
    with pytest.raises(UserError, match="at work"):
        begin()
    assert run.stop.exists()


def test_the_last_attempt_gets_its_end_where_nothing_is_left_to_do(run, known, begin, capsys):
    history.claim(run.path, attempt(job="5"))
    run.stop.touch()
    assert begin() == 75
    assert history.attempts(run.path)[0].ended is not None
    assert not run.stop.exists()


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


# how it ended

SITUATION = Situation(2, 5, 9, "limit", ["a1", "a2.site"])


def error(code, what="it broke", **more):
    return {"attempt": 2, "rank": 3, "host": "a2", "what": what, "exit_code": code} | more


def test_success_needs_the_last_checkpoint_whatever_srun_says(run):
    done = {"attempt": 2, "outcome": "done", "asked_by": "", "reason": ""}
    assert judge.outcome(run, SITUATION, StepEnd(0)).verdict == "failed"
    write_json(run.outcome, done)
    assert judge.outcome(run, SITUATION, StepEnd(0)).verdict == "failed"
    path = checkpoint(run, 9)
    assert judge.outcome(run, SITUATION, StepEnd(1)).verdict == "done"
    (path / layout.TENSORS).write_text("cut")
    assert judge.outcome(run, SITUATION, StepEnd(0)).verdict == "failed"


def test_records_of_another_attempt_do_not_count(run):
    stop = {"attempt": 1, "outcome": "stopped", "asked_by": "file", "reason": ""}
    write_json(run.outcome, stop)
    write_json(run.error, error(2, attempt=1))
    assert judge.outcome(run, SITUATION, StepEnd(137)).verdict == "failed"


@pytest.mark.parametrize(("by", "asked"), [("file", "user"), ("signal", "limit")])
def test_a_stop_is_the_users_or_slurms(run, by, asked):
    write_json(run.outcome, {"attempt": 2, "outcome": "stopped", "asked_by": by, "reason": "so"})
    checkpoint(run, 6)
    outcome = judge.outcome(run, SITUATION, StepEnd(75))
    assert (outcome.verdict, outcome.asked, outcome.progress) == ("stopped", asked, True)


@pytest.mark.parametrize(("code", "verdict"), [(1, "failed"), (2, "refused"), (75, "hang")])
def test_an_error_of_a_rank_tells_what_it_is(run, code, verdict):
    write_json(run.error, error(code))
    outcome = judge.outcome(run, SITUATION, StepEnd(137, why="it goes on"))
    assert outcome.verdict == verdict
    assert "rank 3 on a2: it broke" in outcome.reason
    assert outcome.suspects == (("a2.site",) if code == 75 else ())


@pytest.mark.parametrize(
    ("code", "first"), [(2, ""), (143, "srun: error: a2: task 3: Exited with exit code 2")]
)
def test_ranks_that_refuse_before_their_log_is_open_are_understood(run, code, first):
    end = StepEnd(code, told=first, error="no such data")
    outcome = judge.outcome(run, SITUATION, end)
    assert (outcome.verdict, outcome.reason) == ("refused", "no such data")
    end = StepEnd(143, told="srun: error: a2: task 3: Exited with exit code 12")
    assert judge.outcome(run, SITUATION, end).verdict == "failed"


def test_a_node_that_lacks_the_program_is_suspected_and_not_the_user(run):
    end = StepEnd(2, told="srun: error: a2: tasks 2-3: Exited with exit code 2")
    outcome = judge.outcome(run, SITUATION, end)
    assert (outcome.verdict, outcome.suspects) == ("failed", ("a2.site",))


def test_a_checkpoint_that_was_there_before_makes_no_attempt_done(run):
    checkpoint(run, 9)
    assert judge.outcome(run, replace(SITUATION, step_from=9), StepEnd(1)).verdict == "failed"
    assert judge.outcome(run, SITUATION, StepEnd(1)).verdict == "done"


@pytest.mark.parametrize("kind", ["limit", "preempted"])
def test_a_failure_without_a_word_counts_as_asked_for_only_if_slurm_signalled(run, kind):
    quiet = replace(SITUATION, asked=kind)
    assert judge.outcome(run, quiet, StepEnd(143)).asked == ""
    assert judge.outcome(run, replace(quiet, signalled=True), StepEnd(143)).asked == kind
    write_json(run.error, error(1))
    assert judge.outcome(run, quiet, StepEnd(143)).asked == ""


PASSING = Problem("", "all 2 nodes: no answer", "wait", passing=True)
LASTING = Problem("", "the disk is full", "free it")


@pytest.mark.parametrize(
    ("problems", "verdict", "suspects"),
    [
        ([PASSING], "failed", ()),
        ([replace(PASSING, node="a1")], "bad node", ("a1",)),
        ([replace(PASSING, node="a1"), replace(PASSING, node="a2")], "failed", ()),
        ([replace(PASSING, node="a1"), replace(LASTING, node="a2")], "bad node", ("a2",)),
        ([PASSING, replace(LASTING, node="a2")], "bad node", ("a2",)),
    ],
)
def test_what_another_try_may_mend_is_tried_again(problems, verdict, suspects):
    outcome = judge.unfit(problems, ["a1", "a2"])
    assert (outcome.verdict, outcome.suspects, outcome.asked) == (verdict, suspects, "")
    assert {"failed": "no answer"}.get(verdict, "") in outcome.reason
    alone = judge.unfit([replace(LASTING, node="a1")], ["a1"])
    assert (alone.verdict, alone.suspects) == ("bad node", ("a1",))


@pytest.mark.parametrize(
    "problems",
    [
        [LASTING],
        [PASSING, LASTING],
        [replace(LASTING, node="a1"), LASTING],
        [replace(LASTING, node="a1"), replace(LASTING, node="a2")],
    ],
)
def test_what_no_other_node_mends_is_the_users(problems):
    with pytest.raises(UserError, match="the disk is full") as error:
        judge.unfit(problems, ["a1", "a2"])
    assert error.value.fix == "free it"


def test_hosts_are_told_by_slurms_names():
    assert judge.named(["a2", "a1.site", "b1", "a2"], ["a1", "a2.site"]) == ("a2.site", "a1")


def test_the_time_limit_is_told_from_a_preemption_by_its_nearness():
    told = {"preempted": lambda: True}
    assert judge.asked_by(1000, 1100, 120, **told) == "limit"
    assert judge.asked_by(1000, 1149, 120, **told) == "limit"  # it may come half a minute early
    assert judge.asked_by(1000, 4000, 120, **told) == "preempted"
    assert judge.asked_by(1000, None, 120, **told) == "preempted"


def test_a_signal_that_is_neither_the_limits_nor_slurms_is_nobodys_and_counts():
    assert judge.asked_by(1000, 4000, 120, preempted=lambda: False) == ""
    stopped = policy.Outcome("stopped", "SIGTERM", "")
    assert policy.fruitless([], "7", stopped) == 1


@pytest.fixture
def clock(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(job_end.time, "time", lambda: now[0])
    return now


def test_a_time_limit_that_is_moved_is_seen(known, clock):
    known["7"] = slurm_job(state="RUNNING", seconds_left=100, end_time=1.0)
    end = JobEnd("7")
    assert (end.limit(), end.is_within(99)) == (1100.0, False)
    clock[0] += 90
    known["7"] = replace(known["7"], seconds_left=3610)
    assert not end.is_within(15)
    assert end.limit() == 4700.0
    known["7"] = replace(known["7"], seconds_left=5)
    assert end.limit() == 1095.0
    assert end.is_within(15)
    known["7"] = replace(known["7"], seconds_left=None)
    assert end.limit() is None
    assert not end.is_within(15)


def test_a_time_limit_is_not_moved_by_an_end_nor_forgotten_in_silence(known, clock, monkeypatch):
    known["7"] = slurm_job(state="RUNNING", seconds_left=100)
    end = JobEnd("7")
    known["7"] = slurm_job(state="COMPLETING", seconds_left=0, end_time=1000.0)
    assert end.limit() == 1100.0
    known["7"] = slurm_job(state="RUNNING", seconds_left=None)  # what squeue says past the limit
    clock[0] += 101
    assert end.limit() == 1100.0
    assert end.is_within(0)

    def silent(job):
        raise SlurmError("no answer")

    monkeypatch.setattr(slurm_utils, "job", silent)
    assert end.limit() == 1100.0
    with pytest.raises(SlurmError):
        JobEnd("7")


@pytest.mark.parametrize(
    ("told", "preempted"),
    [("1000 1200", True), ("1000 N/A", False), ("1000 900", False), ("N/A N/A", False)],
)
def test_slurm_says_whether_this_start_is_preempted(known, monkeypatch, told, preempted):
    monkeypatch.setattr(slurm_command, "call", lambda query: told)
    assert JobEnd("7").is_preempted() is preempted


# the step


def step_of(
    code, asked, *, beats=dict, told=lambda: False, limits=None, kept=None, forward=None, ours=True
):
    return Step(
        [sys.executable, "-c", code],
        os.environ,
        beats=beats,
        ended=told,
        asked=asked,
        is_ours=lambda: ours,
        forward=forward or (lambda process, name: process.terminate()),
        limits=limits or Limits(60),
        save_evidence=(kept if kept is not None else []).append,
    ).run()


def test_a_step_that_ends_by_itself_has_its_exit_code(asked):
    end = step_of("import sys; sys.exit(7)", asked)
    assert (end.code, end.why, end.suspects) == (7, "", ())


def test_ranks_are_asked_once_where_the_signal_before_the_limit_is_late_or_lost(asked):
    told = []
    limits = Limits(60, is_due=lambda: True)

    def forward(process, name):
        told.append(name)
        if len(told) == 1:
            threading.Timer(2.0, process.terminate).start()

    step_of("import time; time.sleep(60)", asked, limits=limits, forward=forward)
    assert len(told) == 1


def test_ranks_records_are_read_no_more_often_than_they_are_written(asked):
    looks = []
    beats = lambda: looks.append(1) or {}  # noqa: E731
    step_of("import time; time.sleep(2.5)", asked, beats=beats)
    assert len(looks) == 1


def test_a_look_that_takes_long_counts_as_silence(asked, monkeypatch):
    step = Step(
        [], {}, beats=dict, ended=lambda: False, asked=asked, is_ours=lambda: True,
        forward=lambda process, name: None, limits=Limits(25.0), save_evidence=print,
    )  # fmt: skip
    clock = iter([0.0, 0.0, 20.0, 40.0, 60.0])
    monkeypatch.setattr(steps.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(steps.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(steps, "_kill", lambda process: None)
    monkeypatch.setattr(step, "_keeps", lambda process: True)
    running = type("Running", (), {"poll": lambda self: None})()
    assert "within 25 s" in step._watch(running)
    assert next(clock) == 60.0


def test_a_signal_is_forwarded_once(asked):
    told = []

    def forward(process, name):
        told.append(name)
        process.terminate()

    os.kill(os.getpid(), signal.SIGUSR1)
    assert step_of("import time; time.sleep(60)", asked, forward=forward).code == -15
    assert told == ["SIGUSR1"]


@pytest.mark.parametrize(
    ("limits", "told", "beats", "why"),
    [
        (Limits(0.5), False, {}, "within 0.5 s of the start"),
        (Limits(60), True, {}, "after its ranks told their end"),
        (Limits(60), False, {0: {"time": 1, "host": "a1"}}, "no rank gave a sign of life for"),
        (Limits(60, is_over=lambda: True), False, {}, "before the time limit"),
    ],
)
def test_a_step_is_ended_from_outside(asked, monkeypatch, limits, told, beats, why):
    monkeypatch.setattr(steps, "LOOK_SECONDS", 0.5)
    monkeypatch.setattr(steps, "SILENT_SECONDS", 1.0)
    monkeypatch.setattr(steps, "ENDING_SECONDS", 1.0)
    kept = []
    code = "import time; time.sleep(60)"
    end = step_of(code, asked, beats=lambda: beats, told=lambda: told, limits=limits, kept=kept)
    assert why in end.why
    assert kept == ([] if limits.is_over() else [end.why])
    assert end.code == -15
    assert end.late == limits.is_over()


@pytest.mark.parametrize("cause", ["signal", "end", "frozen"])
def test_the_step_of_a_later_start_is_neither_told_nor_ended(asked, monkeypatch, tmp_path, cause):
    """srun tells a helper of its end, which then ends the step by its number."""
    srun = "import os, sys, time; out, into = os.pipe(); child = os.fork() == 0\n"
    srun += "if child: os.close(into); os.read(out, 1); open(sys.argv[1], 'w')\n"
    path = tmp_path / "the successor's step is ended"
    srun = srun.replace("sys.argv[1]", repr(str(path))) + "else: time.sleep(60)\n"
    if cause == "signal":
        os.kill(os.getpid(), signal.SIGUSR1)
    if cause == "frozen":
        monkeypatch.setattr(steps, "FROZEN_SECONDS", 0.1)
    told, kept = [], []
    limits = Limits(1.0 if cause == "end" else 60)
    forward = lambda process, name: told.append(name)  # noqa: E731
    end = step_of(srun, asked, limits=limits, kept=kept, forward=forward, ours=False)
    assert (end.code, told, kept) == (-signal.SIGKILL, [], [])
    assert "another start" in end.why
    assert not path.exists()


def test_the_first_task_that_died_is_told_and_its_node_suspected_if_it_was_killed(asked):
    lines = [
        "srun: error: a2: task 3: Killed",
        "srun: launch/slurm: _step_signal: Terminating StepId=2.0",
        "srun: error: a1: tasks 0-1: Killed",
    ]
    code = "import sys; sys.stderr.write({!r}); sys.exit(137)"
    end = step_of(code.format("\n".join([*lines, ""])), asked)
    assert (end.told, end.suspects) == (lines[0], ("a2",))
    told = step_of("import sys; sys.stderr.write('x\\nerror: no data\\nwhere: here\\n')", asked)
    assert told.error == "no data"
    lines[0] = "srun: error: a2: task 3: Exited with exit code 1"
    assert step_of(code.format("\n".join([*lines, ""])), asked).suspects == ()


def test_silence_is_measured_by_the_longest_so_far():
    silence = Silence()
    silence.add({0: {"time": 1.0, "host": "a1"}, 1: {"time": 1.0, "host": "a2"}}, 1.0)
    assert (silence.begun, silence.seconds, silence.limit) == (True, 0.0, steps.SILENT_SECONDS)
    silence.add({0: {"time": 1.0, "host": "a1"}}, 20.0)
    assert silence.seconds == 20.0
    silence.add({0: {"time": 2.0, "host": "a1"}}, 1.0)
    assert (silence.seconds, silence.limit) == (0.0, 210.0)
    silence.add({0: {"time": 3.0, "host": "a1"}}, 100.0)
    assert silence.nodes() == ["a2"]


def test_ranks_do_not_meet_where_the_shell_that_submits_was_told():
    names = ("RANK", "LOCAL_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    others = dict.fromkeys((*names, "MASTER_ADDR", "MASTER_PORT"), "7")
    rest = {"attempt": 1, "end": None, "preempt_seconds": None, "cpus_per_rank": 1}
    assert not others.keys() & steps.rank_environment(others, {}, **rest).keys()
    given = steps.rank_environment(others, {"MASTER_ADDR": "ib0.a1"}, **rest)
    assert given["MASTER_ADDR"] == "ib0.a1"


def test_ranks_are_told_of_their_attempt_and_their_end():
    given = steps.rank_environment(
        {"OMP_NUM_THREADS": "3", "HOME": "/h"},
        {"NCCL_DEBUG": "WARN"},
        attempt=4,
        end=1234.5,
        preempt_seconds=None,
        cpus_per_rank=8,
    )
    assert given["TITANS_ATTEMPT"] == "4"
    assert given["TITANS_JOB_END"] in ("1234", "1235")
    assert (given["OMP_NUM_THREADS"], given["NCCL_DEBUG"], given["HOME"]) == ("3", "WARN", "/h")
    assert "TITANS_PREEMPT_SECONDS" not in given
    rest = {"attempt": 4, "end": None, "preempt_seconds": 30.0, "cpus_per_rank": 8}
    given = steps.rank_environment({}, {}, **rest)
    assert (given["OMP_NUM_THREADS"], given["TITANS_PREEMPT_SECONDS"]) == ("8", "30")
    assert "TITANS_JOB_END" not in given


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


@pytest.mark.parametrize(("restarts", "used"), [(0, [2, 3]), (1, [2, 3, 4]), (3, [2]), (7, [2])])
def test_starts_in_a_row_use_different_step_numbers(monkeypatch, restarts, used):
    numbers, asked_for = iter(range(2, 20)), []

    def srun(command, **more):
        asked_for.append(next(numbers))
        return subprocess.CompletedProcess(command, 0, f"{asked_for[-1]}\n", "")

    monkeypatch.setattr(step_number.subprocess, "run", srun)
    step_number.set_apart("7", restarts)
    assert asked_for == used


def test_a_step_that_slurm_does_not_run_keeps_no_attempt_from_training(monkeypatch):
    def srun(command, **more):
        return subprocess.CompletedProcess(command, 1, "", "busy")

    monkeypatch.setattr(step_number.subprocess, "run", srun)
    step_number.set_apart("7", 1)


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


def test_a_row_that_the_time_limit_ended_is_refused_with_what_mends_it(tmp_path):
    late = attempt(step_to=0, ended=1.0, verdict="stopped", asked="limit", next_job="7")
    with pytest.raises(TitansError) as error:
        opening.refuse_fruitless([late, late], allocation(), made(tmp_path, restarts=2))
    assert "job.signal_seconds" in error.value.fix


# what comes next


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


FAILED = policy.Outcome("failed", "why", progress=True)
HANG = policy.Outcome("hang", "why", progress=True, suspects=("a2",))
SPARE = {"a1": "idle", "a2": "mixed", "a3": "idle"}


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


def test_a_process_whose_job_was_given_away_is_not_current(run, known):
    history.claim(run.path, attempt())
    assert resubmit.is_current(run.path, 1, allocation()) is None
    known["7"] = slurm_job(state="RUNNING")
    assert resubmit.is_current(run.path, 1, allocation()) == known["7"]
    known["7"] = slurm_job(state="RUNNING", restarts=1)
    assert resubmit.is_current(run.path, 1, allocation()) is None
    known["7"] = slurm_job(state="PENDING")
    assert resubmit.is_current(run.path, 1, allocation()) is None
    known["7"] = slurm_job(state="RUNNING")
    history.claim(run.path, attempt(2, job="8"))
    assert resubmit.is_current(run.path, 1, allocation()) is None
    assert resubmit.is_newest(run.path, 2)
    assert not resubmit.is_newest(run.path, 1)


@pytest.mark.parametrize(
    ("dependency", "after"),
    [
        ("afterok:7(unfulfilled)", "afterok:9"),
        ("afterok:7(unfulfilled),singleton(unfulfilled)", "afterok:9,singleton"),
        ("afterok:6:7:8", "afterok:6:9:8"),
        ("afterany:7+5?afterok:17", "afterany:9+5?afterok:17"),
        ("afterok:17(unfulfilled),afterok:70(unfulfilled)", None),
        ("afterok:7_3(unfulfilled)", None),
        ("", None),
    ],
)
def test_a_dependency_names_the_new_job_instead_of_the_old(dependency, after):
    assert resubmit.moved(dependency, "7", "9") == after


def test_nodes_to_spare_are_those_that_slurm_would_use():
    states = {"a1": "idle", "a2": "allocated", "a3": "down", "a4": "idle*", "a5": "drained"}
    assert nodes.spare(states | {"a6": "mixed-"}, 2, []) == 1
    assert nodes.spare(states | {"a6": "mixed-"}, 2, ["a1"]) == 0
    assert nodes.spare(states, 4, []) == 0
    assert nodes.lost(["a1", "a3", "a4", "b9"], states) == ("a3", "a4")


# staging


def test_data_is_read_through_a_cache_on_the_node(tmp_path):
    config = made(tmp_path, stage_data=True, local_directory=str(tmp_path / "scratch"))
    path = tmp_path / "run.yaml"
    path.write_text(run_config.dump(config))
    staged = run_config.load(path, staging.overrides(config))
    assert staged.data.manifest == f"local://{config.data.manifest}"
    assert staged.data.cache.startswith(str(tmp_path / "scratch" / "titans-"))
    shards = tmp_path / "data"
    shards.mkdir()
    (shards / "a.bin").write_bytes(b"0123456789")
    place = staged.data.manifest.removesuffix("/manifest.json")
    storage = open_storage(place, cache=tmp_path / "scratch", cache_bytes=2**24)
    assert isinstance(storage, RemoteStorage)
    assert storage.sizes(["a.bin", "b.bin"]) == {"a.bin": 10}
    assert bytes(storage.read("a.bin", 2, 5)) == b"234"
    assert any(file.is_file() for file in (tmp_path / "scratch").rglob("*"))


def test_every_part_of_a_mixture_is_staged_and_what_is_remote_stays(tmp_path):
    parts = [{"manifest": "/d/a: #1/manifest.json", "weight": 1.0}]
    parts += [{"manifest": "s3://b/manifest.json", "weight": 2.0}]
    config = made(tmp_path, {"mixture": parts}, stage_data=True, local_directory="/scratch")
    path = tmp_path / "run.yaml"
    path.write_text(run_config.dump(config))
    staged = run_config.load(path, staging.overrides(config))
    wanted = [("local:///d/a: #1/manifest.json", 1.0), ("s3://b/manifest.json", 2.0)]
    assert staged.data.parts == wanted


def test_staging_needs_a_directory_of_the_node(tmp_path):
    with pytest.raises(UserError, match=r"job\.local_directory"):
        staging.overrides(made(tmp_path, stage_data=True, local_directory="here"))
    assert staging.overrides(made(tmp_path, local_directory="/scratch")) == []
