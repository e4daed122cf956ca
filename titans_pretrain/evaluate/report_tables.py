"""What a model's results are, beside the paper's: the tables of a report, as data. No torch."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from titans_pretrain.evaluate import loaded, paper

FORMAT = "titans-eval/2"
PAPERS_QUESTIONS = ("qa1", "qa2", "qa3", "qa4", "qa5")
_BABILONG = "babilong_"
_SUFFIXES = {"": 1, "k": 10**3, "m": 10**6}
_FIRST = ("samples", "shots", "max_length", "truncated")
_OF_RESULT = ("samples", "truncated")
_OF_QUESTION = ("task", "facts")
Rows = Sequence[Mapping[str, Any]]


def compare(model: Path, rows: Rows, *, paper_size: str | None) -> dict[str, Any]:
    """Our results, the newest last, and the paper's of a size, None for the nearest."""
    parameters = loaded.parameters(model)
    size = paper_size or paper.nearest_size(parameters)
    facts = loaded.facts(model)
    training = facts.get("training", {})
    ordered = sorted(rows, key=_place)
    return {
        "format": FORMAT,
        "model": str(model),
        "fingerprint": loaded.fingerprint(model),
        "parameters": parameters,
        "training": {
            "step": facts.get("step"),
            "tokens": training.get("tokens"),
            "sequence_length": training.get("sequence_length"),
        },
        "results": [
            {key: row[key] for key in ("task", "cell", "dtype", "identity", "result")}
            for row in ordered
        ],
        "table_1": _table_1(ordered, size),
        "table_2": _table_2(ordered),
        "figure_6": _figure_6(rows),
        "failed": [],
        "curves": _curves(ordered),
    }


def tokens(cell: str) -> float:
    """The length that a cell's name begins with, ``2048``, ``4k`` or ``1M``; 0 if it names none."""
    match = re.match(r"([0-9]+)([kKmM]?)(?![0-9A-Za-z])", cell)
    return int(match[1]) * _SUFFIXES[match[2].lower()] if match else 0.0


def _table_1(rows: Rows, size: str) -> dict[str, Any] | None:
    """Our rows, one for each maximal length and code, and the paper's of a size."""
    asked: dict[Any, dict[str, list[Mapping[str, Any]]]] = {}
    for row in rows:
        if row["task"] in paper.columns():
            depends = tuple(row["identity"].get(name) for name in ("max_length", "code"))
            asked.setdefault(depends, {}).setdefault(row["task"], []).append(row)
    found = {
        depends: {task: _best(same) for task, same in tasks.items()}
        for depends, tasks in asked.items()
    }
    if not found:
        return None
    ours = [
        {
            "max_length": length,
            "code": code,
            "values": paper.row_of({task: row["result"] for task, row in best.items()}),
            "settings": {task: settings(row) for task, row in best.items()},
        }
        for (length, code), best in found.items()
    ]
    told = paper.figures()["table_1"]
    return {
        "source": told["source"],
        "size": size,
        "columns": paper.columns(),
        "ours": ours,
        "paper": paper.table_1(size),
        "notes": [note["text"] for note in told["notes"] if note["size"] == size],
    }


def _best(rows: Rows) -> Mapping[str, Any]:
    """Of those that differ from the newest, the last, in samples alone, the one with the most."""
    alike = next(same for same in _alike(rows, but=("samples",)) if rows[-1] in same)
    return max(reversed(alike), key=lambda row: row["result"]["samples"])


def _table_2(rows: Rows) -> dict[str, Any] | None:
    """Of each task a row for each of the settings it was asked with."""
    ours: dict[str, list[dict[str, Any]]] = {}
    for task in paper.NEEDLES:
        asked = [row for row in rows if row["task"] == task and "accuracy" in row["result"]]
        for same in _alike(asked):
            cells = {row["cell"]: _percent([row]) for row in same}
            ours.setdefault(task, []).append({"settings": _shared(same), "cells": cells})
    return {**paper.figures()["table_2"], "ours": ours} if ours else None


def _figure_6(rows: Rows) -> list[dict[str, Any]]:
    """BABILong with examples (a) and without (b): a row for each settings, facts and questions.

    A row has the lengths at which all its questions were asked. That of the paper's questions is
    there wherever they are. Those of newer facts come first.
    """
    asked = [
        row for row in rows if row["task"].startswith(_BABILONG) and "accuracy" in row["result"]
    ]
    found: dict[str, list[dict[str, Any]]] = {}
    groups = _alike(asked, but=_OF_QUESTION)
    for same in sorted(groups, key=lambda rows: min(map(_place, rows))):
        part = "figure_6a" if _examples(same[0]) else "figure_6b"
        for alike in _by_facts(same):
            found.setdefault(part, []).extend(_of_facts(sorted(alike, key=_place)))
    return [
        {**paper.figures()[part], "examples": part == "figure_6a", "ours": ours}
        for part, ours in sorted(found.items())
    ]


