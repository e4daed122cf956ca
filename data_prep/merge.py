"""All tasks together: what keeps a task's record out, and the manifest of the others."""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from data_prep import manifest, schema
from data_prep.output import write_json
from titans_pretrain.errors import UserError


class DamagedTask(UserError):
    """A finished task that cannot be merged as it is.

    Args:
        output: the directory prepared into.
        task: which task.
        what: is wrong with it.
        fix: what mends it; None: to do it again.
    """

    def __init__(self, output: Path, task: int, what: str, fix: str | None = None) -> None:
        super().__init__(what, where=str(output), fix=fix or manifest.redo(output, task))
        self.task = task


def merge(output: Path) -> dict[str, Any]:
    """Put the tasks' manifests together into ``manifest.json``.

    Returns:
        The manifest's content.

    Raises:
        UserError: no plan, tasks that are not finished, or no document left.
        DamagedTask: a task of another plan, files that are gone or have another size, windows that
            do not join up, or work done twice.
    """
    plan = manifest.read_plan(output)
    entries = finished_tasks(output, plan)
    for task, problem in foreign_tasks(output, plan):
        raise DamagedTask(output, task, problem, foreign_fix(output, plan, task))
    missing = [task for task in range(plan["tasks"]) if task not in entries]
    if missing:
        raise UserError(
            f"{len(missing)} of {plan['tasks']} tasks are not finished: {manifest.ranges(missing)}",
            where=str(output),
            fix=manifest.redo(output, *missing),
        )
    done = [entries[task] for task in range(plan["tasks"])]
    found = {name: state.st_size for name, state in _listed(output).items()}
    for entry in done:
        if problem := next(_problems(output, plan, entry, found), ""):
            raise DamagedTask(output, entry["task"], problem)
    content = manifest.described(plan, done)
    if not content["shards"]:
        raise UserError(
            "no document is left: " + json.dumps(content["documents"]),
            where=str(output),
            fix="give other inputs or loosen the filters, with another --output",
        )
    counts = np.zeros(plan["vocab_size"], np.int64)
    for entry in done:
        counts += np.load(output / entry["unigrams"]["name"], allow_pickle=False)
    content["unigram_entropy"] = manifest.entropy(counts)
    content["fingerprint"] = manifest.fingerprint(content)
    write_json(output / manifest.MANIFEST, content)
    return content


def complete(output: Path) -> dict[str, Any] | None:
    """The manifest, if all tasks are finished: merged, unless it is newer than all of them.

    Raises:
        UserError: see ``merge``.
    """
    plan = manifest.read_plan(output)
    records = [manifest.task_file(output, task) for task in range(plan["tasks"])]
    written = {name: state.st_mtime_ns for name, state in _listed(output).items()}
    if not all(path.name in written for path in records):
        return None
    if written.get(manifest.MANIFEST, 0) > max(written[path.name] for path in records):
        with contextlib.suppress(UserError):
            return manifest.load(output / manifest.MANIFEST)
    frozen = manifest.plan_digest(plan)
    for task in range(plan["tasks"]):
        entry = manifest.read_task(output, task)
        if entry is None or entry["plan"] != frozen:
            return None
    return merge(output)


def _listed(output: Path) -> dict[str, os.stat_result]:
    """What lies in a directory; temporary files of other tasks come and go meanwhile."""
    found = {}
    with os.scandir(output) as listing:
        for entry in listing:
            with contextlib.suppress(FileNotFoundError):
                found[entry.name] = entry.stat()
    return found


def forget_other(output: Path, plan: Mapping[str, Any], task: int) -> None:
    """Remove a manifest of another plan, whose shards the tasks of this one replace.

    Args:
        output: the directory.
        plan: the frozen plan.
        task: the one that begins; its record under another plan tells, too.
    """
    path, entry = output / manifest.MANIFEST, manifest.read_task(output, task)
    foreign = entry is not None and entry["plan"] != manifest.plan_digest(plan)
    try:
        content = schema.read_json(path, fix="")
    except UserError:
        return
    ours = manifest.described(plan, [])
    if foreign or any(content.get(key) != ours[key] for key in ("tasks", "settings", "inputs")):
        path.unlink(missing_ok=True)


