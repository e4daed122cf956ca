"""The frozen plan: which text, cut into which units, dealt to which task.

A plan is written once, before the first task. A seeded permutation deals its units (row groups) to
tasks: task t of T takes every T-th. Later runs are compared with it, so that neither other options
nor late files change what a task does.
"""

import sys
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar

from data_prep import duplicates, estimate, manifest, schema
from data_prep import inputs as origin
from data_prep.inputs import Input
from data_prep.manifest import read_plan
from data_prep.output import alone, write_json, write_json_once, writing
from data_prep.settings import Settings
from data_prep.sources import Layout, layout, shuffled
from data_prep.spool import PACKED
from data_prep.tokenizer import Tokenizer
from titans_pretrain.errors import UserError
from titans_pretrain.files import sha256_file

UNITS = 0  # stream of the seed
READERS = 16  # files looked at, at the same time
LINE_SECONDS = 10.0
TASK_TOKENS = 500_000_000  # of a task, where their number is left to us

Found = TypeVar("Found")


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
        """Hash of what the output depends on."""
        return manifest.plan_digest(self.content)

    def settings(self) -> Settings:
        """What else decides the output's bytes."""
        return Settings(**self.content["settings"])

    def units(self) -> list[tuple[Input, Layout, int]]:
        """All units, in input order: a unit's place in the list is its ordinal."""
        return [
            (item, shape, unit)
            for item, shape in zip(self.inputs, self._layouts(), strict=True)
            for unit in range(shape.units)
        ]

    def task_units(self, task: int) -> list[tuple[int, Input, Layout, int]]:
        """A task's units in the order in which it reads them, each with its ordinal first."""
        layouts = self._layouts()
        ends = list(accumulate(shape.units for shape in layouts))
        found = []
        for ordinal in self._dealt(task, ends):
            place = bisect_right(ends, ordinal)
            shape = layouts[place]
            unit = ordinal - (ends[place] - shape.units)
            found.append((ordinal, self.inputs[place], shape, unit))
        return found

    @property
    def deals_files(self) -> bool:
        """Whether a compressed file goes to one task whole, so that it is unpacked once in all."""
        packed = sum(entry["name"].endswith(PACKED) for entry in self.content["inputs"])
        return packed >= max(self.tasks, 2)

    def _dealt(self, task: int, ends: Sequence[int]) -> Iterator[int]:
        """Ordinals of a task's units: every T-th of all units, or of all files, in random order."""
        seed = self.content["settings"]["seed"]
        if not self.deals_files:
            yield from shuffled(ends[-1] if ends else 0, seed, UNITS)[task :: self.tasks]
            return
        spans = []
        for entry, end in zip(self.content["inputs"], ends, strict=True):
            start = end - entry["units"]
            whole = entry["name"].endswith(PACKED)
            spans += [range(start, end)] if whole else [range(i, i + 1) for i in range(start, end)]
        for place in shuffled(len(spans), seed, UNITS)[task :: self.tasks]:
            yield from (spans[place][i] for i in shuffled(len(spans[place]), seed, UNITS, place))

    def _layouts(self) -> list[Layout]:
        return [
            Layout(entry["units"], tuple(entry.get("starts", ())))
            for entry in self.content["inputs"]
        ]


