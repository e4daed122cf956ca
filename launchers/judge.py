"""How an attempt ended, told from what its ranks and its step left. No torch here."""

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from launchers.history import Attempt
from launchers.policy import Asked, Outcome
from launchers.preflight_types import Problem
from launchers.steps import StepEnd
from titans_pretrain import errors
from titans_pretrain.checkpoint import format as layout
from titans_pretrain.errors import UserError
from titans_pretrain.files import last_rows, read_json
from titans_pretrain.train import outcome as outcomes
from titans_pretrain.train.directory import RunDirectory

_FIRST = re.compile(r"srun: error: (?P<node>[^\s:]+): tasks? ")
LATE_SIGNAL_SECONDS = 60  # SLURM sends the signal of the time limit up to half a minute early


@dataclass(frozen=True)
class Situation:
    """What an attempt's end is judged by, beside the files of the run.

    Attributes:
        number: of the attempt.
        step_from: it went on from.
        steps: of the whole run.
        asked: who it is that asks for a stop, where a signal does.
        nodes: of the job.
        signalled: whether one came to the batch process, or SLURM preempts the job.
    """

    number: int
    step_from: int
    steps: int
    asked: Asked
    nodes: Sequence[str]
    signalled: bool = False


def saved_step(run: RunDirectory) -> int:
    """The step of the newest checkpoint that is whole by its files' sizes; 0 if there is none."""
    good = (entry.step for entry in layout.summaries(run.checkpoints) if not entry.problem)
    return max(good, default=0)


def is_finished(run: RunDirectory, steps: int) -> bool:
    """Whether the checkpoint of the last step is there and good; reads every byte of that one.

    Raises:
        TitansError: it cannot be read now.
    """
    if saved_step(run) < steps:
        return False
    return not layout.verify(run.checkpoints / layout.step_name(steps))


def done_step(run: RunDirectory) -> int:
    """The step of the last whole row of ``metrics.jsonl``; 0 if there is none."""
    rows = last_rows(run.metrics, 2)  # the last one may be torn
    step = rows[-1].get("step") if rows else 0
    return step if isinstance(step, int) else 0


def save_seconds(run: RunDirectory, step_from: int) -> float | None:
    """What the newest save of an attempt took, if it made one."""
    record = read_json(run.last_save)
    if isinstance(record, dict) and record.get("step", 0) > step_from:
        return float(record["seconds"])
    return None


def asked_by(
    now: float, end: float | None, signal_seconds: float, *, preempted: Callable[[], bool]
) -> Asked:
    """Who asks, where a signal does: the time limit if near, SLURM if it says so, else nobody."""
    near = signal_seconds + LATE_SIGNAL_SECONDS
    if end is not None and end - now <= near:
        return "limit"
    return "preempted" if preempted() else ""


def unfit(problems: Sequence[Problem], nodes: Sequence[str]) -> Outcome:
    """What preflight's problems make of an attempt: it is tried elsewhere, or once more.

    Args:
        problems: at least one.
        nodes: of the job.

    Raises:
        UserError: any try would find the same, on other nodes too.
    """
    lasting = [problem for problem in problems if not problem.passing]
    blamed = {problem.node for problem in lasting}
    if "" in blamed or (len(nodes) > 1 and blamed >= set(nodes)):
        problem = min(lasting, key=lambda one: one.node)
        raise UserError(problem.what, where=problem.node or "all nodes", fix=problem.fix)
    found = {problem.node for problem in problems}
    if "" in found or (len(nodes) > 1 and found >= set(nodes)):
        found = blamed  # what all share may pass
    if found:
        what = next(problem.what for problem in problems if problem.node in found)
        return Outcome("bad node", what, suspects=tuple(sorted(found)))
    return Outcome("failed", f"all nodes: {problems[0].what}")


def failure(run: RunDirectory, number: int) -> dict[str, Any]:
    """This attempt's ``error.json``; empty if it has none."""
    record = read_json(run.error)
    return record if isinstance(record, dict) and record.get("attempt") == number else {}


def ended(run: RunDirectory, attempt: Attempt, outcome: Outcome) -> Attempt:
    """An attempt's record with its end, from now."""
    saved = saved_step(run)
    return replace(
        attempt,
        ended=time.time(),
        step_to=saved,
        verdict=outcome.verdict,
        lost_steps=max(0, done_step(run) - saved),
        asked=outcome.asked,
        reason=outcome.reason,
        suspects=outcome.suspects,
        save_seconds=save_seconds(run, attempt.step_from),
    )


def outcome(run: RunDirectory, situation: Situation, step: StepEnd) -> Outcome:
    """How an attempt whose step has ended did end.

    srun's exit code is the last thing asked: it is 0 where a node failed, and the largest of all
    ranks' where one failed and the others were killed for it.
    """
    saved = saved_step(run)
    progress = saved > situation.step_from
    told = outcomes.read(run, attempt=situation.number)
    if told is not None and told["outcome"] == "done" and saved >= situation.steps:
        return Outcome("done", f"all {situation.steps} steps are done", progress=progress)
    if told is not None and told["outcome"] == "stopped":
        asked: Asked = "user" if told["asked_by"] == "file" else situation.asked
        return Outcome("stopped", str(told["reason"]), asked, progress)
    if error := failure(run, situation.number):
        return _failed(error, step, situation, progress)
    if step.why:
        return Outcome("hang", step.why, _late(step, situation), progress, tuple(step.suspects))
    if progress and saved >= situation.steps:  # by size only: one that was there may be damaged
        return Outcome("done", f"all {situation.steps} steps are done", progress=progress)
    suspects = tuple(step.suspects)
    if f" {errors.USER_ERROR}" in (f" {step.code}", step.told[-2:]):
        if step.error:
            return Outcome("refused", step.error)
        # no word from python: slurmstepd's code where a node lacks the program
        first = [match["node"]] if (match := _FIRST.match(step.told)) else []
        suspects = tuple(dict.fromkeys([*suspects, *named(first, situation.nodes)]))
    asked = situation.asked if situation.signalled else ""
    return Outcome("failed", _unexplained(step), asked, progress, suspects)


def _failed(error: dict[str, Any], step: StepEnd, situation: Situation, progress: bool) -> Outcome:
    reason = f"rank {error.get('rank')} on {error.get('host')}: {error.get('what')}"
    code = error.get("exit_code")
    if code == errors.USER_ERROR:
        return Outcome("refused", reason, progress=progress)
    suspects = tuple(dict.fromkeys(step.suspects))
    if code == errors.STOPPED:  # the ranks' own watch, which knows who holds up the others
        culprit = named([str(error.get("host", ""))], situation.nodes)
        return Outcome("hang", reason, "", progress, tuple(dict.fromkeys([*culprit, *suspects])))
    return Outcome("failed", reason, "", progress, suspects)


def _late(step: StepEnd, situation: Situation) -> Asked:
    """A step that was ended for the time limit was asked to stop by that."""
    return situation.asked if step.late else ""


def _unexplained(step: StepEnd) -> str:
    if step.code == errors.DONE:
        return "the step ended without a word from its ranks: a node failed, or none started"
    words = [f"the step ended with exit code {step.code}", step.error, step.told]
    return "; ".join(word for word in words if word)


def named(hosts: Sequence[str], nodes: Sequence[str]) -> tuple[str, ...]:
    """SLURM's names of hosts, whose own may have a domain or lack it; others are left out."""
    short = {node.partition(".")[0]: node for node in nodes}
    found = (short.get(host.partition(".")[0]) for host in hosts)
    return tuple(dict.fromkeys(node for node in found if node is not None))
