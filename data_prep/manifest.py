"""What a prepared directory says about itself.

``plan.json``       frozen by the first task: inputs, tokenizer, settings, number of tasks.
``task-00000.json`` what one finished task wrote.
``manifest.json``   all tasks together: what readers open.
"""

import hashlib
import json
import math
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_prep import inputs as origin
from data_prep import schema
from data_prep.inputs import Input
from data_prep.output import write_json
from data_prep.schema import FORMAT
from data_prep.sources import Columns, Layout
from data_prep.tar import MEMBER_TOKENS
from data_prep.tokenizer import Tokenizer
from titans_pretrain.errors import UserError
from titans_pretrain.files import sha256_file

PLAN, MANIFEST, TOKENIZER = "plan.json", "manifest.json", "tokenizer.model"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything besides inputs, tokenizer and tasks that the output's bytes depend on."""

    text_column: str = "text"
    """Column of the document's text."""
    id_column: str = "id"
    """Column of its identifier; may be missing."""
    prompt_column: str | None = None
    """Column of text put before the document's, on which there is no loss."""
    min_score: float | None = None
    """Keep rows whose ``score`` is at least this."""
    language: str | None = None
    """Keep rows whose ``language`` is this."""
    seed: int = 0
    """Seed of the order of units and documents."""
    shard_bytes: int = 2**29
    """A shard ends with the batch of rows that reaches this many bytes of tokens."""
    member_tokens: int = MEMBER_TOKENS
    """Tokens per tar member."""

    def columns(self) -> Columns:
        """The columns to read."""
        filters = {"score": self.min_score, "language": self.language}
        needed = tuple(name for name, value in filters.items() if value is not None)
        return Columns(self.text_column, self.id_column, self.prompt_column, needed)


@dataclass(frozen=True)
class Plan:
    """The frozen work: ``content`` is the JSON, ``inputs`` where its files lie now."""

    content: dict[str, Any]
    inputs: tuple[Input, ...]

    @property
    def tasks(self) -> int:
        """Number of tasks."""
        return self.content["tasks"]

    @property
    def digest(self) -> str:
        """Hash of what the output depends on (not of how the command was typed)."""
        return digest({key: self.content[key] for key in self.content if key != "command"})

    def units(self) -> list[tuple[Input, Layout, int]]:
        """All units, in input order."""
        found = []
        for item, entry in zip(self.inputs, self.content["inputs"], strict=True):
            shape = Layout(entry["units"], tuple(entry.get("starts", ())))
            found += [(item, shape, unit) for unit in range(shape.units)]
        return found


def describe(
    inputs: Sequence[Input],
    layouts: Mapping[str, Layout],
    tokenizer: Tokenizer,
    settings: Settings,
    tasks: int,
    command: Sequence[str],
) -> dict[str, Any]:
    """The content of ``plan.json``.

    Args:
        inputs: the files, sorted by name.
        layouts: by input name.
        tokenizer: the model that encodes.
        settings: see there.
        tasks: into how many tasks the units are dealt.
        command: the options that repeat the preparation, for messages.
    """
    entries = []
    for item in inputs:
        shape = layouts[item.name]
        entry = {"name": item.name, "size": item.size, "units": shape.units}
        entry |= {"starts": list(shape.starts)} if shape.starts else {}
        content = origin.sha256(item)
        entries.append(entry | ({"sha256": content} if content else {}))
    return {
        "format": FORMAT,
        "inputs": entries,
        "settings": asdict(settings),
        "tasks": tasks,
        "tokenizer_sha256": tokenizer.sha256,
        "vocab_size": tokenizer.vocab_size,
        "eos_id": tokenizer.eos_id,
        "command": list(command),
    }


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """The first thing in which two plans differ, or an empty string."""
    if old["tasks"] != new["tasks"]:
        return f"it has {old['tasks']} tasks, now {new['tasks']}"
    if old["tokenizer_sha256"] != new["tokenizer_sha256"]:
        return (
            f"its tokenizer has sha256 {old['tokenizer_sha256'][:12]}…, "
            f"now {new['tokenizer_sha256'][:12]}…"
        )
    for name, value in new["settings"].items():
        if old["settings"].get(name) != value:
            return f"it has {name} {old['settings'].get(name)!r}, now {value!r}"
    before, after = ({i["name"]: i for i in plan["inputs"]} for plan in (old, new))
    for name in sorted(before.keys() | after.keys()):
        if name not in after:
            return f"its input {name} is not given now"
        if name not in before:
            return f"the input {name} is new"
        sizes = [entry["size"] for entry in (before[name], after[name])]
        if sizes[0] != sizes[1]:
            return f"its input {name} has {sizes[0]} bytes, now {sizes[1]}"
        if before[name].get("sha256") != after[name].get("sha256"):
            return f"its input {name} has other content now"
    return ""


def task_file(output: Path, task: int) -> Path:
    """Where a task's manifest lies."""
    return output / f"task-{task:05d}.json"


