"""What an evaluation found, beside the paper: report.json, report.md and report.png. No torch."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any

from titans_pretrain.evaluate import loaded, paper
from titans_pretrain.files import atomic_file, write_json

FORMAT = "titans-eval/1"
_SUFFIXES = {"": 1, "k": 10**3, "m": 10**6}
_SETTINGS = ("samples", "shots", "max_length", "truncated")
Rows = Sequence[Mapping[str, Any]]


def write(model: Path, out: Path, rows: Rows, *, paper_size: str | None = None) -> dict[str, Any]:
    """Write the three files into ``out``.

    Args:
        model: directory of the model.
        out: directory of the results.
        rows: its cells, as ``suite`` keeps them.
        paper_size: of the paper's models beside it; None takes the nearest.

    Returns:
        What ``report.json`` holds.
    """
    from titans_pretrain.evaluate import report_figure

    found = compare(model, rows, paper_size=paper_size)
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
    ours = {row["task"]: row for row in rows if row["task"] in paper.columns()}
    if not ours:
        return None
    return {
        "source": paper.figures()["table_1"]["source"],
        "size": size,
        "columns": paper.columns(),
        "ours": paper.row_of({task: row["result"] for task, row in ours.items()}),
        "settings": {task: _settings(row) for task, row in ours.items()},
        "paper": paper.table_1(size),
    }


def _table_2(rows: Rows) -> dict[str, Any] | None:
    ours: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row["task"] in paper.NEEDLES and "accuracy" in row["result"]:
            part = ours.setdefault(row["task"], {})
            part[row["cell"]] = {"accuracy": 100 * row["result"]["accuracy"], **_settings(row)}
    return {**paper.figures()["table_2"], "ours": ours} if ours else None


def _figure_6(rows: Rows) -> list[dict[str, Any]]:
    """Mean accuracy of the BABILong questions at each length: with examples (a) and without (b)."""
    found: dict[str, dict[str, list[Mapping[str, Any]]]] = {}
    for row in rows:
        if row["task"].startswith("babilong_") and "accuracy" in row["result"]:
            part = "figure_6b" if row["identity"].get("shots") == 0 else "figure_6a"
            found.setdefault(part, {}).setdefault(row["cell"], []).append(row)
    return [
        {**paper.figures()[part], "ours": {cell: _mean(several) for cell, several in ours.items()}}
        for part, ours in sorted(found.items())
    ]


def _mean(rows: Rows) -> dict[str, Any]:
    return {
        "accuracy": 100 * sum(row["result"]["accuracy"] for row in rows) / len(rows),
        "questions": [row["task"].removeprefix("babilong_") for row in rows],
        "settings": {row["task"]: _settings(row) for row in rows},
    }


def _settings(row: Mapping[str, Any]) -> dict[str, Any]:
    """What a number depends on."""
    both = {**row["identity"], **row["result"]}
    return {name: both[name] for name in _SETTINGS if both.get(name) is not None}


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
    told = [f"{name.replace('_', ' ')} {value:,}" for name, value in settings.items()]
    name = f"{row['task']} {row['cell']}".strip()
    return [name, ", ".join(metrics), ", ".join(told), row["dtype"]]


def _page_table_1(found: Mapping[str, Any]) -> list[str]:
    table = found["table_1"]
    if table is None:
        return []
    rows = [["**this model**", *map(_number, table["ours"])]]
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
    ]
    for task, ours in table["ours"].items():
        rows = {model: values[task] for model, values in table["rows"].items()}
        name = f"{paper.NEEDLES[task]} ({task})"
        lines += ["", *_by_length(name, table["lengths"], rows, ours)]
    return lines


def _page_figure_6(found: Mapping[str, Any]) -> list[str]:
    lines = []
    for part in found["figure_6"]:
        asked = sorted({name for one in part["ours"].values() for name in one["questions"]})
        lines += [
            "",
            "## BABILong",
            "",
            f"Mean accuracy in percent of the questions that were asked ({', '.join(asked)}) "
            f"against the length; the paper's are of {part['source']}, of models whose size it "
            "does not tell.",
            "",
            *_by_length("", part["lengths"], part["rows"], part["ours"]),
        ]
    return lines


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
    ours: Mapping[str, Mapping[str, float]],
) -> list[str]:
    """A table of accuracies, a column for each length of the paper's or ours."""
    every = sorted({*lengths, *ours}, key=tokens)
    own = ["**this model**", *(_number(ours.get(at, {}).get("accuracy")) for at in every)]
    known = {model: dict(zip(lengths, values, strict=False)) for model, values in rows.items()}
    others = [[model, *(_number(of.get(at)) for at in every)] for model, of in known.items()]
    return _markdown([name, *every], [own, *others])


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
