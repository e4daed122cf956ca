"""SLURM's client side in one place: hosts, ports, allocations, jobs, what a job asks for. No torch.

By SLURM's own commands; ``slurm_command`` runs them, ``slurm_jobs`` reads what they tell of jobs,
``slurm_refusals`` explains what SLURM would not run.
"""

import contextlib
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from launchers import slurm_command, slurm_refusals
from launchers.slurm_command import PATIENCE_SECONDS, accounting, call, clean, refused, run
from launchers.slurm_command import Answer as Answer
from launchers.slurm_command import SlurmError as SlurmError
from launchers.slurm_command import SlurmUnanswered as SlurmUnanswered
from launchers.slurm_command import available as available
from launchers.slurm_command import version as version
from launchers.slurm_jobs import FINISHED as FINISHED
from launchers.slurm_jobs import Job as Job
from launchers.slurm_jobs import job as job
from launchers.slurm_jobs import jobs as jobs
from launchers.slurm_jobs import seconds
from titans_pretrain.errors import TitansError, UserError

HOSTNAMES_SECONDS = 10.0
FIRST_PORT = 10_000  # ephemeral ports, which outgoing connections hold, begin at 32768
PORTS = 20_000
AGAIN = 7919  # a prime: the jobs submitted next have ports beside this one's
STEPS = 16
_SPANS = r"\[\d+(?:-\d+)?(?:,\d+(?:-\d+)?)*\]"
ENTRY = re.compile(rf"(?:[\w.-]|{_SPANS})+")
NODELIST = re.compile(rf"{ENTRY.pattern}(?:,{ENTRY.pattern})*")
ELSEWHERE = frozenset({"SLURM_CONF", "SLURM_CLUSTERS", "SLURM_CONF_SERVER", "SLURM_JWT"})
VARIABLES = {"time": "TIMELIMIT", "array": "ARRAY_INX", "mem": "MEM_PER_NODE"}
Dependency = Literal["after", "afterany", "afterok", "afternotok", "aftercorr"]


@dataclass(frozen=True)
class Allocation:
    """The nodes and tasks that SLURM gave the job this process runs in.

    Attributes:
        job: what scontrol takes: ``123``, or ``120_4`` of an array.
        name: job name.
        nodes: host names, the first has rank 0.
        tasks_per_node: one count a node.
        restarts: how often the job was requeued.
        partition: where it runs.
    """

    job: str
    name: str
    nodes: list[str]
    tasks_per_node: list[int]
    restarts: int
    partition: str

    @property
    def tasks(self) -> int:
        """Ranks that it can hold."""
        return sum(self.tasks_per_node)


