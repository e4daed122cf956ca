"""The jobs of a run: their files, how they are queued, and ``jobs.jsonl``, which lists them."""

import contextlib
import fcntl
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from launchers import job as jobs
from launchers import slurm_refusals, slurm_utils
from launchers.job_text import READY
from titans_pretrain import config as run_config
from titans_pretrain.config import RunConfig
from titans_pretrain.errors import TitansError, UserError
from titans_pretrain.files import atomic_file, held


@dataclass(frozen=True)
class Submitted:
    """One row of ``jobs.jsonl``.

    Attributes:
        time: of the submission, with its zone.
        stage: ``train``, ``prepare``, …, or ``eval-N``, which evaluates the checkpoint of step N.
        job: SLURM's id.
        depends: ids of the jobs it waits for.
        script: the file that was submitted.
    """

    time: str
    stage: str
    job: str
    depends: tuple[str, ...]
    script: str


@dataclass(frozen=True)
class Stage:
    """One job to queue.

    Attributes:
        name: of the stage, and of its file.
        spec: the job.
        after: stages of the same chain that must have ended well before.
        also: further conditions of the job, such as ``singleton``.
    """

    name: str
    spec: jobs.JobSpec
    after: tuple[str, ...] = ()
    also: tuple[str, ...] = ()


def jobs_of(run: Path) -> Path:
    """Where a run keeps its frozen configuration, job files and ``jobs.jsonl``."""
    return run / "jobs"


def config_of(run: Path) -> Path:
    """The configuration that a run's jobs read."""
    return jobs_of(run) / "config.yaml"


def script_of(run: Path, stage: str) -> Path:
    """The job file of a stage."""
    return jobs_of(run) / f"{stage}.sbatch"


def record(run: Path, stage: str, job: str, depends: Sequence[str], script: Path) -> Submitted:
    """Add a row to ``jobs.jsonl``, for good when this returns."""
    now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    row = Submitted(now, stage, job, tuple(depends), str(script))
    with open(jobs_of(run) / "jobs.jsonl", "ab+") as handle:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        end = handle.seek(0, os.SEEK_END)
        handle.seek(max(0, end - 1))
        torn = b"\n" if handle.read(1) not in (b"", b"\n") else b""
        handle.write(torn + json.dumps(asdict(row)).encode() + b"\n")
        handle.flush()
        os.fsync(handle.fileno())
    return row


def read(run: Path) -> list[Submitted]:
    """The jobs submitted for a run, oldest first; a row that was torn by a crash is left out."""
    try:
        lines = (jobs_of(run) / "jobs.jsonl").read_bytes().splitlines()
    except (FileNotFoundError, NotADirectoryError):
        return []
    found = []
    for line in lines:
        with contextlib.suppress(ValueError, TypeError, KeyError):
            row = json.loads(line)
            found.append(Submitted(**(row | {"depends": tuple(row["depends"])})))
    return found


def living(
    run: Path, names: Sequence[str] = (), *, among: Sequence[slurm_utils.Job] | None = None
) -> list[slurm_utils.Job]:
    """Jobs of a run that are queued or running: those recorded, and those of these names.

    A job that was queued in the moment in which ``titans submit`` was killed is recorded nowhere;
    its name tells.

    Args:
        run: the directory.
        names: of its jobs.
        among: this user's jobs, asked of SLURM if None.

    Raises:
        SlurmError: SLURM does not answer.
    """
    known = {row.job for row in read(run)}
    return [
        job
        for job in (slurm_utils.jobs() if among is None else among)
        if not job.finished
        and (job.name in names or (known & {job.id, job.array} and is_own(run, job)))
    ]


def running_on(
    run: Path, names: Sequence[str] = (), *, among: Sequence[slurm_utils.Job] | None = None
) -> list[slurm_utils.Job]:
    """Those of ``living`` that change the run: an evaluation of a checkpoint does not.

    Raises:
        SlurmError: SLURM does not answer.
    """
    evaluating = {row.job for row in read(run) if jobs.is_evaluation(row.stage)}
    return [job for job in living(run, names, among=among) if job.id not in evaluating]


