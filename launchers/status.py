"""``titans status``: where runs stand, in a table, or one run in detail. No torch here."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launchers import run_state
from launchers.run_state import RunState
from launchers.slurm_jobs import Job
from titans_pretrain.checkpoint import evaluations
from titans_pretrain.train.metrics import duration

COLUMNS = (
    "run",
    "state",
    "job",
    "step",
    "loss",
    "tokens/s",
    "to the end",
    "to the limit",
    "heartbeat",
    "restarts",
    "last error",
)
PACE = f"to the end: at the pace of the last {run_state.RECENT_ROWS} steps, without validations, "
NOTE = PACE + "saves and restarts"
ERROR_CHARACTERS = 60
RANKS_TOLD = 8


def status(paths: Sequence[Path] = (), *, as_json: bool = False) -> int:
    """Print where runs stand.

    Args:
        paths: directories of runs, or in which to look for some, a few levels deep; none is here.
        as_json: one object a line instead.

    Returns:
        The exit code.

    Raises:
        UserError: a path is no directory.
    """
    directories = run_state.find(paths or [Path()])
    states = run_state.read(directories)
    if as_json:
        for state in states:
            print(json.dumps(facts(state)))
    elif not states:
        print(f"no run in or below {', '.join(map(str, paths)) or 'this directory'}")
    elif len(states) == 1 and list(paths) == directories:
        print(detail(states[0]))
    else:
        print("\n".join([*table([COLUMNS, *map(row, states)]), "", NOTE]))
    return 0


def facts(state: RunState) -> dict[str, Any]:
    """A run's state as JSON; what is not known is null."""
    return {
        "run": str(state.directory.path),
        "name": state.name,
        "state": state.word,
        "jobs": [
            {"stage": stage, "job": job, "state": found} for stage, job, found in _stages(state)
        ],
        "step": state.metrics.step,
        "steps": state.steps,
        "loss": state.metrics.loss,
        "tokens_per_second": state.metrics.tokens_per_second,
        "seconds_to_end": state.seconds_left,
        "seconds_to_limit": state.limit_seconds,
        "heartbeat_age": state.age,
        "silent_ranks": state.silent,
        "attempts": len(state.attempts),
        "restarts": state.restarts,
        "lost_steps": state.lost_steps,
        "error": state.error and {key: state.error.get(key) for key in _ERROR_KEYS},
        "evaluations": [
            {
                "step": one.step,
                "metrics": dict(one.metrics),
                "failure": one.failure or None,
                "settings": dict(one.settings),
            }
            for one in state.evaluations
        ],
        "verdict": _newest(state, "verdict"),
        "reason": _newest(state, "reason"),
    }


def row(state: RunState) -> list[str]:
    """A run's cells of the table."""
    trained = [f"{job} {found}" for stage, job, found in _stages(state) if stage == run_state.TRAIN]
    lost = f", {state.lost_steps} steps lost" if state.lost_steps else ""
    return [
        state.name,
        state.word,
        trained[-1] if trained else "-",
        _step(state),
        _number(state.metrics.loss, ".4f"),
        _number(state.metrics.tokens_per_second, ",.0f"),
        _to_the_end(state),
        _time(state.limit_seconds),
        _heartbeat(state),
        f"{state.restarts}{lost}",
        _shortened(_last_error(state)),
    ]


def detail(state: RunState) -> str:
    """One run with its attempts, jobs and last error, several lines."""
    cells = dict(zip(COLUMNS, row(state), strict=True))
    del cells["last error"], cells["job"]
    cells = {"directory": str(state.directory.path), **cells}
    lines = table([[f"{name}:", cell] for name, cell in cells.items()])
    if stages := [list(stage) for stage in _stages(state)]:
        lines += ["", *table([["stage", "job", "state"], *stages])]
    lines += ["", *(_attempt(attempt) for attempt in state.attempts)] if state.attempts else []
    lines += ["", *_evaluations(state)] if state.evaluations else []
    lines += [state.unreadable] if state.unreadable else []
    if state.error:
        told = [f"{key}: {state.error[key]}" for key in _ERROR_KEYS if state.error.get(key)]
        lines += ["", "the last start failed:", *(f"  {line}" for line in told)]
    return "\n".join([*lines, "", NOTE])


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of equally many cells as lines with columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()
        for cells in rows
    ]


