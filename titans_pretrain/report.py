"""``titans report``: loss curves and tables from runs' ``metrics.jsonl`` and evaluations."""

import json
import math
import reprlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from data_prep.output import writing
from titans_pretrain.checkpoint import evaluations
from titans_pretrain.checkpoint.evaluations import Evaluation
from titans_pretrain.errors import UserError

METRICS = "metrics.jsonl"
SMOOTHED_ABOVE = 200
SMOOTHED_POINTS = 2000
NUMBERS = ("step", "loss", "validation_loss", "tokens", "tokens_per_second")
HELD_OUT = "heldout/loss"
EVALUATIONS_SHOWN = 8
ALIKE = ""
OTHERWISE = "*"  # marks evaluations that are not to be compared with the newest
IN_PART = "!"  # marks evaluations that failed
_DRAWN: dict[str, tuple[str, dict[str, Any]]] = {
    ALIKE: ("", {"marker": "s"}),
    OTHERWISE: (" of other settings", {"marker": "s", "markerfacecolor": "none"}),
    IN_PART: (" in part", {"marker": "x"}),
}
_OF_HELD_OUT = {"data", "fingerprint", "sequences", "dtype", "code"}
COLUMNS = ("run", "steps", "tokens", "first", "last", "validation", "unigram", "tokens/s")


@dataclass(frozen=True)
class Run:
    """A run's curves.

    Attributes:
        name: as shown.
        train: (step, loss) of every logged step.
        validation: (step, loss) of every validation.
        tokens: consumed so far.
        speed: median tokens per second, NaN where none is logged.
        unigram_entropy: of the corpus, nats per token, or None where it is not known.
        evaluations: of its checkpoints, by step.
    """

    name: str
    train: list[tuple[int, float]]
    validation: list[tuple[int, float]]
    tokens: int
    speed: float
    unigram_entropy: float | None
    evaluations: list[Evaluation]

    def held_out(self) -> dict[str, list[tuple[int, float]]]:
        """(step, loss) of checkpoints that were scored on held-out data.

        Returns:
            By name: ``ALIKE``, those that were scored as the newest was, on its data, in its dtype
            and by its code; ``OTHERWISE``, the others; and ``IN_PART``, of evaluations that failed
            in another part.
        """
        found: dict[str, list[tuple[int, float]]] = {ALIKE: [], OTHERWISE: [], IN_PART: []}
        done = [one for one in self.evaluations if HELD_OUT in one.metrics]
        for one in done:
            alike = _OF_HELD_OUT.isdisjoint(evaluations.differing(one, _newest(done)))
            name = IN_PART if one.failure else ALIKE if alike else OTHERWISE
            found[name].append((one.step, one.metrics[HELD_OUT]))
        return found

    def evaluation_table(self) -> list[list[str]]:
        """A row for each metric, a column for each of the newest evaluations; empty for none."""
        shown = self._shown()
        names = list(dict.fromkeys(name for one in shown for name in one.metrics))
        if not names:
            return []
        cells = [
            [name, *(f"{one.metrics[name]:.4f}" if name in one.metrics else "-" for one in shown)]
            for name in names
        ]
        newest = _newest(shown)
        return [[f"{self.name}: step", *(_head(one, newest) for one in shown)], *cells]

    def evaluation_notes(self) -> list[str]:
        """A sentence of each marked evaluation, and of each of the newest that found nothing."""
        shown = self._shown()
        notes = [
            f"{OTHERWISE} step {one.step:,} was evaluated with other {', '.join(names)}"
            for one in shown
            if (names := evaluations.differing(one, _newest(shown)))
        ]
        failures = [one for one in self.evaluations if one.failure]
        for one in failures[-EVALUATIONS_SHOWN:]:
            found = "was evaluated in part" if one.metrics else "was not evaluated"
            notes.append(f"{IN_PART} step {one.step:,} {found}: {' '.join(one.failure.split())}")
        if earlier := failures[:-EVALUATIONS_SHOWN]:
            notes.append(f"{IN_PART} {len(earlier):,} earlier evaluations failed, too")
        return notes

    def _shown(self) -> list[Evaluation]:
        return [one for one in self.evaluations if one.metrics][-EVALUATIONS_SHOWN:]

    def row(self) -> list[str]:
        """The table's cells."""
        held_out = f"{self.validation[-1][1]:.4f}" if self.validation else "-"
        unigram = f"{self.unigram_entropy:.4f}" if self.unigram_entropy is not None else "-"
        return [
            self.name,
            f"{self.train[-1][0]:,}",
            f"{self.tokens:,}",
            f"{self.train[0][1]:.4f}",
            f"{self.train[-1][1]:.4f}",
            held_out,
            unigram,
            "-" if math.isnan(self.speed) else f"{self.speed:,.0f}",
        ]


