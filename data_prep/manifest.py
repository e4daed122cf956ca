"""What a prepared directory says about itself.

``plan.json``       frozen before the first task: inputs, tokenizer, settings, number of tasks.
``task-00000.json`` what one finished task wrote.
``manifest.json``   all tasks together: what readers open.
"""

import hashlib
import json
import math
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_prep import schema
from data_prep.output import write_json
from titans_pretrain.errors import UserError
from titans_pretrain.files import sha256_file

PLAN, MANIFEST, TOKENIZER = "plan.json", "manifest.json", "tokenizer.model"
NO_DIGEST = ("command", "expected")  # of the plan: how it was typed and what it promised


def task_file(output: Path, task: int) -> Path:
    """Where a finished task's manifest lies."""
    return output / f"task-{task:05d}.json"


def partial_file(output: Path, task: int) -> Path:
    """Where the journal of a task that is not finished lies."""
    return output / f"task-{task:05d}.partial.json"


def read_plan(output: Path) -> dict[str, Any]:
    """The frozen plan's content.

    Raises:
        UserError: there is none, it is damaged, or it has another format.
    """
    path = output / PLAN
    if not path.exists():
        fix = "run `titans data plan`, or `titans data prepare` with --input and --tokenizer"
    else:
        fix = f"remove {PLAN}, then repeat `titans data plan` with the first command's options"
    return schema.read(path, schema.PLAN, fix=fix)


def plan_digest(content: Mapping[str, Any]) -> str:
    """Hash of what the output depends on: not of how the command was typed or where inputs lie."""
    inputs = [{key: entry[key] for key in entry if key != "url"} for entry in content["inputs"]]
    body = {key: content[key] for key in content if key not in NO_DIGEST}
    return digest(body | {"inputs": inputs})


def read_task(output: Path, task: int) -> dict[str, Any] | None:
    """What a finished task wrote; None when its file is missing, damaged or another task's."""
    return _task(task_file(output, task), schema.TASK, task)


def read_partial(output: Path, task: int) -> dict[str, Any] | None:
    """The journal of a task under way; None when it is missing, damaged or another task's."""
    return _task(partial_file(output, task), schema.PARTIAL, task)


def _task(path: Path, shape: Mapping[str, Any], task: int) -> dict[str, Any] | None:
    try:
        entry = schema.read(path, shape, fix="")
    except UserError:
        return None
    return entry if entry["task"] == task else None


class DamagedTask(UserError):
    """A finished task that cannot be merged as it is.

    Args:
        output: the directory prepared into.
        task: which task.
        what: is wrong with it.
    """

    def __init__(self, output: Path, task: int, what: str) -> None:
        super().__init__(what, where=str(output), fix=redo(output, task))
        self.task = task


def merge(output: Path) -> dict[str, Any]:
    """Put the tasks' manifests together into ``manifest.json``.

    Returns:
        The manifest's content.

    Raises:
        UserError: no plan, tasks that are not finished or of another plan, or no document left.
        DamagedTask: files that are gone or have another size, windows that do not join up, or
            work done twice.
    """
    plan = read_plan(output)
    entries = finished_tasks(output, plan)
    missing = [task for task in range(plan["tasks"]) if task not in entries]
    if missing:
        raise UserError(
            f"{len(missing)} of {plan['tasks']} tasks are not finished: {ranges(missing)}",
            where=str(output),
            fix=redo(output, *missing),
        )
    done = [entries[task] for task in range(plan["tasks"])]
    for entry in done:
        if problem := next(_problems(output, plan, entry), ""):
            raise DamagedTask(output, entry["task"], problem)
    content = described(plan, done)
    if not content["shards"]:
        raise UserError(
            "no document is left: " + json.dumps(content["documents"]),
            where=str(output),
            fix="give other inputs or loosen the filters, with another --output",
        )
    counts = [np.load(output / e["unigrams"]["name"], allow_pickle=False) for e in done]
    content["unigram_entropy"] = entropy(np.sum(counts, axis=0))
    content["fingerprint"] = fingerprint(content)
    write_json(output / MANIFEST, content)
    return content