def _of_facts(rows: Rows) -> list[dict[str, Any]]:
    """Rows of the figure, one for each set of questions, of results with equal settings."""
    facts = {row["task"]: row["identity"].get("facts") for row in rows}
    found = []
    for questions, cells in _by_questions(rows).items():
        asked = [facts[_BABILONG + question] for question in questions]
        found.append(
            {
                "questions": list(questions),
                "papers": questions == PAPERS_QUESTIONS,
                "settings": {**_shared(rows), **({"facts": asked} if any(asked) else {})},
                "cells": cells,
            }
        )
    return found


def _examples(row: Mapping[str, Any]) -> bool:
    """Whether a prompt of BABILong had examples."""
    shots: int | None = row["identity"].get("shots")
    return shots != 0


def _by_facts(rows: Rows) -> list[list[Mapping[str, Any]]]:
    """Rows of every question's newest facts, then of the facts before, and so on.

    Each has its own file of facts: one that has no older ones stays, at the lengths at which
    another question has.

    Args:
        rows: that differ in question, facts and length, the newest last.
    """
    ages: dict[str, list[Any]] = {}
    for row in reversed(rows):
        known = ages.setdefault(row["task"], [])
        if row["identity"].get("facts") not in known:
            known.append(row["identity"].get("facts"))
    found = []
    for age in range(max(map(len, ages.values()))):
        facts = {task: known[min(age, len(known) - 1)] for task, known in ages.items()}
        alike = [row for row in rows if row["identity"].get("facts") == facts[row["task"]]]
        lengths = {row["cell"] for row in alike if age < len(ages[row["task"]])}
        found.append([row for row in alike if row["cell"] in lengths])
    return found


def _by_questions(rows: Rows) -> dict[tuple[str, ...], dict[str, dict[str, Any]]]:
    """Set of questions -> length -> mean accuracy, of rows that differ in question and length."""
    by_cell: dict[str, dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        question = row["task"].removeprefix(_BABILONG)
        by_cell.setdefault(row["cell"], {})[question] = row
    found: dict[tuple[str, ...], dict[str, dict[str, Any]]] = {}
    for cell, asked in by_cell.items():
        every = tuple(sorted(asked, key=lambda name: int(name.removeprefix("qa"))))
        papers = (PAPERS_QUESTIONS,) if set(PAPERS_QUESTIONS) <= set(every) else ()
        for questions in {every, *papers}:
            found.setdefault(questions, {})[cell] = _percent([asked[name] for name in questions])
    return dict(sorted(found.items()))


def _curves(rows: Rows) -> list[dict[str, Any]]:
    """The curves by name; those of one name and other settings are numbered."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if "curve" in row["result"]:
            found.setdefault(f"{row['task']} {row['cell']}".strip(), []).append(row)
    return [
        {
            "name": f"{name} ({number})" if len(same) > 1 else name,
            "curve": row["result"]["curve"],
            "settings": settings(row),
        }
        for name, same in found.items()
        for number, row in enumerate(same, start=1)
    ]


def _alike(rows: Rows, but: Sequence[str] = ()) -> list[list[Mapping[str, Any]]]:
    """Rows of equal identity, some of its names aside."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        same = {name: value for name, value in row["identity"].items() if name not in but}
        groups.setdefault(json.dumps(same, sort_keys=True), []).append(row)
    return list(groups.values())


def _place(row: Mapping[str, Any]) -> tuple[str, float]:
    """Where a row stands among the results."""
    return row["task"], tokens(row["cell"])


def _percent(rows: Rows) -> dict[str, Any]:
    """The mean accuracy of rows, and how many samples each is of."""
    accuracies = [row["result"]["accuracy"] for row in rows]
    samples = {row["task"]: row["result"]["samples"] for row in rows}
    return {"accuracy": 100 * sum(accuracies) / len(rows), "samples": samples}


def _shared(rows: Rows) -> dict[str, Any]:
    """The settings that rows have in common."""
    every = [settings(row) for row in rows]
    return {
        name: value
        for name, value in every[0].items()
        if all(one.get(name) == value for one in every)
    }


def settings(row: Mapping[str, Any]) -> dict[str, Any]:
    """What a number depends on: all of its identity, samples as they were."""
    both = {**row["identity"], **{name: row["result"].get(name) for name in _OF_RESULT}}
    names = [*_FIRST, *(name for name in both if name not in _FIRST)]
    return {name: both[name] for name in names if both.get(name) not in (None, [])}
