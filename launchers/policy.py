"""What follows the end of an attempt: decided here, from records alone. Pure; no torch here."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from launchers.history import Attempt
from titans_pretrain import errors
from titans_pretrain.config_job import JobSection

Verdict = Literal["done", "stopped", "failed", "refused", "hang", "bad node", "killed"]
Asked = Literal["", "user", "limit", "preempted"]
Action = Literal["finish", "requeue", "resubmit", "end"]


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended.

    Attributes:
        verdict: done: the last step is saved; stopped: as it was asked to; refused: the user's
            mistake; bad node: preflight found one; killed: from outside; failed: anything else.
        reason: one sentence.
        asked: who asked it to stop: the user's file, the time limit, or SLURM before that.
        progress: whether it left a newer checkpoint than it went on from.
        suspects: nodes that may be the cause.
    """

    verdict: Verdict
    reason: str
    asked: Asked = ""
    progress: bool = False
    suspects: tuple[str, ...] = ()


@dataclass(frozen=True)
class Decision:
    """What the job does next.

    Attributes:
        action: finish or end the run; requeue: the same job again; resubmit: a new job that leaves
            nodes out.
        exit_code: of the job.
        reason: one sentence.
        exclude: nodes that the next job leaves out, longest suspected first.
        fix: what the user can do, where the run ends.
    """

    action: Action
    exit_code: int
    reason: str
    exclude: tuple[str, ...] = ()
    fix: str = "mend that, then titans submit goes on"


def decide(
    outcome: Outcome,
    attempts: Sequence[Attempt],
    job: JobSection,
    *,
    current: str = "",
    spare: int = 0,
) -> Decision:
    """What follows an attempt's end.

    Args:
        outcome: of the attempt.
        attempts: those of the run before it, oldest first.
        job: the run's policy.
        current: the job that made the attempt.
        spare: how many nodes can be left out so that the job still finds enough.
    """
    told = outcome.reason
    if outcome.verdict == "done":
        return Decision("finish", errors.DONE, told)
    if outcome.verdict == "refused":
        return Decision("end", errors.USER_ERROR, told)
    if outcome.asked == "user":
        return Decision("end", errors.STOPPED, told)
    row = fruitless(attempts, current, outcome)
    if row >= job.restarts:
        what, fix = in_vain(row, outcome.asked, told)
        return Decision("end", errors.FAILED, what, fix=fix)
    if job.on_stop == "exit":
        resumable = outcome.verdict in ("stopped", "hang", "killed")
        return Decision("end", errors.STOPPED if resumable else errors.FAILED, told)
    exclude = excluded(outcome, attempts, spare) if outcome.suspects else ()
    if exclude:
        return Decision("resubmit", errors.STOPPED, told, exclude)
    return Decision("requeue", errors.STOPPED, told)


def fruitless(attempts: Sequence[Attempt], current: str, outcome: Outcome | None = None) -> int:
    """Attempts in a row that saved nothing new and have the run itself or its nodes to blame.

    One that SLURM preempted neither counts nor breaks the row. A job that the user submitted, not
    the attempt before it, begins a new one.

    Args:
        attempts: oldest first.
        current: the job that makes, or made, the attempt after them.
        outcome: of that attempt, if it has ended.
    """
    row, job = 0, current
    if outcome is not None:
        if outcome.progress:
            return 0
        row += outcome.asked != "preempted"
    for attempt in reversed(attempts):
        if job not in (attempt.job, attempt.next_job) or attempt.progress:
            break
        row += attempt.asked not in ("preempted", "user")
        job = attempt.job
    return row


def in_vain(row: int, asked: str, reason: str) -> tuple[str, str]:
    """What is wrong, and the fix, after as many fruitless attempts as there may be.

    Args:
        row: their number.
        asked: who asked the last one to stop.
        reason: why that ended.
    """
    what = f"{row} attempts in a row saved nothing new: {reason}"
    if asked != "limit":
        return what, "mend the cause, then titans submit begins a new row"
    fix = "raise job.time or job.signal_seconds, or lower checkpoint.every; then titans submit"
    return f"{what}; the time limit came before a checkpoint was saved", fix


def excluded(outcome: Outcome, attempts: Sequence[Attempt], spare: int) -> tuple[str, ...]:
    """Nodes under suspicion, longest suspected first; as many of the newest as can be spared."""
    suspects = [node for attempt in attempts for node in attempt.suspects]
    newest = dict.fromkeys(reversed([*suspects, *outcome.suspects]))
    return tuple(reversed(list(newest)[: max(0, spare)]))