def freeze(
    inputs: Sequence[Input],
    tokenizer: Tokenizer,
    output: Path,
    settings: Settings,
    tasks: int | None,
    command: Sequence[str],
    *,
    drop_duplicates: bool = False,
    workers: int | None = None,
) -> Plan:
    """Write ``plan.json``, or check that it describes the same work.

    With the frozen plan's own command, files that the patterns match by now and that the plan
    lacks are left out, saying so. Where inputs have moved, the plan takes their new place.

    Args:
        inputs: the files.
        tokenizer: encodes; its model is copied beside the plan.
        output: directory of plan, shards and manifests.
        settings: filters, columns, seed, sizes.
        tasks: into how many tasks the units are dealt; None: one for each 500 million tokens
            expected, at most 1000, or what the plan has.
        command: the options that repeat this, for messages.
        drop_duplicates: leave out all but the first of documents of equal text.
        workers: processes that look for duplicates; None: one a core.

    Raises:
        UserError: bad input, no unit at all, or an output begun with another plan; names the
            difference.
        TitansError: a file cannot be written.
    """
    path = output / manifest.PLAN
    placed = (replace(item, url=origin.absolute(item.url)) for item in inputs)
    ordered = tuple(sorted(placed, key=lambda item: item.name))
    with alone(output):  # one process of an array; merge refuses tasks of different plans
        if not path.exists():
            content = _describe(ordered, tokenizer, settings, tasks, command)
            if drop_duplicates:
                units = Plan(content, ordered).units()
                content["duplicates"] = duplicates.find(units, settings, output, workers)
            _copy_tokenizer(tokenizer, output)
            write_json_once(path, content)
        frozen = read_plan(output)
        new = {
            "settings": asdict(settings),
            "tasks": tasks or frozen["tasks"],
            "tokenizer_sha256": tokenizer.sha256,
            "drop_duplicates": drop_duplicates,
            "command": list(command),
        }
        plan = _same_work(output, frozen, new, ordered)
        if plan.content != frozen:
            write_json(path, plan.content)
        _copy_tokenizer(tokenizer, output)
    return plan


def require(
    output: Path,
    settings: Mapping[str, Any],
    *,
    tasks: int | None = None,
    tokenizer: Path | None = None,
    drop_duplicates: bool = False,
) -> None:
    """Refuse options that the frozen plan does not have; those not given are the plan's.

    Raises:
        UserError: no plan, or another one; names the difference.
    """
    frozen = read_plan(output)
    new = {
        "settings": settings,
        "tasks": tasks or frozen["tasks"],
        "tokenizer_sha256": Tokenizer(tokenizer).sha256
        if tokenizer
        else frozen["tokenizer_sha256"],
        "drop_duplicates": drop_duplicates or frozen["duplicates"] is not None,
    }
    _refuse(difference(frozen, new), output)


def load(output: Path, *, task: int | None = None) -> tuple[Plan, Tokenizer]:
    """A frozen plan, its inputs where it found them, and the tokenizer copied beside it.

    Args:
        output: the directory.
        task: look only at the inputs that this task reads; None: at all.

    Raises:
        UserError: no plan, an input that is gone or has changed, another tokenizer, or a damaged
            list of duplicates.
    """
    plan, tokenizer = _opened(output, task)
    if problem := manifest.duplicates_problem(output, plan.content):
        raise UserError(problem, where=str(output), fix=manifest.restore_fix(output))
    return plan, tokenizer


def restore(output: Path, *, workers: int | None = None) -> None:
    """Make a frozen plan's list of duplicates again if it is gone or damaged.

    Args:
        output: the directory.
        workers: processes that look for duplicates; None: one a core.

    Raises:
        UserError: it does not come out as recorded, or what ``load`` refuses.
    """
    recorded = read_plan(output)["duplicates"]
    if not manifest.duplicates_problem(output, {"duplicates": recorded}):
        return
    plan, _ = _opened(output)
    with alone(output):
        if duplicates.find(plan.units(), plan.settings(), output, workers) != recorded:
            raise UserError(
                f"{recorded['name']}, made again, is not as recorded: the input changed",
                where=str(output),
                fix="put the input back, or prepare into another --output",
            )


