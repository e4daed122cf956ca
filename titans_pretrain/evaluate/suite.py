"""A model on several tasks: what is finished is kept, and the same command does the rest.

No torch until a task runs.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from titans_pretrain.errors import TitansError
from titans_pretrain.evaluate import loaded, report
from titans_pretrain.evaluate.tasks import Task
from titans_pretrain.files import read_json, remove_abandoned, write_json

CELLS = "cells"
FORMAT = "titans-eval-cell/1"


def evaluate(
    model: Path,
    out: Path,
    tasks: Sequence[Task],
    *,
    device: str = "auto",
    trust_remote_code: bool = False,
    paper_size: str | None = None,
) -> dict[str, Any]:
    """Score a model; write ``OUT/cells`` as they come, then report.json, report.md, report.png.

    A cell that an earlier call wrote is taken as it is, if its task's identity and the model are
    the same. The report is of all cells of this model that ``OUT`` holds.

    Args:
        model: what ``titans export`` wrote, or another causal language model.
        out: directory of the results, made where it is missing.
        tasks: what it is scored on.
        device: ``cpu``, ``cuda``, …; ``auto`` takes a GPU if there is one.
        trust_remote_code: run the Python files of a model of another kind.
        paper_size: of the paper's models beside it; None takes the nearest.

    Returns:
        What ``report.json`` holds.

    Raises:
        UserError: model and tasks do not go together.
        TitansError: a task fails, or a result cannot be written; finished cells stay.
    """
    fingerprint = loaded.fingerprint(model)
    cells = out / CELLS
    cells.mkdir(parents=True, exist_ok=True)
    remove_abandoned(cells, "*")
    wanted = [(task, cell) for task in tasks for cell in task.cells()]
    identities = {task.name: _plain(task) for task in tasks}
    missing = []
    for task, cell in wanted:
        if _is_there(cells, task, cell, identities[task.name], fingerprint):
            _tell(f"{label(task.name, cell)}: there already")
        else:
            missing.append((task, cell))
    network = None
    for number, (task, cell) in enumerate(missing, start=1):
        if network is None:
            network = loaded.load(model, device=device, trust_remote_code=trust_remote_code)
        name = label(task.name, cell)
        result = _run(task, cell, network, f"[{number}/{len(missing)}] {name}")
        row = {
            "format": FORMAT,
            "task": task.name,
            "cell": cell,
            "identity": identities[task.name],
            "model": fingerprint,
            "dtype": network.dtype,
            "result": result,
        }
        write_json(cells / f"{name}.json", row)
        if result.get("truncated"):
            _tell(
                f"warning: {name}: {result['truncated']:,} of {result['samples']:,} samples were "
                f"cut to {identities[task.name]['max_length']:,} tokens, on the left"
            )
    return report.write(model, out, kept(cells, fingerprint), paper_size=paper_size)


def label(task: str, cell: str) -> str:
    """A cell's name, that of its file."""
    return f"{task}-{cell}" if cell else task


def kept(cells: Path, fingerprint: str) -> list[dict[str, Any]]:
    """What a directory holds of a model's cells, by task and then by size of the cell."""
    rows = [read_json(path) for path in sorted(cells.glob("*.json"))]
    return [
        row
        for row in rows
        if row and row.get("format") == FORMAT and row.get("model") == fingerprint
    ]


def _plain(task: Task) -> dict[str, Any]:
    """A task's identity as JSON gives it back."""
    plain: dict[str, Any] = json.loads(json.dumps(task.identity()))
    return plain


def _is_there(
    cells: Path, task: Task, cell: str, identity: dict[str, Any], fingerprint: str
) -> bool:
    row = read_json(cells / f"{label(task.name, cell)}.json") or {}
    found = [row.get(key) for key in ("format", "identity", "model")]
    return found == [FORMAT, identity, fingerprint] and isinstance(row.get("result"), dict)


def _run(task: Task, cell: str, network: loaded.Loaded, title: str) -> dict[str, Any]:
    def tell(line: str) -> None:
        _tell(f"{title}  {line}")

    _tell(title)
    try:
        return task.run(network, cell, tell)
    except TitansError as error:
        what = f"{label(task.name, cell)}: {error.what}"
        raise type(error)(what, where=error.where, fix=error.fix) from None
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError) and "out of memory" not in str(error):
            raise
        raise TitansError(
            f"{label(task.name, cell)} does not fit in memory",
            where=str(network.device),
            fix="use fewer rows at once (--batch), shorter inputs, or a device with more memory",
        ) from None


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