def is_own(run: Path, job: slurm_utils.Job) -> bool:
    """Whether a job whose id the run has noted is this run's still, told by its name.

    A controller that lost its state uses ids again. The job files count for a directory that was
    moved, the ready files for a run that was queued with plain sbatch.
    """
    if jobs.is_name_of(job.name, run):
        return True
    scripts = {*jobs_of(run).glob("*.sbatch"), *(Path(row.script) for row in read(run))}
    scripts.add(script_of(run.absolute().parent, jobs.SWEEP))
    return job.name in {_name(script) for script in (*scripts, *READY.glob("*.sbatch"))} - {""}


def _name(script: Path) -> str:
    """The name of the job of a script; empty where that is gone."""
    try:
        return slurm_refusals.requested(script).get("job-name", "")
    except (OSError, ValueError):
        return ""


@contextlib.contextmanager
def alone(run: Path) -> Iterator[None]:
    """Let one process at a time look at a run's jobs and add to them.

    Raises:
        UserError: the directory cannot be made or written to, or another process is in here.
    """
    place = jobs_of(run)
    with contextlib.ExitStack() as stack:
        try:
            place.mkdir(parents=True, exist_ok=True)
            (run / "logs").mkdir(exist_ok=True)
            ours = stack.enter_context(held(place / ".lock"))
        except OSError as error:
            raise UserError(
                f"cannot write the run's directory: {error.strerror}",
                where=f"run.directory: {run}",
                fix="choose a directory you can write to, on a file system that the nodes see, too",
            ) from None
        if not ours:
            raise UserError(
                "another titans submit is queueing this run",
                where=str(run),
                fix="wait until it has ended",
            )
        yield


def freeze(run: Path, config: RunConfig) -> None:
    """Write the configuration that the jobs read, whatever happens to the user's file."""
    with atomic_file(config_of(run), "w") as handle:
        handle.write(run_config.dump(config))


def write(run: Path, stages: Sequence[Stage]) -> None:
    """Write the job files, each whole or not at all."""
    for stage in stages:
        with atomic_file(script_of(run, stage.name), "w") as handle:
            handle.write(jobs.text(stage.spec))


def queue(
    run: Path, stages: Sequence[Stage], after: Sequence[str] = ()
) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Submit the written files of a chain, in its order; all of them or none.

    Args:
        run: the directory.
        stages: the chain; a stage comes after those it waits for.
        after: jobs that the stages which wait for no other have to wait for.

    Returns:
        Of each stage its job, and the jobs it waits for.

    Raises:
        TitansError: SLURM refused one; those submitted before are cancelled.
    """
    done: dict[str, tuple[str, tuple[str, ...]]] = {}
    try:
        for stage in stages:
            waits = tuple(done[name][0] for name in stage.after if name in done) or tuple(after)
            script = script_of(run, stage.name)
            job = slurm_utils.submit(script, options=_conditions(waits, stage.also))
            done[stage.name] = (job, waits)
            record(run, stage.name, job, waits, script)
    except BaseException as error:
        _take_back(done, error)
        raise
    return done


def _conditions(waits: Sequence[str], also: Sequence[str]) -> list[str]:
    """The option of sbatch for what a job waits for; it replaces what its file says."""
    if not waits:
        return []
    text = ",".join([slurm_utils.dependency("afterok", list(waits)), *also])
    return [f"--dependency={text}"]


def _take_back(done: Mapping[str, tuple[str, tuple[str, ...]]], error: BaseException) -> None:
    """Cancel the jobs of a chain that cannot be whole, the last first."""
    told = []
    for stage, (job, _) in reversed(list(done.items())):
        try:
            slurm_utils.cancel(job)
            told.append(f"cancelled job {job} ({stage})")
        except TitansError:
            told.append(f"cannot cancel job {job} ({stage}): do it with scancel {job}")
    if told:
        told.insert(0, f"the chain is not whole ({type(error).__name__})")
        print("; ".join(told), file=sys.stderr)