def _opened(output: Path, task: int | None = None) -> tuple[Plan, Tokenizer]:
    content = read_plan(output)
    tokenizer = Tokenizer(output / manifest.TOKENIZER)
    if tokenizer.sha256 != content["tokenizer_sha256"]:
        raise UserError(
            "the tokenizer is not the one that the plan was made with",
            where=str(tokenizer.path),
            fix=f"copy back the model with sha256 {content['tokenizer_sha256']}",
        )
    plan = Plan(content, tuple(inputs_of(content)))
    read = plan.inputs if task is None else _of_task(plan, task)
    seen = dict(zip(read, _each(_seen, read), strict=True))
    for entry, item in zip(content["inputs"], plan.inputs, strict=True):
        if seen.get(item) not in ((entry["size"], entry.get("sha256")), None):
            raise UserError(
                f"the planned input {entry['name']} has other content now",
                where=entry["url"],
                fix="put the file back, or prepare into another --output",
            )
    return plan, tokenizer


def _of_task(plan: Plan, task: int) -> list[Input]:
    """The inputs in which a task's units lie."""
    return list(dict.fromkeys(item for _, item, _, _ in plan.task_units(task)))


def inputs_of(content: Mapping[str, Any]) -> list[Input]:
    """A frozen plan's inputs, where it found them."""
    return [Input(entry["name"], entry["url"], entry["size"]) for entry in content["inputs"]]


def pinned_inputs(output: Path, command: Sequence[str]) -> list[Input] | None:
    """The inputs of a plan frozen with this command, if commits of the hub pin them all.

    They need not be looked up again: the plan's own are as they were, later ones stay out.
    """
    if not (output / manifest.PLAN).exists():
        return None
    frozen = read_plan(output)
    pinned = all(entry["url"].startswith("hf://") for entry in frozen["inputs"])
    return inputs_of(frozen) if pinned and frozen["command"] == list(command) else None


def _seen(item: Input) -> tuple[int, str | None] | None:
    """Size and content of a local file, as a plan has them; None of a URL.

    Raises:
        UserError: it is gone.
    """
    if origin.is_remote(item.url):
        return None
    path = origin.local(item)
    if not path.is_file():
        raise UserError(
            f"the planned input {item.name} is gone",
            where=item.url,
            fix="put it back, or name its new place: repeat the first command with other --input",
        )
    found = replace(item, size=path.stat().st_size)
    return found.size, origin.sha256(found)


