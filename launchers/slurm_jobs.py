"""What SLURM knows of jobs: squeue while it remembers them, sacct afterwards."""

import os
import pwd
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime

from launchers.slurm_command import MISSING, accounting, refused, run

FINISHED = frozenset(
    {
        "BOOT_FAIL",
        "CANCELLED",
        "COMPLETED",
        "DEADLINE",
        "FAILED",
        "NODE_FAIL",
        "OUT_OF_MEMORY",
        "PREEMPTED",
        "REVOKED",
        "TIMEOUT",
    }
)
# squeue -O cuts a value at its width and puts nothing between columns.
COLUMNS = {
    "jobarrayid": 64,
    "jobid": 24,
    "arrayjobid": 24,
    "name": 256,
    "username": 64,
    "state": 24,
    "reason": 256,
    "restartcnt": 12,
    "nodelist": 8192,
    "partition": 1024,
    "submittime": 32,
    "starttime": 32,
    "endtime": 32,
    "timeleft": 32,
    "dependency": 8192,
    "batchhost": 256,
}
# squeue -o prints values as long as they are, but has no count of restarts.
LISTED = {
    "jobarrayid": "%i",
    "jobid": "%A",
    "arrayjobid": "%F",
    "name": "%j",
    "username": "%u",
    "state": "%T",
    "reason": "%r",
    "nodelist": "%N",
    "partition": "%P",
    "submittime": "%V",
    "starttime": "%S",
    "endtime": "%e",
    "timeleft": "%L",
    "dependency": "%E",
    "batchhost": "%B",
}
RESTARTS = ("jobarrayid", "restartcnt")
ACCOUNTED = (
    "JobID",
    "JobIDRaw",
    "JobName",
    "User",
    "State",
    "NodeList",
    "Partition",
    "Submit",
    "Start",
    "End",
)
SEPARATOR = "\x1f"
NOTHING = frozenset({"", "N/A", "(null)", "n/a", "None", "Unknown", "NONE", "None assigned"})


