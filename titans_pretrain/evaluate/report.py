"""What an evaluation found, beside the paper: report.json, report.md and report.png. No torch."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any

from titans_pretrain.evaluate import loaded, paper
from titans_pretrain.files import atomic_file, write_json

FORMAT = "titans-eval/2"
_SUFFIXES = {"": 1, "k": 10**3, "m": 10**6}
_FIRST = ("samples", "shots", "max_length", "truncated")
_OF_RESULT = ("samples", "truncated")
_OF_QUESTION = ("task", "facts")
_HASH = re.compile(r"[0-9a-f]{32,}")
_HASH_CHARACTERS = 8
PAPERS_QUESTIONS = ("qa1", "qa2", "qa3", "qa4", "qa5")
Rows = Sequence[Mapping[str, Any]]


def write(
    model: Path,
    out: Path,
    rows: Rows,
    *,
    failed: Sequence[str] = (),
    paper_size: str | None = None,
) -> dict[str, Any]:
    """Write the three files into ``out``.

    Args:
        model: directory of the model.
        out: directory of the results.
        rows: its cells, as ``suite`` keeps them, the newest last.
        failed: what was tried and not done, a sentence each.
        paper_size: of the paper's models beside it; None takes the nearest.

    Returns:
        What ``report.json`` holds.
    """
    from titans_pretrain.evaluate import report_figure

    found = compare(model, rows, paper_size=paper_size) | {"failed": list(failed)}
    report_figure.draw(found, out / "report.png")
    with atomic_file(out / "report.md", "w") as handle:
        handle.write(page(found))
    write_json(out / "report.json", found)
    return found


def compare(model: Path, rows: Rows, *, paper_size: str | None) -> dict[str, Any]:
    """Our results and the paper's of a size, None for the nearest."""
    parameters = loaded.parameters(model)
    size = paper_size or paper.nearest_size(parameters)
    facts = loaded.facts(model)
    training = facts.get("training", {})
    ordered = sorted(rows, key=lambda row: (row["task"], tokens(row["cell"])))
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
        "figure_6": _figure_6(ordered),
        "failed": [],
        "curves": [
            {
                "name": f"{row['task']} {row['cell']}".strip(),
                "curve": row["result"]["curve"],
                "settings": _settings(row),
            }
            for row in ordered
            if "curve" in row["result"]
        ],
    }


def tokens(cell: str) -> float:
    """The length that a cell's name begins with, ``2048``, ``4k`` or ``1M``; 0 if it names none."""
    match = re.match(r"([0-9]+)([kKmM]?)(?![0-9A-Za-z])", cell)
    return int(match[1]) * _SUFFIXES[match[2].lower()] if match else 0.0


