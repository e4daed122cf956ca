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

from data_prep import schema
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


def duplicates_problem(output: Path, plan: Mapping[str, Any]) -> str:
    """What is wrong with a plan's list of duplicates, or an empty string."""
    return file_problem(output, plan["duplicates"]) if plan["duplicates"] else ""


def restore_fix(output: Path) -> str:
    """The command that makes a plan's list of duplicates again."""
    command = shlex.join(["titans", "data", "plan", "--output", str(output)])
    return f"run `{command}`: it is made again"


def units_of(plan: Mapping[str, Any], task: int) -> int:
    """How many units are dealt to a task."""
    units = sum(entry["units"] for entry in plan["inputs"])
    return len(range(task, units, plan["tasks"]))


def summed(counts: Iterable[Mapping[str, int]]) -> Counter[str]:
    """Counts of documents, added up by name."""
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
        "documents": dict(summed(entry["documents"] for entry in done)),
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
    try:
        found = path.stat().st_size
    except FileNotFoundError:
        found = None
    return listed_problem(path.name, size, found)


def listed_problem(name: str, size: int, found: int | None) -> str:
    """What is wrong with a file that was found with so many bytes, or not (None)."""
    if found is None:
        return f"{name} is missing"
    return "" if found == size else f"{name} has {found} bytes instead of {size}"


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
