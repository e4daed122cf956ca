"""What comes before an attempt: whether this job may make it, and what became of the last one.

No torch here.
"""

import contextlib
import fcntl
import os
import socket
import stat
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from launchers import (
    checks,
    history,
    job_end,
    judge,
    nodes,
    policy,
    resubmit,
    slurm_utils,
    submitted,
)
from launchers.history import Attempt
from launchers.job_log import say
from launchers.policy import Outcome
from launchers.slurm_utils import Allocation, SlurmError
from launchers.steps import StepEnd
from titans_pretrain import errors
from titans_pretrain.config import RunConfig
from titans_pretrain.errors import TitansError, UserError
from titans_pretrain.train import heartbeat, lease
from titans_pretrain.train import outcome as outcomes
from titans_pretrain.train.directory import RunDirectory

SILENT_SECONDS = 3600.0  # longer than checks of the nodes and a start take without a sign of life


def checked_allocation(config: RunConfig, environment: Mapping[str, str]) -> Allocation:
    """The job's nodes, if they are what the configuration is for.

    Raises:
        UserError: there is no job, or it has other nodes or tasks.
    """
    allocation = slurm_utils.allocation(environment)
    if allocation is None:
        raise UserError(
            "this is no job of SLURM, whose nodes an attempt takes",
            where="environment: SLURM_JOB_ID is not set",
            fix="titans submit CONFIG queues the run; titans train CONFIG trains on this machine",
        )
    checks.of_config(config)
    job = config.job
    wanted = [job.ranks_per_node] * job.nodes
    if allocation.tasks_per_node != wanted:
        given = ",".join(map(str, allocation.tasks_per_node))
        raise UserError(
            f"job {allocation.job} has {len(allocation.nodes)} nodes with {given} tasks; the run "
            f"needs {job.nodes} with {job.ranks_per_node} each",
            where="job.nodes, job.ranks_per_node",
            fix=f"use sbatch --nodes={job.nodes} --ntasks-per-node={job.ranks_per_node}, or "
            "titans submit, which writes both",
        )
    return allocation


def close_open(directory: RunDirectory, allocation: Allocation, steps: int) -> list[Attempt]:
    """All attempts so far, each with an end: one that was killed gets it here.

    Raises:
        UserError: the newest one runs, or belongs to a later start of this job.
        SlurmError: SLURM does not tell whether it does, nor do its files.
    """
    found = history.attempts(directory.path)
    if not found or found[-1].ended is not None:
        return found
    newest = found[-1]
    mine = newest.job == allocation.job
    job = None
    try:
        job = _job_of(directory, newest, allocation)
        gone = newest.restart < allocation.restarts if mine else job is None or _is_over(job)
    except SlurmError:  # as of a job that only a broken accounting may remember
        gone = newest.restart < allocation.restarts if mine else _is_dead(directory, newest)
        if not gone and not _lives(directory, newest):
            raise
    if not gone:
        raise UserError(
            f"attempt {newest.number} of this run is at work: job {newest.job} on {newest.host}",
            where=str(directory.path),
            fix=f"wait until it has ended, or end it: titans stop {directory.path}",
        )
    outcome = _killed(directory, newest, None if mine else job, steps)
    next_job = allocation.job if mine else ""
    closed = replace(judge.ended(directory, newest, outcome), next_job=next_job)
    history.write(directory.path, closed)
    return [*found[:-1], closed]


def refuse_fruitless(before: Sequence[Attempt], allocation: Allocation, config: RunConfig) -> None:
    """Begin no further attempt after as many as the policy allows saved nothing.

    Raises:
        TitansError: so many did.
    """
    row = policy.fruitless(before, allocation.job)
    if row >= config.job.restarts:
        what, fix = policy.in_vain(row, before[-1].asked, before[-1].reason)
        where = f"job.restarts: {config.job.restarts}; {config.run.directory}"
        raise TitansError(what, where=where, fix=fix)


