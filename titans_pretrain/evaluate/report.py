"""What an evaluation found, beside the paper: report.json, report.md and report.png. No torch."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any

from titans_pretrain.evaluate import paper
from titans_pretrain.evaluate.report_tables import Rows, compare, settings, tokens
from titans_pretrain.files import atomic_file, write_json

_HASH = re.compile(r"[0-9a-f]{32,}")
_HASH_CHARACTERS = 8


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
    if found["results"]:
        lines += ["", "## Results", ""]
        head = ["task", "metrics", "settings", "weights"]
        lines += _markdown(head, map(_result, found["results"]))
    if found["failed"]:
        lines += ["", "## Not done", ""]
        lines += [f"- {what}" for what in found["failed"]]
    for part in (_page_table_1, _page_table_2, _page_figure_6, _page_curves):
        lines += part(found)
    return "\n".join([*lines, ""])


def _result(row: Mapping[str, Any]) -> list[str]:
    told = settings(row)
    metrics = [
        f"{name} {_short(value)}"
        for name, value in row["result"].items()
        if name not in told and not isinstance(value, list | dict | NoneType)
    ]
    name = f"{row['task']} {row['cell']}".strip()
    return [name, ", ".join(metrics), _told(told), row["dtype"]]


def _told(depends: Mapping[str, Any]) -> str:
    """Settings in words, hashes by their first characters."""
    told = []
    for name, value in depends.items():
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
    names = _names(table["ours"], ("max_length", "code"))
    rows = [
        [name, *map(_number, one["values"])] for name, one in zip(names, table["ours"], strict=True)
    ]
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


def _names(ours: Rows, depends: Sequence[str]) -> list[str]:
    """Our rows' names, with what tells one from another."""
    apart = [name for name in depends if len({one[name] for one in ours}) > 1]
    told = [_told({name: one[name] or "unknown" for name in apart}) for one in ours]
    return [f"**this model** ({of})" if of else "**this model**" for of in told]


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
        lines += [
            "",
            f"## Loss against position: {one['name']}",
            "",
            f"{_told(one['settings'])}.",
            "",
        ]
        rows = [
            [
                f"{part['from']:,} to {part['to'] - 1:,}",
                f"{part['loss']:.4f}",
                _short(part["perplexity"]),
            ]
            for part in one["curve"]
        ]
        lines += _markdown(["positions", "loss (nats per token)", "perplexity"], rows)
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
    if value is None:
        return "-"
    return value if isinstance(value, str) else json.dumps(value)