def _describe(
    inputs: Sequence[Input],
    tokenizer: Tokenizer,
    settings: Settings,
    tasks: int | None,
    command: Sequence[str],
) -> dict[str, Any]:
    """The content of ``plan.json``; reads every footer, and jsonl files whole."""
    if settings.bos and tokenizer.bos_id is None:
        raise UserError(
            "the tokenizer has no BOS piece",
            where=str(tokenizer.path),
            fix="leave out --bos, or give a model with one",
        )
    layouts = _each(layout, inputs)
    if not any(shape.units for shape in layouts):
        raise UserError("the inputs hold no row at all", where="--input", fix="give other files")
    expected = estimate.expected(inputs, layouts, tokenizer, settings)
    suggested = min(1000, -(-expected["tokens"] // TASK_TOKENS), expected["units"])
    return {
        "format": schema.FORMAT,
        "inputs": [
            _entry(item, shape, content)
            for item, shape, content in zip(
                inputs, layouts, _each(origin.sha256, inputs), strict=True
            )
        ],
        "settings": asdict(settings),
        "tasks": tasks or max(1, suggested),
        "tokenizer_sha256": tokenizer.sha256,
        "vocab_size": tokenizer.vocab_size,
        "eos_id": tokenizer.eos_id,
        "bos_id": tokenizer.bos_id,
        "command": list(command),
        "expected": expected,
        "duplicates": None,
    }


def _entry(item: Input, shape: Layout, content: str | None) -> dict[str, Any]:
    entry = {"name": item.name, "url": item.url, "size": item.size, "units": shape.units}
    entry |= {"starts": list(shape.starts)} if shape.starts else {}
    return entry | ({"sha256": content} if content else {})


def _each(look: Callable[[Input], Found], inputs: Iterable[Input]) -> list[Found]:
    """What a function finds in every file, several at a time; says now and then how far it is."""
    items, found = list(inputs), []
    shown = time.monotonic()
    with ThreadPoolExecutor(READERS) as pool:
        for answer in pool.map(look, items):
            found.append(answer)
            if time.monotonic() - shown >= LINE_SECONDS:
                shown = time.monotonic()
                print(f"looked at {len(found)} of {len(items)} files", file=sys.stderr)
    return found


def _same_work(
    output: Path, frozen: dict[str, Any], new: Mapping[str, Any], inputs: Sequence[Input]
) -> Plan:
    """The frozen plan with its inputs where they lie now.

    Args:
        output: the directory.
        frozen: the content of ``plan.json``.
        new: what is wanted now, in the same shape, without the inputs.
        inputs: the files found now.

    Raises:
        UserError: other work; names the difference.
    """
    found = _planned(frozen, inputs) if new["command"] == frozen["command"] else list(inputs)
    _refuse(difference(frozen, new) or _other_inputs(frozen, found), output)
    places = {item.name: item for item in found}
    ordered = tuple(places[entry["name"]] for entry in frozen["inputs"])
    entries = [
        entry | {"url": item.url} for entry, item in zip(frozen["inputs"], ordered, strict=True)
    ]
    if entries == frozen["inputs"]:
        return Plan(frozen, ordered)
    return Plan(frozen | {"inputs": entries, "command": new["command"]}, ordered)


def _refuse(problem: str, output: Path) -> None:
    if problem:
        raise UserError(
            f"the output was begun with another plan: {problem}",
            where=str(output / manifest.PLAN),
            fix="repeat the first command's options, or choose another --output",
        )


def _planned(frozen: Mapping[str, Any], inputs: Sequence[Input]) -> list[Input]:
    """The planned ones among the files that the plan's own patterns match now.

    Late files may lie in other folders, which changes every name: places tell who is who.
    """
    by_url = {item.url: item for item in inputs}
    known = [
        replace(by_url.pop(entry["url"]), name=entry["name"])
        for entry in frozen["inputs"]
        if entry["url"] in by_url
    ]
    if by_url:
        late = sorted(by_url)
        names = ", ".join(late[:5]) + (", …" if len(late) > 5 else "")
        print(
            f"note: files that are not in the frozen plan stay out ({len(late)}): {names}",
            file=sys.stderr,
        )
    return known


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """The first thing besides inputs in which two plans differ, or an empty string."""
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
    if (old["duplicates"] is None) == new["drop_duplicates"]:
        return f"it {'keeps' if new['drop_duplicates'] else 'drops'} duplicates"
    return ""


def _other_inputs(frozen: Mapping[str, Any], inputs: Sequence[Input]) -> str:
    """The first input that the plan lacks, or that is gone, or is another file at a new place."""
    before = {entry["name"]: entry for entry in frozen["inputs"]}
    after = {item.name: item for item in inputs}
    for name in sorted(before.keys() | after.keys()):
        if name not in after:
            return f"its input {name} is not given now"
        if name not in before:
            return f"the input {name} is new"
        if problem := _changed(before[name], after[name]):
            return problem
    return ""


def _changed(entry: Mapping[str, Any], item: Input) -> str:
    """How a file differs from the planned one, or an empty string."""
    if item.size != entry["size"]:
        return f"its input {item.name} has {entry['size']} bytes, now {item.size}"
    known = entry.get("sha256")
    content = origin.sha256(item) if known and item.url != entry["url"] else known
    return "" if content in (known, None) else f"its input {item.name} has other content now"


def _copy_tokenizer(tokenizer: Tokenizer, output: Path) -> None:
    path = output / manifest.TOKENIZER
    if not path.exists() or sha256_file(path) != tokenizer.sha256:
        with writing(path) as handle:
            handle.write(tokenizer.content)
