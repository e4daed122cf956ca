"""Attempts of a run on a real cluster, with ranks that play their part in seconds."""

import json
import os
import signal
from pathlib import Path

import pytest
from attempt_cases import StubRun
from slurm_cluster import until


def all_steps(run, count=20):
    assert run.steps == [*dict.fromkeys(run.steps)][:count] or sorted(set(run.steps)) == run.steps
    assert set(run.steps) == set(range(1, count + 1))


def started(run, attempt=1, step=2):
    """Waits until an attempt has done a step."""
    until(lambda: (run.path / f"environment-{attempt}.json").exists(), 60, "an attempt to start")
    until(lambda: (run.path / "metrics.jsonl").exists() and run.steps[-1:] >= [step], 60, "steps")


def begun(run, number):
    until(lambda: len(run.attempts) >= number, 60, f"attempt {number} to begin")


def words(pid):
    """A process's command; empty if it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def is_srun(pid):
    return words(pid).startswith(b"srun\0")


def starts_ranks(pid):
    """Whether a process is `titans attempt`, or srun or its helper."""
    return is_srun(pid) or b"quick_attempt.py" in words(pid)


def test_a_run_trains_to_its_end(slurm, tmp_path):
    run = StubRun(tmp_path / "run", environment={"NCCL_DEBUG": "WARN"})
    job = slurm.submit(run.script)
    assert slurm.wait(job) == {"COMPLETED"}
    assert run.verdicts == ["done"]
    all_steps(run)
    environment = run.environment(1)
    told = {"TITANS_ATTEMPT": "1", "PYTHONFAULTHANDLER": "1", "NCCL_DEBUG": "WARN"}
    assert told.items() <= environment.items()
    assert float(environment["TITANS_JOB_END"]) == pytest.approx(
        run.attempts[0].begun + 300, abs=60
    )
    again = slurm.submit(run.script)
    assert slurm.wait(again) == {"COMPLETED"}
    assert "finished already" in run.log
    assert run.verdicts == ["done"]


def test_a_crash_is_requeued_and_a_hang_leaves_its_node_out_with_the_dependents(slurm, tmp_path):
    run = StubRun(tmp_path / "run", plays=["crash", "hang"])
    job = slurm.submit(run.script)
    waiting = slurm.submit(f"--dependency=afterok:{job}", "-o", "/dev/null", "--wrap", "true")
    assert slurm.wait(waiting) == {"COMPLETED"}
    first, second, third = run.attempts
    assert [first.verdict, second.verdict, third.verdict] == ["failed", "hang", "done"]
    assert "made up" in first.reason
    assert first.next_job == second.job == job
    assert second.next_job == third.job != job
    assert second.suspects == (second.nodes[1],)
    assert not {second.nodes[1]} & set(third.nodes)
    rows = (run.path / "jobs" / "jobs.jsonl").read_text().splitlines()
    assert [json.loads(row)["job"] for row in rows] == [third.job]
    assert f"job {waiting} now waits for job {third.job}" in run.log


def test_attempts_that_save_nothing_come_to_an_end(slurm, tmp_path):
    run = StubRun(tmp_path / "run", plays=["crash"] * 5, restarts=2)
    job = slurm.submit(run.script)
    assert slurm.wait(job) == {"FAILED"}
    assert run.verdicts == ["failed", "failed"]
    assert "2 attempts in a row saved nothing new: rank 3" in run.log
    assert "titans submit" in run.log
    slurm.run("scontrol", "requeue", job)
    until(lambda: slurm.restarts(job) == 2 and slurm.states(job) == {"FAILED"}, 60, "the next end")
    assert run.verdicts == ["failed", "failed"]


def test_the_users_mistake_is_not_tried_again(slurm, tmp_path):
    run = StubRun(tmp_path / "run", plays=["refuse"])
    assert slurm.wait(slurm.submit(run.script)) == {"FAILED"}
    assert run.verdicts == ["refused"]
    assert "the data is not there" in run.log


def test_a_signal_is_told_to_the_ranks_and_is_that_of_the_limit_only_near_it(slurm, tmp_path):
    plays = ["slow", "slow"]
    run = StubRun(tmp_path / "run", plays=plays, signal_seconds=245, preempt_seconds=7.5)
    job = slurm.submit(run.script)
    started(run)
    slurm.run("scancel", "--batch", "--signal=USR1", job)
    begun(run, 2)
    started(run, 2, run.attempts[1].step_from + 2)
    slurm.run("scontrol", "update", f"jobid={job}", "TimeLimit=60")
    slurm.run("scancel", "--batch", "--signal=USR1", job)
    assert slurm.wait(job) == {"COMPLETED"}
    first, second, third = run.attempts
    assert [first.asked, second.asked] == ["limit", ""]  # SLURM preempts nothing
    assert "SIGUSR1" in first.reason
    assert "SIGTERM" in second.reason  # how ranks know a preemption
    assert [first.lost_steps, second.lost_steps] == [0, 0]
    assert (second.step_from, third.step_from) == (first.step_to, second.step_to)
    assert run.steps == list(range(1, 21))
    assert run.environment(1)["TITANS_PREEMPT_SECONDS"] == "7.5"


@pytest.mark.parametrize(
    "settings",
    [
        "",
        pytest.param(
            "SlurmctldParameters=preempt_send_user_signal", marks=pytest.mark.slow, id="user signal"
        ),
    ],
)
def test_a_preempted_run_goes_on_when_its_nodes_are_free_again(slurm, tmp_path, settings):
    slurm.reconfigure(settings)
    run = StubRun(tmp_path / "run", plays=["slow"], nodes=4)
    job = slurm.submit("--partition=low", run.script)
    started(run)
    urgent = slurm.submit(
        "--partition=high", "-N4", "-o", "/dev/null", "--exclusive", "--wrap", "true"
    )
    assert slurm.wait(urgent) == {"COMPLETED"}
    assert slurm.wait(job) == {"COMPLETED"}
    first, second = run.attempts
    assert (first.verdict, first.asked, first.lost_steps) == ("stopped", "preempted", 0)
    assert second.step_from == first.step_to > 0
    assert run.steps == list(range(1, 21))
    slurm.reset("")


def test_a_node_that_fails_costs_the_steps_since_the_last_save(slurm, tmp_path):
    run = StubRun(tmp_path / "run", plays=["slow"], every=2)
    job = slurm.submit(run.script)
    started(run, step=3)
    slurm.node_fail(run.attempts[0].nodes[0])
    assert slurm.wait(job) == {"COMPLETED"}
    first, second = run.attempts
    assert (first.verdict, first.step_to) == ("killed", second.step_from)
    assert first.lost_steps < 3
    assert first.nodes[0] in first.reason
    assert first.nodes[0] not in second.nodes


@pytest.mark.slow
def test_a_controller_that_is_away_at_the_end_is_waited_for(slurm, tmp_path):
    run = StubRun(tmp_path / "run", plays=["slow"])
    job = slurm.submit(run.script)
    started(run)
    slurm.controller_crash()
    (run.path / "plays.json").write_text("{}")
    until(lambda: run.steps[-1] >= 6, 60, "steps without a controller")
    slurm.controller_boot()
    slurm.run("scancel", "--batch", "--signal=USR1", job)
    assert slurm.wait(job) == {"COMPLETED"}
    assert run.verdicts == ["stopped", "done"]


@pytest.mark.slow
def test_ranks_that_fall_silent_are_ended_with_the_evidence_kept(slurm, tmp_path):
    run = StubRun(tmp_path / "run", plays=["silent"])
    job = slurm.submit(run.script)
    assert slurm.wait(job) == {"COMPLETED"}
    first, second = run.attempts
    assert (first.verdict, second.verdict) == ("hang", "done")
    assert "no rank gave a sign of life for" in first.reason
    kept = run.path / "attempts" / "attempt-1"
    assert len(list((kept / "heartbeat").iterdir())) == 4
    assert f"JobId={job}" in (kept / "job.txt").read_text()
    assert f"NodeName={first.nodes[1]}" in (kept / "nodes.txt").read_text()
    assert "sign of life" in (kept / "why.txt").read_text()


@pytest.mark.slow
def test_ranks_that_never_begin_are_ended(slurm, tmp_path):
    run = StubRun(tmp_path / "run", plays=["mute"], start_seconds=10)
    assert slurm.wait(slurm.submit(run.script)) == {"COMPLETED"}
    assert "within 10 s of the start" in run.attempts[0].reason


@pytest.mark.slow
def test_a_step_that_outlives_its_ranks_report_is_ended(slurm, tmp_path):
    run = StubRun(tmp_path / "run", plays=["linger"])
    job = slurm.submit(run.script)
    until(lambda: len(run.attempts) == 2 and run.attempts[1].ended, 90, "the second attempt's end")
    first, second = run.attempts
    assert (first.verdict, first.job, first.suspects) == ("hang", job, (first.nodes[1],))
    assert first.nodes[1] not in second.nodes
    assert "after its ranks told their end" in run.log


@pytest.mark.slow
def test_the_node_of_a_killed_rank_is_left_out(slurm, tmp_path):
    run = StubRun(tmp_path / "run", plays=["killed"])
    slurm.submit(run.script)
    until(lambda: len(run.attempts) == 2 and run.attempts[1].ended, 90, "the second attempt's end")
    first, second = run.attempts
    assert (first.verdict, first.suspects) == ("failed", (first.nodes[1],))
    assert "Killed" in first.reason
    assert first.nodes[1] not in second.nodes


@pytest.mark.slow
def test_a_node_is_not_left_out_where_the_job_needs_all(slurm, tmp_path):
    run = StubRun(tmp_path / "run", plays=["hang"], nodes=4, ranks_per_node=1)
    assert slurm.wait(slurm.submit(run.script)) == {"COMPLETED"}
    assert run.verdicts == ["hang", "done"]
    assert run.attempts[0].action == "requeue"


@pytest.mark.slow
def test_a_step_that_ends_without_a_word_is_a_failure(slurm, tmp_path):
    run = StubRun(tmp_path / "run", plays=["nothing"])
    assert slurm.wait(slurm.submit(run.script)) == {"COMPLETED"}
    assert run.verdicts == ["failed", "done"]
    assert "without a word" in run.attempts[0].reason


def test_the_users_stop_file_ends_the_run_until_the_next_submission(slurm, tmp_path):
    run = StubRun(tmp_path / "run", plays=["slow"])
    job = slurm.submit(run.script)
    started(run)
    (run.path / "stop").touch()
    assert slurm.wait(job) == {"FAILED"}
    assert slurm.run("squeue", "-h").stdout == ""
    assert (run.verdicts, run.attempts[0].asked) == (["stopped"], "user")
    (run.path / "stop").touch()
    assert slurm.wait(slurm.submit(run.script)) == {"FAILED"}
    assert len(run.attempts) == 1
    assert slurm.wait(slurm.submit(run.script)) == {"COMPLETED"}
    assert run.steps == list(range(1, 21))


@pytest.mark.slow
def test_by_policy_a_stopped_run_is_left_to_its_user(slurm, tmp_path):
    run = StubRun(tmp_path / "run", plays=["slow"], on_stop="exit")
    job = slurm.submit(run.script)
    started(run)
    slurm.run("scancel", "--batch", "--signal=USR1", job)
    assert slurm.wait(job) == {"FAILED"}
    assert "ExitCode=75:0" in slurm.run("scontrol", "show", "job", job).stdout
    assert run.attempts[0].action == "end"


def test_of_two_jobs_of_one_run_the_second_refuses(slurm, tmp_path):
    run = StubRun(tmp_path / "run", plays=["slow"])
    first = slurm.submit(run.script)
    started(run)
    second = slurm.submit("--job-name=twin", "-o", run.path / "twin.log", run.script)
    assert slurm.wait(second) == {"FAILED"}
    assert f"attempt 1 of this run is at work: job {first}" in (run.path / "twin.log").read_text()
    assert "ExitCode=2:0" in slurm.run("scontrol", "show", "job", second).stdout
    (run.path / "stop").touch()
    slurm.wait(first)
    assert len(run.attempts) == 1


def test_a_thawed_batch_host_finds_its_run_in_other_hands_and_does_nothing(slurm, tmp_path):
    """Its attempt and srun wake before SLURM can end them, as after an outage of the network."""
    run = StubRun(tmp_path / "run", plays=["slow", "slow"], steps=30, nodes=1, restarts=5)
    job = slurm.submit(run.script)
    started(run)
    (host,) = run.attempts[0].nodes
    slurm.node_hang(host)
    old = [pid for pid in slurm.node_processes(host) if starts_ranks(pid)]
    slurm.run("scontrol", "update", f"nodename={host}", "state=down", "reason=frozen")
    begun(run, 2)
    started(run, 2, run.attempts[1].step_from + 2)
    records = run.attempts
    for pid in old:
        if is_srun(pid):
            os.kill(pid, signal.SIGTERM)  # by which it ends its step, whose number that is
        os.kill(pid, signal.SIGCONT)
    until(lambda: not any(map(starts_ranks, old)), 60, "the old attempt to find itself replaced")
    done = run.steps[-1]
    until(lambda: run.steps[-1] >= done + 3, 30, "the new attempt to go on")
    slurm.node_thaw(host)
    assert slurm.wait(job) == {"COMPLETED"}
    assert slurm.restarts(job) == 1
    assert run.attempts[0] == records[0]
    assert run.verdicts == ["killed", "done"]
    assert "another start of the job" in run.log


def test_an_allocation_that_does_not_fit_is_refused(slurm, tmp_path):
    run = StubRun(tmp_path / "run")
    assert slurm.wait(slurm.submit("--nodes=3", run.script)) == {"FAILED"}
    assert "--nodes=2 --ntasks-per-node=2" in run.log
    assert run.attempts == []


@pytest.mark.slow
def test_a_cancelled_job_stays_cancelled(slurm, tmp_path):
    run = StubRun(tmp_path / "run", plays=["slow"])
    job = slurm.submit(run.script)
    started(run)
    known = set(slurm.jobs())
    slurm.run("scancel", job)
    assert slurm.wait(job) == {"CANCELLED"}
    until(lambda: not slurm.run("squeue", "-h").stdout, 30, "the queue to be empty")
    assert set(slurm.jobs()) == known
    assert slurm.wait(slurm.submit(run.script)) == {"COMPLETED"}


@pytest.mark.slow
def test_one_element_of_an_array_requeues_alone(slurm, tmp_path):
    run = StubRun(tmp_path / "run", plays=["crash"])
    job = slurm.submit("--array=3", "-o", f"{run.path}/logs/slurm-%A_%a.log", run.script)
    assert slurm.wait(job) == {"COMPLETED"}
    assert [attempt.job for attempt in run.attempts] == [f"{job}_3"] * 2


@pytest.mark.slow
def test_ranks_that_do_not_heed_the_time_limit_lose_what_they_did_not_save(slurm, tmp_path):
    run = StubRun(tmp_path / "run", plays=["deaf"], every=4, time="1", signal_seconds=30)
    job = slurm.submit(run.script)
    assert slurm.wait(job, 240) == {"COMPLETED"}
    first = run.attempts[0]
    assert (first.verdict, first.asked, first.action) == ("hang", "limit", "requeue")
    assert first.lost_steps < 4
