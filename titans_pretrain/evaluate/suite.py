"""A model on several tasks: what is finished is kept, and the same command does the rest.

No torch until a task runs.
"""

import contextlib
import gc
import hashlib
import json
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from titans_pretrain.errors import Misfit, TitansError
from titans_pretrain.evaluate import loaded, report
from titans_pretrain.evaluate.tasks import Fitted, Task
from titans_pretrain.files import read_json, remove_abandoned, write_json

CELLS = "cells"
FORMAT = "titans-eval-cell/1"
_HASH_CHARACTERS = 8


def evaluate(
    model: Path,
    out: Path,
    tasks: Sequence[Task],
    *,
    device: str = "auto",
    trust_remote_code: bool = False,
    paper_size: str | None = None,
    finished: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """Score a model; write ``OUT/cells`` as they come, then report.json, report.md, report.png.

    A cell that an earlier call wrote is taken as it is, if its task's identity, the model and the
    code that runs it are the same; those of others stay beside it. One that fails, whatever the
    reason, is told, and the rest goes on. The report is of all cells of this model that ``OUT``
    holds, and names those that failed.

    Args:
        model: what ``titans export`` wrote, or another causal language model.
        out: directory of the results, made where it is missing.
        tasks: what it is scored on.
        device: ``cpu``, ``cuda``, …; ``auto`` takes a GPU if there is one.
        trust_remote_code: run the Python files of a model of another kind.
        paper_size: of the paper's models beside it; None takes the nearest.
        finished: called after each cell that was written.

    Returns:
        What ``report.json`` holds.

    Raises:
        Misfit: model and tasks do not go together; nothing was run.
        TitansError: a cell failed, the first of them is raised after the rest, one that another
            try may mend before a ``Misfit``; or a result cannot be written. Finished cells stay.
    """
    longest = loaded.positions(model)
    for task in tasks:
        task.check(longest)
    wanted = _wanted(tasks, loaded.fingerprint(model), loaded.code(model))
    cells = out / CELLS
    cells.mkdir(parents=True, exist_ok=True)
    remove_abandoned(cells, "*")
    remove_abandoned(out, "report.*")
    missing = []
    for cell in wanted:
        if cell.is_in(cells):
            _tell(f"{cell.name}: there already")
        else:
            missing.append(cell)
    network = None
    if missing:
        network = loaded.load(model, device=device, trust_remote_code=trust_remote_code)
        _fit(missing, network)
    failures: list[TitansError] = []
    found = {}
    try:
        for number, cell in enumerate(missing, start=1):
            try:
                row = _run(cell, network, f"[{number}/{len(missing)}] {cell.name}")
            except TitansError as error:
                _tell(f"not done: {error.what}")
                failures.append(error.with_traceback(None))
                continue
            write_json(cells / cell.file, row)
            if finished is not None:
                finished()
    finally:
        rows = _rows(cells, loaded.fingerprint(model), wanted)
        if rows or failures:
            failed = [error.what for error in failures]
            found = report.write(model, out, rows, failed=failed, paper_size=paper_size)
    if failures:
        raise min(failures, key=lambda error: isinstance(error, Misfit))  # others may go well
    return found


def label(task: str, cell: str) -> str:
    """A cell's name, with which that of its file begins."""
    return f"{task}-{cell}" if cell else task


@dataclass(frozen=True)
class _Cell:
    """A part of a task, and what its result depends on."""

    task: Task
    cell: str
    identity: dict[str, Any]
    model: str

    @property
    def name(self) -> str:
        return label(self.task.name, self.cell)

    @property
    def file(self) -> str:
        """Another one for each identity and model: no result takes another's place."""
        told = json.dumps([self.identity, self.model], sort_keys=True).encode()
        return f"{self.name}.{hashlib.sha256(told).hexdigest()[:_HASH_CHARACTERS]}.json"

    def is_of(self, row: Mapping[str, Any]) -> bool:
        """Whether a row is the result of this cell."""
        told = [row.get(key) for key in ("format", "task", "cell", "identity", "model")]
        mine = [FORMAT, self.task.name, self.cell, self.identity, self.model]
        return told == mine and isinstance(row.get("result"), dict)

    def is_in(self, cells: Path) -> bool:
        """Whether its result is there, also under the name that is its label alone."""
        names = (self.file, f"{self.name}.json")
        return any(self.is_of(read_json(cells / name) or {}) for name in names)


def _wanted(tasks: Sequence[Task], model: str, code: str) -> list[_Cell]:
    wanted = []
    for task in tasks:
        depends = task.identity() | {"code": code}
        identity: dict[str, Any] = json.loads(json.dumps(depends))  # as it is read back
        wanted += [_Cell(task, cell, identity, model) for cell in task.cells()]
    return wanted


def _fit(cells: Sequence[_Cell], network: loaded.Loaded) -> None:
    """Refuse what does not go with the model's tokenizer, of all cells, before any is run."""
    for cell in cells:
        if isinstance(cell.task, Fitted):
            try:
                cell.task.fit(network, cell.cell)
            except Exception as error:
                if isinstance(error, TitansError):
                    raise _failure(cell, network, error) from None
                # of anything else the cell's own run tells, and the others go on


def _rows(cells: Path, fingerprint: str, wanted: Sequence[_Cell]) -> list[dict[str, Any]]:
    """All cells of a model: the wanted ones last, else the newest."""
    found = []
    for path in cells.glob("*.json"):
        row = read_json(path) or {}
        told = (row.get("format"), row.get("model"), type(row.get("result")))
        if told == (FORMAT, fingerprint, dict):
            asked = any(cell.is_of(row) for cell in wanted)
            found.append((asked, path.stat().st_mtime_ns, path.name, row))
    return [row for *_, row in sorted(found, key=lambda one: one[:-1])]


def _run(cell: _Cell, network: Any, title: str) -> dict[str, Any]:
    """A cell's row."""
    result = _result(cell, network, title)
    if result.get("truncated"):
        _tell(
            f"warning: {cell.name}: {result['truncated']:,} of {result['samples']:,} samples were "
            f"cut to {cell.identity['max_length']:,} tokens, on the left"
        )
    return {
        "format": FORMAT,
        "task": cell.task.name,
        "cell": cell.cell,
        "identity": cell.identity,
        "model": cell.model,
        "dtype": network.dtype,
        "result": result,
    }


def _result(cell: _Cell, network: loaded.Loaded, title: str) -> dict[str, Any]:
    def tell(line: str) -> None:
        _tell(f"{title}  {line}")

    _tell(title)
    try:
        return cell.task.run(network, cell.cell, tell)
    except Exception as error:
        failure = _failure(cell, network, error)
    _free_memory()
    raise failure  # with no context, whose frames would hold the cell's tensors


def _failure(cell: _Cell, network: loaded.Loaded, error: Exception) -> TitansError:
    """Why a cell has no result; what nobody foresaw is shown whole."""
    if isinstance(error, TitansError):
        return type(error)(f"{cell.name}: {error.what}", where=error.where, fix=error.fix)
    if isinstance(error, RuntimeError | MemoryError) and loaded.out_of_memory(error):
        return TitansError(
            f"{cell.name} does not fit in memory",
            where=str(network.device),
            fix="use fewer rows at once (--batch), shorter inputs, or a device with more memory",
        )
    traceback.print_exception(error)
    innermost = traceback.extract_tb(error.__traceback__)[-1]
    return TitansError(
        f"{cell.name}: {type(error).__name__}: {error}".splitlines()[0].rstrip(": "),
        where=f"{innermost.filename}:{innermost.lineno}",
        fix="report this as a bug",
    )


def _free_memory() -> None:
    """Give back what a failed cell held."""
    gc.collect()
    if torch := sys.modules.get("torch"):
        with contextlib.suppress(RuntimeError):  # of a broken device, of which the next cell tells
            torch.cuda.empty_cache()


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