def finished_tasks(output: Path, plan: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    """What the tasks finished under a plan wrote, by number."""
    frozen, found = manifest.plan_digest(plan), {}
    for task, _ in _records(output):
        entry = manifest.read_task(output, task)
        if entry is not None and entry["plan"] == frozen and task < plan["tasks"]:
            found[task] = entry
    return found


def foreign_tasks(output: Path, plan: Mapping[str, Any]) -> Iterator[tuple[int, str]]:
    """Tasks finished under another plan: number and what to say."""
    frozen = manifest.plan_digest(plan)
    for task, path in _records(output):
        entry = manifest.read_task(output, task)
        if task >= plan["tasks"] or (entry is not None and entry["plan"] != frozen):
            yield task, f"task {task} was prepared under another plan: {path.name}"


def foreign_fix(output: Path, plan: Mapping[str, Any], task: int) -> str:
    """What to do about a task of another plan."""
    if task < plan["tasks"]:
        return manifest.redo(output, task)
    return "remove it, or prepare into an empty --output"


def _records(output: Path) -> Iterator[tuple[int, Path]]:
    """The finished tasks' files, in their order."""
    for path in sorted(output.glob("task-*.json")):
        name = path.name.removeprefix("task-").removesuffix(".json")
        if name.isdecimal():
            yield int(name), path


def _problems(
    output: Path, plan: Mapping[str, Any], entry: Mapping[str, Any], found: Mapping[str, int]
) -> Iterator[str]:
    """What keeps a task out of the manifest; sizes are compared, ``verify`` reads contents."""
    yield from record_problems(plan, entry)
    for name, size in manifest.sizes(manifest.shards_of([entry])):
        if problem := manifest.listed_problem(name, size, found.get(name)):
            yield problem
    if problem := manifest.file_problem(output, entry["unigrams"]):
        yield problem


def record_problems(plan: Mapping[str, Any], entry: Mapping[str, Any]) -> Iterator[str]:
    """What keeps a task's record from being trusted: gaps, work done twice, other counts.

    Args:
        plan: the frozen plan.
        entry: a finished task's record; a journal's windows need not reach the end.
    """
    task, windows = entry["task"], entry["windows"]
    yield from _gaps(task, entry, manifest.units_of(plan, task))
    tail = entry.get("tail", {"documents": {}})["documents"]
    if tail.get("kept"):
        yield f"task {task} kept {tail['kept']} documents after its last window"
    added = manifest.summed([*(window["documents"] for window in windows), tail])
    for name, count in entry["documents"].items():
        if count != added[name]:
            yield (
                f"task {task} has {count} documents {name}, its windows and the rest {added[name]}"
            )
    for index, window in enumerate(windows):
        yield from _window_problems(task, index, window)


def _gaps(task: int, entry: Mapping[str, Any], units: int) -> Iterator[str]:
    """Parts that do not begin where the one before ended, or do not end where they should."""
    parts = [(f"window {index}", window) for index, window in enumerate(entry["windows"])]
    named = [(f"{name} of task {task}", part) for name, part in parts]
    if "tail" in entry:
        named.append((f"what follows the windows of task {task}", entry["tail"]))
    end = [0, 0]
    for name, part in named:
        if part["first"] != end:
            kind = "leaves out" if part["first"] > end else "repeats"
            yield f"{name} {kind} units: {end} to {part['first']}"
        last, end = part is entry.get("tail"), part["last"]
        wrong = end != [units, 0] if last else not part["first"] < end <= [units, 0]
        if wrong:
            yield f"{name} ends at {end} of {units} units"


def _window_problems(task: int, index: int, window: Mapping[str, Any]) -> Iterator[str]:
    """Shards of other tasks or windows, or with other counts than the window's."""
    stem = f"{task:05d}-{index:05d}.tar"
    held_out = window["documents"].get("held_out", 0)
    for kind, name, expected in (
        ("shard", stem, window["documents"]["kept"] - held_out),
        ("held_out", f"held-out-{stem}", held_out),
    ):
        shard = window[kind]
        if shard is not None and (shard["name"], shard["task"]) != (name, task):
            yield f"window {index} of task {task} has the shard {shard['name']} of another"
        found = shard["documents"] if shard else 0
        if found != expected:
            yield f"{name} has {found} documents, its window {expected}"