def _table_1(rows: Rows, size: str) -> dict[str, Any] | None:
    """Our rows, one for each maximal length, and the paper's of a size."""
    found: dict[Any, dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        if row["task"] in paper.columns():
            best = found.setdefault(row["identity"].get("max_length"), {})
            known = best.get(row["task"])
            if known is None or row["result"]["samples"] >= known["result"]["samples"]:
                best[row["task"]] = row
    if not found:
        return None
    ours = [
        {
            "max_length": length,
            "values": paper.row_of({task: row["result"] for task, row in best.items()}),
            "settings": {task: _settings(row) for task, row in best.items()},
        }
        for length, best in found.items()
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
    """BABILong with examples (a) and without (b): a row for each settings and set of questions.

    A row has the lengths at which all its questions were asked. That of the paper's questions is
    there wherever they are.
    """
    asked = [
        row for row in rows if row["task"].startswith("babilong_") and "accuracy" in row["result"]
    ]
    found: dict[str, list[dict[str, Any]]] = {}
    for same in _alike(asked, but=_OF_QUESTION):
        part = "figure_6a" if _examples(same[0]) else "figure_6b"
        for questions, cells in _by_questions(same).items():
            found.setdefault(part, []).append(
                {
                    "questions": list(questions),
                    "papers": questions == PAPERS_QUESTIONS,
                    "settings": _shared(same),
                    "cells": cells,
                }
            )
    return [
        {**paper.figures()[part], "examples": part == "figure_6a", "ours": ours}
        for part, ours in sorted(found.items())
    ]


def _examples(row: Mapping[str, Any]) -> bool:
    """Whether a prompt of BABILong had examples."""
    shots: int | None = row["identity"].get("shots")
    return shots != 0


def _by_questions(rows: Rows) -> dict[tuple[str, ...], dict[str, dict[str, Any]]]:
    """Set of questions -> length -> mean accuracy, of rows that differ in question and length."""
    newest = {row["task"]: row["identity"].get("facts") for row in rows}
    by_cell: dict[str, dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        if row["identity"].get("facts") == newest[row["task"]]:
            question = row["task"].removeprefix("babilong_")
            by_cell.setdefault(row["cell"], {})[question] = row
    found: dict[tuple[str, ...], dict[str, dict[str, Any]]] = {}
    for cell, asked in by_cell.items():
        every = tuple(sorted(asked, key=lambda name: int(name.removeprefix("qa"))))
        papers = (PAPERS_QUESTIONS,) if set(PAPERS_QUESTIONS) <= set(every) else ()
        for questions in {every, *papers}:
            found.setdefault(questions, {})[cell] = _percent([asked[name] for name in questions])
    return dict(sorted(found.items()))


def _alike(rows: Rows, but: Sequence[str] = ()) -> list[list[Mapping[str, Any]]]:
    """Rows of equal identity, some of its names aside."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        same = {name: value for name, value in row["identity"].items() if name not in but}
        groups.setdefault(json.dumps(same, sort_keys=True), []).append(row)
    return list(groups.values())


def _percent(rows: Rows) -> dict[str, Any]:
    """The mean accuracy of rows, and how many samples each is of."""
    accuracies = [row["result"]["accuracy"] for row in rows]
    samples = {row["task"]: row["result"]["samples"] for row in rows}
    return {"accuracy": 100 * sum(accuracies) / len(rows), "samples": samples}


def _shared(rows: Rows) -> dict[str, Any]:
    """The settings that rows have in common."""
    every = [_settings(row) for row in rows]
    return {
        name: value
        for name, value in every[0].items()
        if all(one.get(name) == value for one in every)
    }


def _settings(row: Mapping[str, Any]) -> dict[str, Any]:
    """What a number depends on: all of its identity, samples as they were."""
    both = {**row["identity"], **{name: row["result"].get(name) for name in _OF_RESULT}}
    names = [*_FIRST, *(name for name in both if name not in _FIRST)]
    return {name: both[name] for name in names if both.get(name) not in (None, [])}


def page(found: Mapping[str, Any]) -> str:
    """The report in Markdown."""
    training = found["training"]
    told = {
        "model": found["model"],
        "parameters": f"{found['parameters']:,}",
        "trained steps": _or_unknown(training["step"]),
        "trained tokens": _or_unknown(training["tokens"]),
        "sequence length of the training": _or_unknown(training["sequence_length"]),
        "fingerprint": found["fingerprint"],
    }
    lines = ["# Evaluation", ""]
    lines += _markdown(["", ""], [[name, value] for name, value in told.items()])
    lines += ["", "## Results", ""]
    lines += _markdown(["task", "metrics", "settings", "weights"], map(_result, found["results"]))
    if found["failed"]:
        lines += ["", "## Not done", ""]
        lines += [f"- {what}" for what in found["failed"]]
    for part in (_page_table_1, _page_table_2, _page_figure_6, _page_curves):
        lines += part(found)
    return "\n".join([*lines, ""])


def _result(row: Mapping[str, Any]) -> list[str]:
    settings = _settings(row)
    metrics = [
        f"{name} {_short(value)}"
        for name, value in row["result"].items()
        if name not in settings and not isinstance(value, list | dict | NoneType)
    ]
    name = f"{row['task']} {row['cell']}".strip()
    return [name, ", ".join(metrics), _told(settings), row["dtype"]]


def _told(settings: Mapping[str, Any]) -> str:
    """Settings in words, hashes by their first characters."""
    told = []
    for name, value in settings.items():
        values = [_abridged(one) for one in (value if isinstance(value, list) else [value])]
        told.append(f"{name.replace('_', ' ')} {' '.join(values)}")
    return ", ".join(told)


def _abridged(value: Any) -> str:
    if isinstance(value, str):
        return value[:_HASH_CHARACTERS] if _HASH.fullmatch(value) else value
    return f"{value:,}" if isinstance(value, int) else json.dumps(value)


def _page_table_1(found: Mapping[str, Any]) -> list[str]:
    table = found["table_1"]
    if table is None:
        return []
    rows = []
    for one in table["ours"]:
        of = f" (max length {one['max_length']:,})" if len(table["ours"]) > 1 else ""
        rows.append([f"**this model**{of}", *map(_number, one["values"])])
    rows += [[row["model"], *map(_number, row["values"])] for row in table["paper"]]
    trained = table["paper"][0]["tokens"]
    return [
        "",
        "## Language modelling and commonsense",
        "",
        f"This model has {found['parameters']:,} parameters and was trained on "
        f"{_tokens(found['training']['tokens'])}; the paper's rows are its models of "
        f"{table['size']} on {trained} tokens ({table['source']}). Perplexity of wikitext (per "
        "word) and lambada_openai, else accuracy in percent, length-normalized for hellaswag and "
        "arc_challenge; samples and maximal lengths are above, the paper does not tell its own.",
        "",
        *_markdown(["", *table["columns"]], rows),
        *(line for note in table["notes"] for line in ("", note)),
    ]


def _page_table_2(found: Mapping[str, Any]) -> list[str]:
    table = found["table_2"]
    if table is None:
        return []
    lines = [
        "",
        "## Needle in a haystack",
        "",
        f"Accuracy in percent against the length in tokens; the paper's are of {table['source']}, "
        f"which tells no size (its other tables point to {table['size']} on {table['tokens']}).",
        *(line for note in table["notes"] for line in ("", note)),
    ]
    for task, ours in table["ours"].items():
        rows = {model: values[task] for model, values in table["rows"].items()}
        name = f"{paper.NEEDLES[task]} ({task})"
        lines += ["", *_by_length(name, table["lengths"], rows, ours), *_footnotes(ours)]
    return lines


def _page_figure_6(found: Mapping[str, Any]) -> list[str]:
    lines = []
    for part in found["figure_6"]:
        lines += ["", f"## BABILong, {'with' if part['examples'] else 'without'} examples"]
        papers = [one for one in part["ours"] if one["papers"]]
        others = [one for one in part["ours"] if not one["papers"]]
        if papers:
            lines += [
                "",
                f"Mean accuracy in percent of qa1 to qa5 against the length; the paper's are of "
                f"{part['source']}, of models whose size it does not tell.",
                "",
                *_by_length("", part["lengths"], part["rows"], papers),
                *_footnotes(papers),
            ]
        if others:
            lines += [
                "",
                "Mean accuracy in percent of other sets of questions, of which the paper tells "
                "nothing.",
                "",
                *_by_length("", (), {}, others),
                *_footnotes(others),
            ]
    return lines


def _footnotes(ours: Rows) -> list[str]:
    """What each of our rows depends on, below its table."""
    lines = []
    for number, one in enumerate(ours, start=1):
        asked = f"{', '.join(one['questions'])}; " if "questions" in one else ""
        lines += ["", f"({number}) {asked}{_told(one['settings'])}; samples by length: "]
        told = [f"{at} {_range(cell['samples'])}" for at, cell in one["cells"].items()]
        lines[-1] += ", ".join(told) + "."
    return lines


def _range(samples: Mapping[str, int]) -> str:
    low, high = min(samples.values()), max(samples.values())
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _page_curves(found: Mapping[str, Any]) -> list[str]:
    lines = []
    for one in found["curves"]:
        lines += ["", f"## Loss against position: {one['name']}", ""]
        rows = [
            [f"{part['from']:,} to {part['to'] - 1:,}", f"{part['loss']:.4f}"]
            for part in one["curve"]
        ]
        lines += _markdown(["positions", "loss (nats per token)"], rows)
    return lines


def _by_length(
    name: str,
    lengths: Sequence[str],
    rows: Mapping[str, Sequence[float]],
    ours: Rows,
) -> list[str]:
    """A table of accuracies, a column for each length of the paper's or ours."""
    every = sorted({*lengths, *(at for one in ours for at in one["cells"])}, key=tokens)
    own = [
        [f"**this model** ({number})", *(_cell(one, at) for at in every)]
        for number, one in enumerate(ours, start=1)
    ]
    known = {model: dict(zip(lengths, values, strict=False)) for model, values in rows.items()}
    others = [[model, *(_number(of.get(at)) for at in every)] for model, of in known.items()]
    return _markdown([name, *every], [*own, *others])


def _cell(one: Mapping[str, Any], at: str) -> str:
    return _number(one["cells"].get(at, {}).get("accuracy"))


def _markdown(header: Sequence[str], rows: Any) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)]


def _or_unknown(value: int | None) -> str:
    return "not recorded" if value is None else f"{value:,}"


def _tokens(value: int | None) -> str:
    return "a number of tokens that is not recorded" if value is None else f"{value:,} tokens"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.2f}"


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.4f}" if abs(value) < 1e6 else f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value)