def read_plan(output: Path) -> dict[str, Any]:
    """The frozen plan.

    Raises:
        UserError: there is none, it is damaged, or it has another format.
    """
    path = output / PLAN
    if not path.exists():
        fix = "run `titans data prepare` first"
    else:
        fix = f"remove {PLAN}, then repeat `titans data prepare` with the first command's options"
    return schema.read(path, schema.PLAN, fix=fix)


def read_task(output: Path, task: int) -> dict[str, Any] | None:
    """What a finished task wrote; None when its file is missing, damaged or another task's."""
    try:
        entry = schema.read(task_file(output, task), schema.TASK, fix="")
    except UserError:
        return None
    return entry if entry["task"] == task else None


def merge(output: Path) -> dict[str, Any]:
    """Put the tasks' manifests together into ``manifest.json``.

    Returns:
        The manifest's content.

    Raises:
        UserError: no plan, tasks that are not finished, files that are gone or have another size,
            tasks of different plans, or no document left.
    """
    plan = read_plan(output)
    frozen = Plan(plan, ()).digest
    entries = [read_task(output, task) for task in range(plan["tasks"])]
    missing = [task for task, entry in enumerate(entries) if entry is None]
    if missing:
        raise UserError(
            f"{len(missing)} of {plan['tasks']} tasks are not finished: "
            + ", ".join(map(str, missing[:20]))
            + (", …" if len(missing) > 20 else ""),
            where=str(output),
            fix=redo(output, missing[0]),
        )
    done = [entry for entry in entries if entry is not None]
    for entry in done:
        _check_task(output, entry, frozen)
    content = _content(output, plan, done)
    if not content["tokens"]:
        raise UserError(
            "no document is left: " + json.dumps(content["documents"]),
            where=str(output),
            fix="give other inputs or loosen the filters, with another --output",
        )
    content["fingerprint"] = fingerprint(content)
    write_json(output / MANIFEST, content)
    return content


def _check_task(output: Path, entry: Mapping[str, Any], frozen: str) -> None:
    task = entry["task"]
    if entry["plan"] != frozen:
        raise UserError(
            f"task {task} was prepared under another plan",
            where=str(task_file(output, task)),
            fix="prepare into an empty --output",
        )
    for name, size in sizes(entry["shards"]):
        problem = size_problem(output / name, size)
        if problem:
            raise UserError(problem, where=str(output / name), fix=redo(output, task))
    counts = output / entry["unigrams"]["name"]
    if not counts.exists() or sha256_file(counts) != entry["unigrams"]["sha256"]:
        raise UserError(
            f"{counts.name} is missing or damaged", where=str(counts), fix=redo(output, task)
        )


def _content(output: Path, plan: Mapping[str, Any], done: list[dict[str, Any]]) -> dict[str, Any]:
    counts = sum(
        (np.load(output / entry["unigrams"]["name"], allow_pickle=False) for entry in done),
        np.zeros(plan["vocab_size"], np.int64),
    )
    documents: Counter[str] = Counter()
    for entry in done:
        documents.update(entry["documents"])
    return {
        "format": FORMAT,
        "tokens": int(counts.sum()),
        "documents": dict(documents),
        "unigram_entropy": entropy(counts),
        "vocab_size": plan["vocab_size"],
        "eos_id": plan["eos_id"],
        "dtype": token_type(plan["vocab_size"]),
        "masks": plan["settings"]["prompt_column"] is not None,
        "tokenizer_sha256": plan["tokenizer_sha256"],
        "settings": plan["settings"],
        "tasks": plan["tasks"],
        "inputs": [{"name": entry["name"], "size": entry["size"]} for entry in plan["inputs"]],
        "shards": [shard for entry in done for shard in entry["shards"]],
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
    shards = [shard | {"provenance": shard["provenance"]["name"]} for shard in content["shards"]]
    body = {key: content[key] for key in content if key != "fingerprint"}
    return digest(body | {"shards": shards})


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


def sizes(shards: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, int]]:
    """Name and bytes of every file of shards."""
    for shard in shards:
        yield shard["name"], shard["bytes"]
        yield shard["provenance"]["name"], shard["provenance"]["bytes"]


def size_problem(path: Path, size: int) -> str:
    """What is wrong with a file that should have ``size`` bytes, or an empty string."""
    if not path.exists():
        return f"{path.name} is missing"
    found = path.stat().st_size
    return "" if found == size else f"{path.name} has {found} bytes instead of {size}"


def redo(output: Path, task: int) -> str:
    """The command that does a task again; finished, intact ones are skipped by it."""
    try:
        plan = read_plan(output)
    except UserError:
        return "prepare the data again with `titans data prepare`"
    options, tasks = shlex.join(plan["command"]), plan["tasks"]
    tail = f" --task {task} --tasks {tasks}" if tasks > 1 else ""
    model = shlex.join(["--tokenizer", str(output / TOKENIZER), "--output", str(output)])
    return f"run `titans data prepare {options} {model}{tail}`"
