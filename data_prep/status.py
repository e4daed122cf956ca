"""``titans data status``: how far each task and the whole array are."""

import json
import os
import shlex
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_prep import manifest, schema
from data_prep.forecast import amount, duration, kept_share
from data_prep.progress import progress_file
from titans_pretrain.errors import UserError

SILENT_SECONDS = 60.0
GROWING = ("units_done", "tokens", "documents")  # the journal may know more
STATES = ("finished", "running", "silent", "failed", "waiting")


def show(output: Path, *, as_json: bool = False, watch: int | None = None) -> None:
    """Print the state of all tasks, once or until all are finished.

    Args:
        output: the directory prepared into.
        as_json: one JSON object, on one line, instead of a table.
        watch: seconds between two looks; None looks once.

    Raises:
        UserError: no plan.
    """
    clear = "\x1b[H\x1b[2J" if watch and sys.stdout.isatty() and not as_json else ""
    while True:
        told = facts(output, file_clock(output))
        print(clear + (json.dumps(told) if as_json else text(told)), flush=True)
        if not watch or told["states"]["finished"] == len(told["tasks"]):
            return
        time.sleep(watch)


def file_clock(output: Path) -> float:
    """The time that a file written now gets, seconds since 1970; this host's if none can be.

    Tasks on other hosts have other clocks; the times of their files are all the file server's.
    """
    try:
        with tempfile.TemporaryFile(dir=output) as handle:
            return os.fstat(handle.fileno()).st_mtime
    except OSError:
        return time.time()


def facts(output: Path, now: float) -> dict[str, Any]:
    """What the tasks have done: times in seconds, rates in tokens a second.

    Args:
        output: the directory prepared into.
        now: the time by the file server's clock, seconds since 1970.

    Raises:
        UserError: no plan.
    """
    plan = manifest.read_plan(output)
    digest = manifest.plan_digest(plan)
    tasks = [_task(output, plan, digest, task, now) for task in range(plan["tasks"])]
    stopped = [task["task"] for task in tasks if task["state"] in ("silent", "failed")]
    states = Counter(task["state"] for task in tasks)
    merged = (output / manifest.MANIFEST).exists()
    redo = manifest.redo_command(output, stopped) if stopped else None
    if states["finished"] == len(tasks) and not merged:
        redo = shlex.join(["titans", "data", "merge", "--output", str(output)])
    total: dict[str, Any] = {
        key: sum(task[key] for task in tasks)
        for key in ("units", "units_done", "tokens", "documents", "rate")
    }
    return {
        "output": str(output),
        "states": {state: states[state] for state in STATES},
        **total,
        "eta": _eta(total),
        "expected_tokens": round(plan["expected"]["tokens"] * kept_share(plan)),
        "merged": merged,
        "redo": redo,
        "tasks": tasks,
    }


def _task(
    output: Path, plan: Mapping[str, Any], digest: str, task: int, now: float
) -> dict[str, Any]:
    """One task: what it tells of itself, else what its finished windows tell."""
    units = manifest.units_of(plan, task)
    finished = manifest.read_task(output, task)
    entry = finished or manifest.read_partial(output, task)
    entry = entry if entry and entry["plan"] == digest else None
    shards = manifest.shards_of([entry] if entry else [])
    done = units if finished and entry else _units_done(entry)
    told: dict[str, Any] = {
        "task": task,
        "state": "finished" if finished and entry else "waiting",
        "units": units,
        "units_done": done,
        "tokens": sum(shard["tokens"] for shard in shards),
        "documents": sum(shard["documents"] for shard in shards),
        "rate": 0.0,
        "host": None,
        "pid": None,
        "silent_for": None,
        "error": None,
    }
    own, written = _own_word(progress_file(output, task))
    word = _running(own, now - written) if own else {}
    if own and (told["state"] != "finished" or word["state"] == "running"):
        told |= word | {key: max(own[key], told[key]) for key in GROWING}
    return told | {"eta": _eta(told)}


def _units_done(entry: Mapping[str, Any] | None) -> int:
    return entry["windows"][-1]["last"][0] if entry and entry["windows"] else 0


def _own_word(path: Path) -> tuple[dict[str, Any] | None, float]:
    """What a running task last told, and when; None if nothing, or nothing that can be read."""
    try:
        written = path.stat().st_mtime
        own = schema.read_json(path, fix="")
    except (OSError, UserError):
        return None, 0.0
    return (None if schema.misfit(own, schema.PROGRESS) else own), written


def _running(own: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    """A task's own word, or that it has said nothing for too long."""
    silent_for = max(0.0, seconds)
    state = own["state"]
    if state == "running" and silent_for > SILENT_SECONDS:
        state = "silent"
    return {
        "state": state,
        "silent_for": round(silent_for),
        "rate": own["rate"] if state == "running" else 0.0,
        **{key: own[key] for key in ("host", "pid", "error")},
    }


def _eta(told: Mapping[str, Any]) -> float | None:
    """Seconds left at this rate, if the units left are like those done; None if none can be told.

    Of the whole array: with as many tasks running as now.
    """
    left = told["units"] - told["units_done"]
    if not left:
        return 0.0
    if not told["rate"] or not told["units_done"]:
        return None
    return left * told["tokens"] / told["units_done"] / told["rate"]


def text(told: Mapping[str, Any]) -> str:
    """The facts for a person: a line for each task at work, one for all."""
    lines = [
        f"{'task':>6}  {'state':<8}  {'units':>15}  {'tokens':>8}  {'tokens/s':>9}  {'ETA':>10}"
    ]
    lines += [_line(task) for task in told["tasks"] if task["state"] not in ("finished", "waiting")]
    lines = lines if len(lines) > 1 else []
    for state in ("finished", "waiting"):
        numbers = [task["task"] for task in told["tasks"] if task["state"] == state]
        lines += [f"{state}: {manifest.ranges(numbers)}"] if numbers else []
    counts = ", ".join(f"{told['states'][state]} {state}" for state in STATES)
    share = told["units_done"] / max(told["units"], 1)
    left = "" if told["merged"] else f", ETA {_clock(told['eta'])}"
    lines.append(f"{len(told['tasks'])} task{'s' * (len(told['tasks']) > 1)}: {counts}")
    lines.append(
        f"{share:.1%} of {told['units']:,} units, {amount(told['tokens'])} tokens of "
        f"{amount(told['expected_tokens'])} expected, {amount(told['rate'])} tokens/s{left}"
    )
    lines += [f"to go on: {told['redo']}"] if told["redo"] else []
    return "\n".join(lines)


def _line(task: Mapping[str, Any]) -> str:
    units = f"{task['units_done']:,}/{task['units']:,}"
    line = f"{task['task']:>6}  {task['state']:<8}  {units:>15}  {amount(task['tokens']):>8}  "
    line += f"{amount(task['rate']):>9}  {_clock(task['eta']):>10}  {task['host']}:{task['pid']}"
    if task["state"] == "silent":
        line += f", nothing for {task['silent_for']} s"
    return line + (f": {task['error']}" if task["error"] else "")


def _clock(seconds: float | None) -> str:
    return "?" if seconds is None else duration(seconds / 3600)
