"""The next job of a run: the same one again, or a new one that leaves nodes out. No torch here."""

import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from launchers import history, slurm_utils, submitted
from launchers.asked import AskedToStop
from launchers.slurm_utils import Allocation, SlurmError

STAGE = "train"
KILL_SECONDS = 120.0


def is_current(run: Path, number: int, allocation: Allocation) -> slurm_utils.Job | None:
    """The job of this process, if it is still what goes on with the run; else None.

    A node that was frozen and thawed wakes up with a job that SLURM has long requeued: its process
    must do nothing any more.

    Raises:
        SlurmError: SLURM does not answer.
    """
    if not is_newest(run, number):
        return None
    job = slurm_utils.job(allocation.job)
    if job is None or job.state == "PENDING":
        return None
    return job if job.restarts == allocation.restarts else None


def is_newest(run: Path, number: int) -> bool:
    """Whether no other attempt of the run has begun since this one."""
    return max((attempt.number for attempt in history.attempts(run)), default=0) == number


def script(run: Path) -> Path | None:
    """The frozen job file; None where the job was not made by ``titans submit``."""
    path = submitted.script_of(run, STAGE)
    return path if path.is_file() else None


def requeue(allocation: Allocation, asked: AskedToStop) -> None:
    """Have SLURM start this job again, and wait until it ends this one.

    Raises:
        SlurmError: SLURM refuses, or does not answer.
    """
    slurm_utils.requeue(allocation.job)
    told, deadline = len(asked.names), time.monotonic() + KILL_SECONDS
    while len(asked.names) == told and time.monotonic() < deadline:
        time.sleep(0.2)


def resubmit(run: Path, path: Path, exclude: Sequence[str]) -> str:
    """Submit a run's frozen job file again; the new job waits until this one has ended.

    Args:
        run: its directory.
        path: the job file.
        exclude: nodes that the new job leaves out, those of its own included.

    Returns:
        The new job's id.

    Raises:
        SlurmError: SLURM refuses, or does not answer.
    """
    options = ["--dependency=singleton"]
    options += [f"--exclude={','.join(exclude)}"] if exclude else []
    job = slurm_utils.submit(path, options)
    submitted.record(run, STAGE, job, [], path)
    return job


def move_dependents(old: str, new: str, say: Callable[[str], None]) -> None:
    """Have the jobs that wait for one job wait for another; says what cannot be moved."""
    for job in slurm_utils.jobs():
        text = moved(job.dependency, old, new)
        if job.finished or text is None or job.id == new:
            continue
        try:
            slurm_utils.set_dependency(job.id, text)
            say(f"job {job.id} now waits for job {new}")
        except SlurmError as error:
            say(f"job {job.id} still waits for job {old}: {error.what}")


def moved(dependency: str, old: str, new: str) -> str | None:
    """A dependency in SLURM's words with one job for another; None if it does not name that."""
    text = re.sub(r"\(\w+\)", "", dependency)
    changed, count = re.subn(rf"(?<=:){re.escape(old)}(?=[:,?+]|$)", new, text)
    return changed if count else None