def finished_tasks(output: Path, plan: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    """What the finished tasks wrote, by number.

    Raises:
        UserError: a task of another plan.
    """
    frozen, found = plan_digest(plan), {}
    for path in sorted(output.glob("task-*.json")):
        name = path.name.removeprefix("task-").removesuffix(".json")
        if not name.isdecimal():
            continue
        entry = read_task(output, int(name))
        foreign = int(name) >= plan["tasks"] or (entry is not None and entry["plan"] != frozen)
        if foreign:
            raise UserError(
                f"task {int(name)} was prepared under another plan",
                where=str(path),
                fix="remove it, or prepare into an empty --output",
            )
        if entry is not None:
            found[int(name)] = entry
    return found


def _problems(output: Path, plan: Mapping[str, Any], entry: Mapping[str, Any]) -> Iterator[str]:
    """What keeps a task out of the manifest; sizes are compared, ``verify`` reads contents."""
    yield from record_problems(plan, entry)
    for name, size in sizes(shards_of([entry])):
        if problem := size_problem(output / name, size):
            yield problem
    if problem := file_problem(output, entry["unigrams"]):
        yield problem


def record_problems(plan: Mapping[str, Any], entry: Mapping[str, Any]) -> Iterator[str]:
    """What keeps a finished task's record out of the manifest: gaps, and work done twice."""
    task, windows = entry["task"], entry["windows"]
    yield from _gaps(task, windows, units_of(plan, task))
    found = _summed(window["documents"] for window in windows)["kept"]
    if found != entry["documents"]["kept"]:
        yield f"task {task} kept {entry['documents']['kept']} documents, its windows {found}"
    for index, window in enumerate(windows):
        yield from _window_problems(task, index, window)


def file_problem(output: Path, entry: Mapping[str, Any]) -> str:
    """How a file departs from its entry (name, bytes, sha256), or an empty string."""
    path = output / entry["name"]
    if problem := size_problem(path, entry["bytes"]):
        return problem
    try:
        found = sha256_file(path)
    except OSError as error:
        return f"{path.name} cannot be read: {error.strerror}"
    return "" if found == entry["sha256"] else f"{path.name} does not have its checksum"


def units_of(plan: Mapping[str, Any], task: int) -> int:
    """How many units are dealt to a task."""
    units = sum(entry["units"] for entry in plan["inputs"])
    return len(range(task, units, plan["tasks"]))


def _gaps(task: int, windows: Sequence[Mapping[str, Any]], units: int) -> Iterator[str]:
    """Windows that do not begin where the one before ended, or that end beyond the task's work."""
    end = [0, 0]
    for index, window in enumerate(windows):
        if window["first"] != end:
            kind = "leaves out" if window["first"] > end else "repeats"
            yield f"window {index} of task {task} {kind} units: {end} to {window['first']}"
        end = window["last"]
        if end <= window["first"] or end > [units, 0]:
            yield f"window {index} of task {task} ends at {end} of {units} units"


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


def _summed(counts: Iterable[Mapping[str, int]]) -> Counter[str]:
    total: Counter[str] = Counter()
    for each in counts:
        total.update(each)
    return total


def shards_of(
    entries: Iterable[Mapping[str, Any]], kinds: Sequence[str] = ("shard", "held_out")
) -> list[dict[str, Any]]:
    """The shards of tasks in (task, window) order: training, held-out or both kinds."""
    windows = [window for entry in entries for window in entry["windows"]]
    return [window[kind] for kind in kinds for window in windows if window[kind] is not None]


def described(plan: Mapping[str, Any], done: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The manifest's content of these tasks, without its entropy and fingerprint."""
    shards, held_out = (shards_of(done, [kind]) for kind in ("shard", "held_out"))
    return {
        "format": schema.FORMAT,
        "tokens": sum(shard["tokens"] for shard in shards),
        "held_out_tokens": sum(shard["tokens"] for shard in held_out),
        "documents": dict(_summed(entry["documents"] for entry in done)),
        "vocab_size": plan["vocab_size"],
        "eos_id": plan["eos_id"],
        "bos_id": plan["bos_id"],
        "bos": plan["settings"]["bos"],
        "dtype": token_type(plan["vocab_size"]),
        "masks": plan["settings"]["prompt_column"] is not None,
        "tokenizer_sha256": plan["tokenizer_sha256"],
        "settings": plan["settings"],
        "tasks": plan["tasks"],
        "inputs": [{"name": entry["name"], "size": entry["size"]} for entry in plan["inputs"]],
        "shards": shards,
        "held_out": held_out,
    }


def token_type(vocab_size: int) -> str:
    """The numpy type of stored tokens."""
    return "uint16" if vocab_size <= 65_535 else "uint32"


def entropy(counts: Any) -> float:
    """Entropy of a token's distribution, nats per token, to six digits."""
    total = int(counts.sum())
    shares = (int(count) / total for count in counts if count)
    return round(-math.fsum(share * math.log(share) for share in shares), 6)


def digest(content: Any) -> str:
    """The sha256 of the canonical JSON."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def fingerprint(content: Mapping[str, Any]) -> str:
    """The hash that names the data: all of the manifest but the provenance files' bytes.

    Those depend on the version of pyarrow that wrote them.
    """
    named = {
        kind: [shard | {"provenance": shard["provenance"]["name"]} for shard in content[kind]]
        for kind in ("shards", "held_out")
    }
    body = {key: content[key] for key in content if key != "fingerprint"}
    return digest(body | named)


def load(path: Path) -> dict[str, Any]:
    """Read and check a ``manifest.json``.

    Raises:
        UserError: no manifest, of another format, changed after it was written, or one that names
            files outside its directory.
    """
    if path.is_dir():
        raise UserError(
            "a directory, not a manifest", where=str(path), fix=f"give {path / MANIFEST}"
        )
    fix = "make one with `titans data prepare`, or `titans data merge`"
    content = schema.read(path, schema.MANIFEST, fix=fix)
    if content["fingerprint"] != fingerprint(content):
        raise UserError(
            "the manifest does not match its fingerprint",
            where=str(path),
            fix=f"run `titans data merge --output {path.parent}`",
        )
    return content


def files(shard: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    """The entries (name, bytes, sha256) of a shard's files: tar, provenance, index."""
    return shard, shard["provenance"], shard["index"]


def sizes(shards: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, int]]:
    """Name and bytes of every file of shards."""
    for shard in shards:
        for entry in files(shard):
            yield entry["name"], entry["bytes"]


def size_problem(path: Path, size: int) -> str:
    """What is wrong with a file that should have ``size`` bytes, or an empty string."""
    if not path.exists():
        return f"{path.name} is missing"
    found = path.stat().st_size
    return "" if found == size else f"{path.name} has {found} bytes instead of {size}"


def redo(output: Path, task: int, *more: int) -> str:
    """What mends tasks: the command, which keeps what is whole, or, without a plan, a copy."""
    if not (output / PLAN).exists():
        return f"copy it back: without {PLAN} it cannot be made again here"
    return f"run `{redo_command(output, [task, *more])}`"


def redo_command(output: Path, tasks: Sequence[int]) -> str:
    """The command that does tasks of a frozen plan, an array job if there are several."""
    prepare = ["titans", "data", "prepare", "--output", str(output)]
    if len(tasks) == 1:
        return shlex.join([*prepare, "--task", str(tasks[0])])
    return shlex.join(["sbatch", f"--array={ranges(tasks)}", "--wrap", shlex.join(prepare)])


def ranges(numbers: Iterable[int]) -> str:
    """Ascending numbers as SLURM writes them: ``0-3,7``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(f"{a}" if a == b else f"{a}-{b}" for a, b in runs)