_ERROR_KEYS = ("what", "where", "fix", "rank", "host", "time")


def _stages(state: RunState) -> list[tuple[str, str, str]]:
    """Stage, job and its state in SLURM, ``-`` where that does not answer; oldest first."""
    known = {submitted.job: submitted.stage for submitted in state.submitted}
    for attempt in state.attempts:
        for job in (attempt.job, attempt.next_job):
            if job and run_state.base(job) not in known:
                known[job] = run_state.TRAIN
    return [(stage, job, _state_of(job, state.jobs or {})) for job, stage in known.items()]


def _state_of(job: str, jobs: Mapping[str, Job]) -> str:
    """A job's state; of an array, of how many elements each."""
    found = [one for name, one in jobs.items() if job in (name, run_state.base(name))]
    counts: dict[str, int] = {}
    for one in found:
        waits = f" ({one.reason})" if one.state == "PENDING" and one.reason else ""
        counts[one.state + waits] = counts.get(one.state + waits, 0) + 1
    if len(found) == 1:
        return next(iter(counts))
    return ", ".join(f"{count} {told}" for told, count in counts.items()) or "-"


def _attempt(attempt: Any) -> str:
    return f"{attempt.line()}; nodes {', '.join(attempt.nodes) or 'not told'}"


def _evaluations(state: RunState) -> list[str]:
    """The newest evaluation's metrics, the steps of other settings, and those that failed."""
    scored = [one for one in state.evaluations if one.metrics]
    done = ([one for one in scored if not one.failure] or scored)[-1:]
    others = [str(one.step) for one in scored if evaluations.differing(one, done[0])]
    lines = [f"evaluation of step {one.step}:" for one in done]
    lines += table(
        [[f"  {name}", f"{value:.4f}"] for one in done for name, value in one.metrics.items()]
    )
    if others:
        lines.append(f"evaluated with other settings than that: step {', '.join(others)}")
    return lines + [
        f"evaluation of step {one.step} failed: {one.failure}"
        for one in state.evaluations
        if one.failure
    ]


def _newest(state: RunState, name: str) -> str | None:
    return getattr(state.attempts[-1], name) or None if state.attempts else None


def _last_error(state: RunState) -> str:
    """The newest start's failure, else why the newest attempt ended before the last step."""
    if state.error:
        return str(state.error.get("what", "")) or "-"
    if state.unreadable:
        return state.unreadable
    if not state.attempts or state.attempts[-1].verdict in ("", "done"):
        return "-"
    return f"{state.attempts[-1].verdict}: {state.attempts[-1].reason}"


def _step(state: RunState) -> str:
    return f"{state.metrics.step}/{'?' if state.steps is None else state.steps}"


def _to_the_end(state: RunState) -> str:
    return "-" if state.word == "done" else _time(state.seconds_left)


def _heartbeat(state: RunState) -> str:
    """Age of the newest sign of life; nothing of a run that has ended."""
    if state.age is None or state.outcome or state.error:
        return "-"
    silent = ", ".join(map(str, state.silent[:RANKS_TOLD]))
    more = f" and {len(state.silent) - RANKS_TOLD} more" * (len(state.silent) > RANKS_TOLD)
    return f"{duration(state.age)} ago" + f"; silent: rank {silent}{more}" * bool(silent)


def _number(value: float | None, form: str) -> str:
    return format(value, form) if isinstance(value, int | float) else "-"


def _time(seconds: float | None) -> str:
    return "-" if seconds is None else duration(seconds)


def _shortened(text: str) -> str:
    line = (text.splitlines() or [""])[0]
    return line if len(line) <= ERROR_CHARACTERS else f"{line[: ERROR_CHARACTERS - 1]}…"