def claim(directory: RunDirectory, allocation: Allocation, before: Sequence[Attempt]) -> Attempt:
    """Take the next attempt for this job.

    Raises:
        UserError: another job took it at the same time.
    """
    attempt = Attempt(
        number=before[-1].number + 1 if before else 1,
        job=allocation.job,
        restart=allocation.restarts,
        host=socket.gethostname(),
        nodes=tuple(allocation.nodes),
        begun=time.time(),
        name=allocation.name,
        log=_log(),
        step_from=judge.saved_step(directory),
    )
    if not history.claim(directory.path, attempt):
        raise UserError(
            f"another job has just begun attempt {attempt.number} of this run",
            where=str(directory.path),
            fix="leave one of the two: titans status tells which runs",
        )
    if before:
        say(before[-1].line())
        if before[-1].next_job == allocation.job != before[-1].job:
            with contextlib.suppress(SlurmError):
                resubmit.move_dependents(before[-1].job, allocation.job, say)
    where = f"job {allocation.job} on {', '.join(allocation.nodes)}"
    say(f"attempt {attempt.number}: {where}, from step {attempt.step_from}")
    return attempt


def consume_stop(
    directory: RunDirectory, allocation: Allocation, before: Sequence[Attempt]
) -> bool:
    """Whether the user asked to stop and nobody acted upon it; from now on that counts as done.

    The wish is the file `stop`, or was told by ranks whose job SLURM ended and began again.
    """
    asked = bool(before) and before[-1].asked == "user" and before[-1].next_job == allocation.job
    if asked:
        history.write(directory.path, replace(before[-1], action="end", next_job=""))
    try:
        directory.stop.unlink()
        return True
    except FileNotFoundError:
        return asked


def _log() -> str:
    """The file that this process writes its words to; empty if it is none."""
    with contextlib.suppress(OSError):
        log, written = Path("/proc/self/fd/1").readlink(), os.fstat(1)
        if stat.S_ISREG(written.st_mode) and os.path.samestat(log.stat(), written):
            return str(log)
    return ""


def _job_of(
    directory: RunDirectory, attempt: Attempt, allocation: Allocation
) -> slurm_utils.Job | None:
    """The job of an attempt, if SLURM knows it; another run's may have its id by now."""
    job = slurm_utils.job(attempt.job)
    if job is None or job.name in (attempt.name, allocation.name):
        return job
    return job if submitted.is_own(directory.path, job) else None


def _lives(directory: RunDirectory, attempt: Attempt) -> bool:
    """Whether an attempt's ranks give signs of life, or hold the run's lock."""
    now = time.time()
    for beat in heartbeat.read(directory).values():
        fresh = now - float(beat.get("time", 0.0)) < lease.FRESH_SECONDS
        if fresh and beat.get("attempt") == attempt.number:
            return True
    with contextlib.suppress(OSError), open(directory.lock, encoding="utf-8") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _is_dead(directory: RunDirectory, attempt: Attempt) -> bool:
    """Whether an attempt's files tell that it is over: it is long past its start, and silent."""
    return time.time() - attempt.begun > SILENT_SECONDS and not _lives(directory, attempt)


def _is_over(job: slurm_utils.Job) -> bool:
    """Whether no process of a job trains any more, but for such as SLURM is about to kill."""
    return job.finished or job.state in ("PENDING", "COMPLETING")


def _killed(
    directory: RunDirectory, attempt: Attempt, job: slurm_utils.Job | None, steps: int
) -> Outcome:
    """How an attempt ended that could not put it down itself."""
    state = job.state if job is not None and job.finished else ""
    situation = judge.Situation(
        attempt.number,
        attempt.step_from,
        steps,
        "limit" if state == "TIMEOUT" else "preempted",
        attempt.nodes,
    )
    told = outcomes.read(directory, attempt=attempt.number)
    if told is not None or judge.failure(directory, attempt.number):
        return judge.outcome(directory, situation, StepEnd(errors.FAILED))
    progress = judge.saved_step(directory) > attempt.step_from
    lost: tuple[str, ...] = ()
    with contextlib.suppress(SlurmError):
        lost = nodes.lost(attempt.nodes, nodes.states(""))
    if lost:
        return Outcome("killed", f"node failure: {', '.join(lost)}", "", progress, lost)
    if state == "PREEMPTED" or job_end.preempted_since(attempt.job, attempt.begun):
        return Outcome("killed", "preempted before the ranks could tell", "preempted", progress)
    why = f"its job ended as {state}" if state else "SLURM requeued its job"
    return Outcome("killed", f"{why}: a preemption, a node failure or an operator", "", progress)
