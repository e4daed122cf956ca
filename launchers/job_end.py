"""When and why SLURM ends this job: its time limit, and whether it is preempted. No torch here."""

import contextlib
import time

from launchers import slurm_command, slurm_utils
from launchers.slurm_jobs import unix_seconds
from launchers.slurm_utils import SlurmError

GOING_ON = ("RUNNING", "SUSPENDED")  # of a job in another state SLURM moves the end to now


def preempted_since(job: str, begun: float) -> bool:
    """Whether SLURM last preempted a job after a time, in unix seconds; False if it does not say.

    It remembers that over the job's next start.
    """
    began = _start_and_preemption(job)[1]
    return began is not None and began >= begun


def _start_and_preemption(job: str) -> tuple[float | None, float | None]:
    """Unix seconds of a job's start and of its last preemption; None for what SLURM tells not."""
    query = ["squeue", "--noheader", f"--jobs={job}", "--Format=starttime:32,preempttime:32"]
    with contextlib.suppress(SlurmError):
        started, began, *_ = *map(unix_seconds, slurm_command.call(query).split()), None, None
        return started, began
    return None, None


class JobEnd:
    """What SLURM says of a job's end, asked again when it matters.

    Args:
        job: as scontrol takes it.

    Raises:
        SlurmError: SLURM does not answer.
    """

    def __init__(self, job: str) -> None:
        self._job = job
        self._limit: float | None = None
        self._read()

    def limit(self) -> float | None:
        """Unix time of the time limit as it is now; None if there is none.

        It may be moved while the job runs. What is known stands where SLURM does not answer.
        """
        with contextlib.suppress(SlurmError):
            self._read()
        return self._limit

    def is_within(self, seconds: float) -> bool:
        """Whether the time limit is so near; SLURM is asked only where it is by what is known."""
        now = time.time()
        if self._limit is None or now < self._limit - seconds:
            return False
        limit = self.limit()
        return limit is not None and now >= limit - seconds

    def is_preempted(self) -> bool:
        """Whether SLURM has begun to preempt the job since it started; False if it does not say."""
        started, began = _start_and_preemption(self._job)
        return started is not None and began is not None and began >= started

    def _read(self) -> None:
        """Start and limit, less what it was suspended: the end that SLURM tells moves with an end.

        Past the limit SLURM has no seconds left to tell of, as if there were none.
        """
        job = slurm_utils.job(self._job)
        if job is None or job.state not in GOING_ON:
            return
        now = time.time()
        if job.seconds_left is not None:
            self._limit = now + job.seconds_left
        elif self._limit is not None and now < self._limit:
            self._limit = None
