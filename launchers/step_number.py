"""Step numbers, which begin anew at each start of a job. No torch here."""

import subprocess

STARTS = 4
SECONDS = 30.0


def set_apart(job: str, restarts: int) -> None:
    """Use up step numbers until the next one is not that of the last starts' steps.

    SLURM signals and ends a step by job and number alone: the srun of a start that was lost with
    its node, and comes back, would end the step of a later start that has the same.

    Args:
        job: this one.
        restarts: how often it was requeued; starts in a row get numbers of their own.
    """
    for _ in range(STARTS):
        number = _used(job)
        if number is None or (number + 1) % STARTS == restarts % STARTS:
            return


def _used(job: str) -> int | None:
    """The number of a step that does nothing; None if SLURM does not run it."""
    step = ("srun", "--overlap", f"--jobid={job}", "--nodes=1", "--ntasks=1", "--cpus-per-task=1")
    tell = ("--ntasks-per-node=1", "--mem=0", "--mpi=none", "printenv", "SLURM_STEP_ID")
    try:
        done = subprocess.run(
            (*step, *tell),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    text = done.stdout.strip()
    return int(text) if done.returncode == 0 and text.isdigit() else None