@dataclass(frozen=True)
class Job:
    """A job, or one element of an array.

    Attributes:
        id: what scontrol takes: ``123``, or ``120_4`` of an array.
        number: SLURM's own number of it, an array's element has one of its own.
        array: the array's id, empty for a job that is none.
        name: job name.
        user: who submitted it.
        state: in SLURM's words, such as PENDING, RUNNING, COMPLETED.
        reason: why it waits or ended, empty if SLURM gives none.
        restarts: how often it was requeued.
        nodelist: in SLURM's words, empty while it waits.
        partition: one, or several with commas while it waits.
        submitted: unix seconds at which it came into the queue, the last time.
        start_time: unix seconds, None while SLURM has no idea.
        end_time: unix seconds of the end, or of the time limit; None while it is unknown.
        seconds_left: until the time limit; None where there is none, or it has ended.
        dependency: what it waits for, in SLURM's words.
        batch_host: node of the batch script, empty while it waits.
    """

    id: str
    number: str
    array: str
    name: str
    user: str
    state: str
    reason: str
    restarts: int
    nodelist: str
    partition: str
    submitted: float | None
    start_time: float | None
    end_time: float | None
    seconds_left: int | None
    dependency: str
    batch_host: str

    @property
    def finished(self) -> bool:
        """Whether it has ended and will not run again by itself."""
        return self.state in FINISHED

    @property
    def running(self) -> bool:
        """Whether it has nodes."""
        return self.state in ("RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "SIGNALING")


def jobs(ids: Iterable[str] | None = None, *, user: str | None = None) -> list[Job]:
    """The jobs asked for, those just finished included; a missing one is left out.

    Args:
        ids: ``123``, ``120_4``, or an array's id for all its elements; None takes a user's.
        user: whose; None takes this process's user where no ids are given.

    Raises:
        SlurmError: SLURM does not answer.
    """
    wanted = None if ids is None else list(dict.fromkeys(ids))
    if wanted == []:
        return []
    query = ["squeue", "--noheader", "--array", "--states=all"]
    if user is not None or wanted is None:
        query += [f"--user={user or pwd.getpwuid(os.getuid()).pw_name}"]
    if wanted is None:
        return _of_user(query)
    found = [_job(row) for row in _columns([*query, f"--jobs={','.join(wanted)}"], COLUMNS)]
    if gone := [one for one in wanted if not _among(one, found)]:
        found += _accounted(gone)
    return found


def job(id: str) -> Job | None:  # noqa: A002 - SLURM's word
    """One job, None if SLURM knows it no more.

    Args:
        id: ``123`` or ``120_4``; an array's id gives its first element that is not finished.

    Raises:
        SlurmError: SLURM does not answer.
    """
    found = jobs([id])
    exact = [one for one in found if one.id == id]
    return next(iter(exact or [one for one in found if not one.finished] or found), None)


def unix_seconds(text: str) -> float | None:
    """A time that SLURM printed, as seconds or as local date; None if it has none."""
    if re.fullmatch(r"\d+", text):
        return float(text)
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        return None


def seconds(text: str) -> int | None:
    """SLURM's ``1-02:03:04``, ``2:03:04`` or ``3:04`` in seconds; None for UNLIMITED and such."""
    match = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", text)
    if match is None:
        return None
    days, hours, minutes, rest = (int(part or 0) for part in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + rest


def _among(id: str, found: Sequence[Job]) -> bool:  # noqa: A002
    return any(id in (one.id, one.array, one.number) for one in found)


def _columns(query: Sequence[str], names: Iterable[str]) -> list[dict[str, str]]:
    """Rows of columns of fixed width, which hold all there is to know; none of missing jobs."""
    widths = {name: COLUMNS[name] for name in names}
    query = [*query, "--Format=" + ",".join(f"{name}:{width}" for name, width in widths.items())]
    answer = run(query)
    if answer.code and not MISSING.search(answer.err):
        raise refused(query, answer)
    rows = []
    for line in [] if answer.code else answer.out.split(b"\n"):
        if not line.strip() or line.startswith(b"CLUSTER:"):
            continue
        values, at = {}, 0
        for name, width in widths.items():
            values[name] = line[at : at + width].decode(errors="replace").strip()
            at += width
        rows.append(values)
    return rows


def _of_user(query: Sequence[str]) -> list[Job]:
    """A user's jobs, which may be many thousand: a hundredth of the bytes of all the columns."""
    listing = [*query, f"--format={SEPARATOR.join(LISTED.values())}"]
    answer = run(listing)
    if answer.code:
        raise refused(listing, answer)
    lines = answer.out.decode(errors="replace").split("\n")
    rows = [dict(zip(LISTED, line.split(SEPARATOR), strict=False)) for line in lines]
    restarts = {row["jobarrayid"]: row["restartcnt"] for row in _columns(query, RESTARTS)}
    return [
        _job({**row, "restartcnt": restarts.get(row["jobarrayid"], "")})
        for row in rows
        if len(row) == len(LISTED)
    ]


def _job(values: dict[str, str]) -> Job:
    given = {name: "" if value in NOTHING else value for name, value in values.items()}
    is_element = "_" in given["jobarrayid"]
    return Job(
        id=given["jobarrayid"] or given["jobid"],
        number=given["jobid"],
        array=given["arrayjobid"] if is_element else "",
        name=values["name"],
        user=given["username"],
        state=given["state"],
        reason=given["reason"],
        restarts=int(given["restartcnt"] or 0),
        nodelist=given["nodelist"],
        partition=given["partition"],
        submitted=unix_seconds(given["submittime"]),
        start_time=unix_seconds(given["starttime"]),
        end_time=unix_seconds(given["endtime"]),
        seconds_left=None if given["state"] in FINISHED else seconds(given["timeleft"]),
        dependency=given["dependency"],
        batch_host=given["batchhost"],
    )


def _accounted(ids: Sequence[str]) -> list[Job]:
    """Jobs that only the accounting remembers; none where a site has no accounting."""
    query = ["sacct", "--noheader", "--parsable2", "--allocations", "--duplicates"]
    query += [f"--delimiter={SEPARATOR}", f"--jobs={','.join(ids)}"]
    answer = accounting([*query, f"--format={','.join(ACCOUNTED)}"])
    if answer is None:
        return []
    last: dict[str, Job] = {}
    for line in answer.text.splitlines():
        values = dict(zip(ACCOUNTED, line.split(SEPARATOR), strict=False))
        if len(values) < len(ACCOUNTED):
            continue
        before = last.get(values["JobID"])
        last[values["JobID"]] = _of_accounting(values, 0 if before is None else before.restarts + 1)
    return list(last.values())


def _of_accounting(values: dict[str, str], restarts: int) -> Job:
    given = {name: "" if value in NOTHING else value for name, value in values.items()}
    array, element, _ = given["JobID"].partition("_")
    return Job(
        id=given["JobID"],
        number=given["JobIDRaw"],
        array=array if element else "",
        name=values["JobName"],
        user=given["User"],
        state=given["State"].split(" ")[0],  # "CANCELLED by 1000"
        reason="",
        restarts=restarts,
        nodelist=given["NodeList"],
        partition=given["Partition"],
        submitted=unix_seconds(given["Submit"]),
        start_time=unix_seconds(given["Start"]),
        end_time=unix_seconds(given["End"]),
        seconds_left=None,
        dependency="",
        batch_host="",
    )
