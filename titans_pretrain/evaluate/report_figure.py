"""The picture of an evaluation beside the paper."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from titans_pretrain.evaluate import paper
from titans_pretrain.evaluate.report_tables import tokens
from titans_pretrain.files import atomic_file

_OURS = {"linewidth": 2, "marker": "o", "markersize": 5}
_PAPERS = {"linewidth": 1, "marker": ".", "alpha": 0.8}
Panel = Callable[[Any], None]


def draw(found: Mapping[str, Any], path: Path) -> None:
    """Draw what ``report_tables.compare`` found: panels for Table 1, each needle and BABILong."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    panels = _panels(found)
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure, grid = plt.subplots(
        rows, columns, figsize=(7.5 * columns, 4.5 * rows), layout="constrained", squeeze=False
    )
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes, panel in zip(grid.flat, panels, strict=False):
        panel(axes)
        axes.grid(color="0.92")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=7, ncols=2)
    with atomic_file(path) as handle:
        figure.savefig(handle, format="png", dpi=120)
    plt.close(figure)


def _panels(found: Mapping[str, Any]) -> list[Panel]:
    panels: list[Panel] = []
    if found["table_1"]:
        panels.append(lambda axes: _accuracies(axes, found["table_1"]))
    for task in found["table_2"]["ours"] if found["table_2"] else ():
        panels.append(_needle(found["table_2"], task))
    for part in found["figure_6"]:
        panels += _babilong(part)
    if found["curves"]:
        panels.append(lambda axes: _curves(axes, found["curves"]))
    return panels or [lambda axes: _others(axes, found["results"])]


def _accuracies(axes: Any, table: Mapping[str, Any]) -> None:
    places = [table["columns"].index(name) for name in paper.ACCURACIES]
    label = "the paper's other models"
    for row in table["paper"]:
        values = [row["values"][place] for place in places]
        if row["model"].startswith("Titans"):
            axes.plot(paper.ACCURACIES, values, ".", label=row["model"])
        else:
            axes.plot(paper.ACCURACIES, values, ".", color="0.75", label=label, zorder=1)
            label = "_"  # told once
    for number, row in enumerate(table["ours"], start=1):
        ours = zip(paper.ACCURACIES, (row["values"][place] for place in places), strict=True)
        known = {name: value for name, value in ours if value is not None}
        label = _label(number, len(table["ours"]))
        axes.plot(list(known), list(known.values()), "D", color=_gray(number), label=label)
    axes.tick_params(axis="x", rotation=30)
    axes.set(ylabel="accuracy (%)")
    axes.set_title(f"{table['source']}, {table['size']}", loc="left", fontsize=9)


def _needle(table: Mapping[str, Any], task: str) -> Panel:
    ours = table["ours"][task]
    rows = {model: values[task] for model, values in table["rows"].items()}
    title = f"{paper.NEEDLES[task]}, {table['source']}"
    return lambda axes: _lengths(axes, title, table["lengths"], rows, ours)


def _babilong(part: Mapping[str, Any]) -> list[Panel]:
    """A panel of the paper's questions beside its models, and one of other sets of questions."""
    papers = [one for one in part["ours"] if one["papers"]]
    others = [one for one in part["ours"] if not one["papers"]]
    title = f"BABILong, {part['source']}"
    panels: list[Panel] = []
    if papers:
        lengths, rows = part["lengths"], part["rows"]
        panels.append(lambda axes: _lengths(axes, title, lengths, rows, papers))
    if others:
        panels.append(lambda axes: _lengths(axes, "BABILong, other questions", (), {}, others))
    return panels


def _label(number: int, count: int) -> str:
    """Our row's name, with its number in the report's table where there are several."""
    return f"this model ({number})" if count > 1 else "this model"


def _gray(number: int) -> str:
    return str(min(0.2 * (number - 1), 0.6))


def _lengths(
    axes: Any,
    title: str,
    lengths: Sequence[str],
    rows: Mapping[str, Sequence[float]],
    ours: Sequence[Mapping[str, Any]],
) -> None:
    """Accuracies against the length, evenly spaced."""
    every = sorted({*lengths, *(at for one in ours for at in one["cells"])}, key=tokens)
    for model, values in rows.items():
        known = dict(zip(lengths, values, strict=False))
        places = [index for index, at in enumerate(every) if at in known]
        axes.plot(places, [known[every[index]] for index in places], label=model, **_PAPERS)
    for number, one in enumerate(ours, start=1):
        cells, label = one["cells"], _label(number, len(ours))
        places = [index for index, at in enumerate(every) if at in cells]
        values = [cells[every[index]]["accuracy"] for index in places]
        axes.plot(places, values, color=_gray(number), label=label, **_OURS)
    axes.set_xticks(range(len(every)), every)
    axes.set(xlabel="length (tokens)", ylabel="accuracy (%)", ylim=(-3, 103))
    axes.set_title(title, loc="left", fontsize=9)


def _curves(axes: Any, curves: Sequence[Mapping[str, Any]]) -> None:
    """Losses against the position, each bucket at its middle on the logarithmic axis.

    The ticks on the right are their perplexities.
    """
    for one in curves:
        places = [math.sqrt(max(part["from"], 1) * part["to"]) for part in one["curve"]]
        losses = [part["loss"] for part in one["curve"]]
        axes.plot(places, losses, marker="o", markersize=3, label=one["name"])
    axes.set_xscale("log", base=2)
    axes.set(xlabel="position (tokens)", ylabel="loss (nats per token)")
    axes.set_title("Loss against position", loc="left", fontsize=9)
    right = axes.secondary_yaxis("right")
    right.set_ylabel("perplexity")
    right.yaxis.set_major_formatter(lambda loss, _: _perplexity(loss))


def _perplexity(loss: float) -> str:
    try:
        return f"{math.exp(loss):.4g}"
    except OverflowError:
        return ""


def _others(axes: Any, results: Sequence[Mapping[str, Any]]) -> None:
    """Results that the paper has none of: the first metric of each."""
    names = [f"{row['task']} {row['cell']}".strip() for row in results]
    firsts = [
        next(item for item in row["result"].items() if isinstance(item[1], int | float))
        for row in results
    ]
    axes.plot(names, [value for _, value in firsts], "kD", label="this model")
    axes.tick_params(axis="x", rotation=30)
    axes.set(ylabel=", ".join(sorted({metric for metric, _ in firsts})))
    axes.set_title("" if results else "No result", loc="left", fontsize=9)