def allocation(environment: Mapping[str, str]) -> Allocation | None:
    """The allocation that a batch script's environment tells of; None outside a job.

    Raises:
        TitansError: SLURM's variables cannot be read.
    """
    if "SLURM_JOB_ID" not in environment:
        return None
    try:
        nodelist = environment["SLURM_JOB_NODELIST"]
        tasks = environment["SLURM_TASKS_PER_NODE"]
    except KeyError as error:
        raise TitansError(
            f"{error.args[0]} is not set, though SLURM_JOB_ID is",
            where="environment of the job",
            fix="start this from a batch script or in salloc",
        ) from None
    number = environment["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in environment and "SLURM_ARRAY_TASK_ID" in environment:
        number = f"{environment['SLURM_ARRAY_JOB_ID']}_{environment['SLURM_ARRAY_TASK_ID']}"
    return Allocation(
        job=number,
        name=environment.get("SLURM_JOB_NAME", ""),
        nodes=hostnames(nodelist),
        tasks_per_node=tasks_per_node(tasks),
        restarts=int(environment.get("SLURM_RESTART_COUNT", "0")),
        partition=environment.get("SLURM_JOB_PARTITION", ""),
    )


def hostnames(nodelist: str) -> list[str]:
    """The hosts of a node list such as ``gpu[003-006,9],login1``, in its order.

    Raises:
        TitansError: it names none.
    """
    if nodelist and shutil.which("scontrol"):
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            done = subprocess.run(
                ["scontrol", "show", "hostnames", nodelist],  # noqa: S607 - wherever it lies
                capture_output=True,
                text=True,
                timeout=HOSTNAMES_SECONDS,
                check=True,
                env=clean(os.environ),
            )
            if found := done.stdout.split():
                return found
    if not NODELIST.fullmatch(nodelist):
        raise TitansError(
            f"no hosts in the node list {nodelist!r}",
            where="SLURM's node list",
            fix="set MASTER_ADDR to the host of rank 0",
        )
    return [host for entry in ENTRY.finditer(nodelist) for host in _expanded(entry[0])]


def tasks_per_node(text: str) -> list[int]:
    """SLURM's ``2(x3),1`` as [2, 2, 2, 1].

    Raises:
        TitansError: it is none such.
    """
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if match is None:
            raise TitansError(
                f"{text!r} is no list of tasks per node",
                where="SLURM_TASKS_PER_NODE",
                fix="start the ranks with srun, which sets it",
            )
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def master_port(environment: Mapping[str, str]) -> int:
    """The port of rank 0: another for each step of the jobs that may share a host.

    Restarts differ too: what is left of the job's last start may still hold its port.

    Args:
        environment: of a process of the step.

    Returns:
        10000 to 29999, below the ports that outgoing connections take.
    """
    names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
    job, step, restarts = (int(environment.get(name, "0")) for name in names)
    return FIRST_PORT + (job * STEPS + step + restarts * AGAIN) % PORTS


def submit(script: Path, options: Sequence[str] = ()) -> str:
    """Submit a batch script once; the job's id.

    Where SLURM takes the request and does not answer, the job is looked for by its name before
    the script is sent again.

    Args:
        script: the file; SLURM copies it.
        options: of sbatch, which go before those in the script.

    Raises:
        SlurmError: SLURM refuses, or does not answer.
    """
    command = ["sbatch", "--parsable", *options, str(script)]
    name = slurm_refusals.requested(script, options).get("job-name", script.name)
    before, deadline = _named(name), time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            answer = run(command, again=False, environment=_outside(script))
        except SlurmUnanswered:
            if new := sorted(_named(name) - before, key=int):
                return new[-1]
            if time.monotonic() > deadline:
                raise
            time.sleep(slurm_command.PAUSE_SECONDS)
            continue
        if answer.code:
            raise refused(command, answer)
        return answer.text.splitlines()[-1].split(";")[0]


def test_only(
    script: Path,
    options: Sequence[str] = (),  # noqa: PT028
    *,
    section: str = "job",  # noqa: PT028
) -> list[str]:
    """Whether SLURM would run a batch script; submits nothing.

    Args:
        script: the file.
        options: of sbatch, which go before those in the script.
        section: of the configuration that the job comes from, for messages.

    Returns:
        Sentences about why it may wait long.

    Raises:
        UserError: SLURM would refuse it or keep it waiting for ever, with the key and the fix.
        SlurmError: SLURM does not answer.
    """
    command = ["sbatch", "--test-only", *options, str(script)]
    answer = run(command, environment=_outside(script))
    return slurm_refusals.check(answer, slurm_refusals.requested(script, options), section=section)


def cancel(
    id: str,  # noqa: A002
    *,
    signal: str | None = None,
    batch: bool = False,
    waiting: bool = False,
) -> None:
    """End a job, or send it a signal; a job that has ended is none to complain of.

    Args:
        id: of the job, of an array, or of an element.
        signal: such as USR1, to the tasks; None ends the job.
        batch: the signal goes to the batch script only.
        waiting: only if it waits still; one that has begun goes on.

    Raises:
        SlurmError: SLURM refuses, or does not answer.
    """
    options = [f"--signal={signal}"] if signal else []
    options += [*["--batch"] * batch, *["--state=PENDING"] * waiting]
    _ended_is_fine(["scancel", *options, id])


def requeue(id: str) -> None:  # noqa: A002
    """Put a job back into the queue; nothing to do where it waits there already.

    Raises:
        SlurmError: there is no such job, SLURM refuses, or does not answer.
    """
    command = ["scontrol", "requeue", id]
    answer = run(command)
    if answer.code and "pending" not in answer.complaint.lower():
        raise refused(command, answer)


def set_dependency(id: str, text: str) -> None:  # noqa: A002
    """Have a waiting job wait for something else.

    Args:
        id: of the job.
        text: what ``dependency`` gave, or several with commas; empty for nothing.

    Raises:
        SlurmError: the job does not wait any more, SLURM refuses, or does not answer.
    """
    call(["scontrol", "update", f"JobId={id}", f"Dependency={text}"])


def dependency(kind: Dependency, ids: Iterable[str]) -> str:
    """Such as ``afterok:1:2``; empty without ids.

    Raises:
        UserError: one is no job's id.
    """
    given = list(ids)
    for one in given:
        if not re.fullmatch(r"\d+(_\d+)?", one):
            raise UserError(
                f"{one!r} is no job's id", where="dependency", fix="give ids as squeue prints them"
            )
    return ":".join([kind, *given]) if given else ""


def grace_seconds(partition: str, *, qos: str = "") -> int | None:
    """Seconds that a preempted job is left there between its warning and its end.

    Args:
        partition: a partition's name.
        qos: quality of service, which decides where the site preempts by it.

    Returns:
        None where the site does not tell.

    Raises:
        SlurmError: SLURM does not answer.
    """
    if qos and "preempt/qos" in settings().get("PreemptType", ""):
        query = ["sacctmgr", "--noheader", "--parsable2", "show", "qos", qos, "format=GraceTime"]
        answer = accounting(query)
        return seconds(answer.text.splitlines()[0]) if answer and answer.text else None
    grace = slurm_refusals.partitions().get(partition, {}).get("GraceTime", "")
    return int(grace) if grace.isdigit() else None


def settings() -> dict[str, str]:
    """The controller's configuration, by the names of slurm.conf.

    Raises:
        SlurmError: SLURM does not answer.
    """
    return slurm_refusals.settings()


def _named(name: str) -> set[str]:
    """Ids of this user's jobs of a name."""
    query = ["squeue", "--noheader", f"--name={name}", f"--user={os.getuid()}", "--format=%F"]
    return set(call(query).split())


def _outside(script: Path) -> dict[str, str]:
    """An environment for a new job: nothing of the job this runs in, nothing against the script.

    SBATCH variables go before a script's own options, and sbatch hands SLURM's variables of this
    job on to the new one.
    """
    ours = {
        f"SBATCH_{VARIABLES.get(name, name.upper().replace('-', '_'))}"
        for name in slurm_refusals.requested(script)
    }
    ours |= {"SBATCH_NO_REQUEUE"} if "SBATCH_REQUEUE" in ours else set()
    return {
        name: value
        for name, value in os.environ.items()
        if name not in ours and (not name.startswith("SLURM_") or name in ELSEWHERE)
    }


def _ended_is_fine(command: list[str]) -> None:
    answer = run(command)
    fine = ("invalid job id", "already completing or completed", "job has already finished")
    if answer.code and not any(words in answer.complaint.lower() for words in fine):
        raise refused(command, answer)


def _expanded(entry: str) -> Iterator[str]:
    """The hosts of one entry of a node list, the last bracket counting fastest."""
    match = re.fullmatch(r"([^\[]*)\[([^\]]*)\](.*)", entry)
    if match is None:
        yield entry
        return
    for span in match[2].split(","):
        low, _, high = span.partition("-")
        for number in range(int(low), int(high or low) + 1):
            for rest in _expanded(match[3]):
                yield f"{match[1]}{number:0{len(low)}d}{rest}"