def report(directories: Sequence[Path], output: Path | None = None) -> Path:
    """Print the table of runs and draw their loss curves.

    Args:
        directories: of runs.
        output: the PNG; ``loss.png`` in the first run's directory when not given.

    Returns:
        The picture's path.

    Raises:
        UserError: a directory without metrics, a line that is no JSON object of numbers, or no step
            logged yet.
    """
    runs = [read_run(directory) for directory in directories]
    output = output or directories[0] / "loss.png"
    _draw(runs, output)
    print(_table([list(COLUMNS), *(run.row() for run in runs)]))
    for run in runs:
        table, notes = run.evaluation_table(), run.evaluation_notes()
        if table or notes:
            head = _table(table) if table else f"{run.name}: no evaluation"
            print("\n".join(["", head, *notes]))
    print(f"loss curve: {output}")
    return output


def read_run(directory: Path) -> Run:
    """Read a run's metrics; a torn last line is left out, and said so on stderr.

    Raises:
        UserError: as for ``report``.
    """
    rows = _rows(directory / METRICS)
    train = [row for row in rows if "loss" in row]
    if not train:
        raise UserError(
            "no step is logged yet", where=str(directory / METRICS), fix="wait for the first step"
        )
    speeds = sorted(row["tokens_per_second"] for row in train if row.get("tokens_per_second"))
    return Run(
        name=_name(directory),
        train=[(row["step"], row["loss"]) for row in train],
        validation=[(r["step"], r["validation_loss"]) for r in rows if "validation_loss" in r],
        tokens=train[-1].get("tokens", 0),
        speed=speeds[len(speeds) // 2] if speeds else math.nan,
        unigram_entropy=_unigram_entropy(directory),
        evaluations=evaluations.read(directory),
    )


def _newest(among: Sequence[Evaluation]) -> Evaluation:
    """What the others are compared with: the newest that did not fail, where there is one."""
    return ([one for one in among if not one.failure] or among)[-1]


def _head(one: Evaluation, newest: Evaluation) -> str:
    """An evaluation's step with its marks."""
    otherwise = OTHERWISE if evaluations.differing(one, newest) else ""
    return f"{one.step:,}{otherwise}{IN_PART if one.failure else ''}"


def _rows(path: Path) -> list[dict[str, Any]]:
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(
            f"cannot read {METRICS}: {error.strerror}",
            where=str(path),
            fix="give the directory of a run",
        ) from None
    if lines[-1]:
        print(f"{path}:{len(lines)}: the last line is torn and left out", file=sys.stderr)
    rows = []
    for number, line in enumerate(lines[:-1], start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict) or "step" not in row:
            raise UserError(
                "the line is no JSON object with a step",
                where=f"{path}:{number}",
                fix="remove the line",
            )
        for name in NUMBERS:
            if name in row and not _number(row[name]):
                raise UserError(
                    f"{name} is {reprlib.repr(row[name])}, no number",
                    where=f"{path}:{number}",
                    fix="remove the line",
                )
        rows.append(row)
    return rows


def _number(value: Any) -> bool:
    whole = isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63
    return whole or isinstance(value, float)


def _name(directory: Path) -> str:
    """The run's own name, its directory's where it has none."""
    try:
        config = yaml.safe_load((directory / "config.yaml").read_text())
        return str(config["run"]["name"] or directory.resolve().name)
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return directory.resolve().name


def _unigram_entropy(directory: Path) -> float | None:
    """What the run's data manifest tells, None (and a line on stderr) where it is not at hand."""
    path = directory / "config.yaml"
    try:
        config = yaml.safe_load(path.read_text())
        path = Path(config["data"]["manifest"])
        return float(json.loads(path.read_text())["unigram_entropy"])
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        reason = getattr(error, "strerror", None) or "names no unigram entropy"
        print(
            f"{path.absolute()}: {reason}; {directory} is shown without unigram entropy",
            file=sys.stderr,
        )
        return None


def _table(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if index == 0 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


def _draw(runs: list[Run], output: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 5.5), dpi=150, layout="constrained")
    colors = mpl.color_sequences["tab10"]
    entropies: dict[float, str] = {}
    for index, run in enumerate(runs):
        color = colors[index % len(colors)]
        _draw_run(axes, run, color)
        if run.unigram_entropy is not None:
            entropies.setdefault(run.unigram_entropy, color if len(runs) > 1 else "0.35")
    for entropy, color in entropies.items():
        axes.axhline(entropy, color=color, linestyle="--", linewidth=1, zorder=1)
        axes.annotate(
            f"unigram entropy {entropy:.2f}",
            xy=(0.995, entropy),
            xycoords=("axes fraction", "data"),
            xytext=(0, 3),
            textcoords="offset points",
            ha="right",
            fontsize=8,
            color=color,
        )
    axes.set(xlabel="optimizer step", ylabel="loss (nats per token)")
    axes.set_title(runs[0].name if len(runs) == 1 else f"{len(runs)} runs", loc="left")
    axes.grid(color="0.92")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    with writing(output) as handle:
        figure.savefig(handle, format="png")
    plt.close(figure)


def _draw_run(axes: Any, run: Run, color: Any) -> None:
    steps, losses = zip(*run.train, strict=True)
    if len(losses) > SMOOTHED_ABOVE:
        axes.plot(steps, losses, color=color, alpha=0.25, linewidth=0.8)
        middles, means = _smooth(losses)
        axes.plot(
            [steps[i] for i in middles],
            means,
            color=color,
            linewidth=1.6,
            label=f"{run.name} train",
        )
    else:
        axes.plot(steps, losses, color=color, linewidth=1.4, label=f"{run.name} train")
    if run.validation:
        where, held_out = zip(*run.validation, strict=True)
        style = {"marker": "o", "markersize": 5, "markerfacecolor": "white", "markeredgewidth": 1.4}
        label = f"{run.name} validation ({held_out[-1]:.3f})"
        axes.plot(where, held_out, color=color, linestyle=":", label=label, zorder=3, **style)
    for name, points in run.held_out().items():
        if points:
            where, held_out = zip(*points, strict=True)
            how, style = _DRAWN[name]
            label = f"{run.name} evaluation{how} ({held_out[-1]:.3f})"
            style = {"markersize": 5, "linestyle": "none"} | style
            axes.plot(where, held_out, color=color, label=label, zorder=4, **style)


def _smooth(losses: Sequence[float]) -> tuple[Sequence[int], list[float]]:
    """Means over windows of a fiftieth of the run, centred so that they do not lag, and where.

    At most about ``SMOOTHED_POINTS`` of them, more than a picture shows, so that the cost does not
    grow with the square of the run. A mean is of the window's finite losses, NaN if there is none.
    """
    half = len(losses) // 100
    middles = range(0, len(losses), -(-len(losses) // SMOOTHED_POINTS))
    windows = (losses[max(0, middle - half) : middle + half + 1] for middle in middles)
    return middles, [_mean([loss for loss in window if math.isfinite(loss)]) for window in windows]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
