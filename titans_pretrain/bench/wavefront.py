"""``titans bench wavefront``: step times of ranks along a sequence, beside their formula.

Layers sleep instead of computing, so that few cores can show it. All else is the trainer's own:
boundaries, links, order of passes, ZeRO-3.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from titans_pretrain import files
from titans_pretrain.bench import figures, local_ranks, machine
from titans_pretrain.bench.contenders import Machine
from titans_pretrain.bench.progress import Tell
from titans_pretrain.errors import UserError

RANKS = (1, 2, 4)
MODULE = "titans_pretrain.bench.sleeping"


@dataclass(frozen=True)
class Options:
    """What is measured.

    Attributes:
        layers: of the model.
        forward_ms, backward_ms: that a layer sleeps.
        micro_batches: of a step, beside one.
        steps: of a round, whose median counts; two more before them do not.
        rounds: turns of every row.
        ranks: along the sequence.
        check: most that a step may take, over its formula.
        json, plot: files of the result and of a picture of it.
    """

    layers: int = 12
    forward_ms: float = 20.0
    backward_ms: float = 40.0
    micro_batches: int = 4
    steps: int = 4
    rounds: int = 1
    ranks: Sequence[int] = RANKS
    check: float | None = None
    json: Path | None = None
    plot: Path | None = None


@dataclass(frozen=True)
class Case:
    """A row: ranks along the sequence, micro-batches, and whether these are interleaved."""

    ranks: int
    micro_batches: int
    interleaved: bool

    def ideal(self, layers: int) -> int:
        """Layer times of a step by the wavefront's formula."""
        if self.interleaved:
            return self.micro_batches * layers + self.ranks - 1
        return self.micro_batches * (layers + self.ranks - 1)

    def lock_step(self, layers: int) -> int:
        """Layer times where ranks wait for each other layer by layer."""
        return self.micro_batches * layers * self.ranks


Measure = Callable[[dict[str, Any], int], list[float]]


def run(options: Options, tell: Tell) -> bool:
    """Measure, print, write, draw; whether the target is met.

    Raises:
        UserError: a file that could not be written, a number of ranks given twice.
        TitansError: a rank failed.
    """
    if twice := {one for one in options.ranks if list(options.ranks).count(one) > 1}:
        raise UserError(f"{min(twice)} is given twice", where="--ranks", fix="give it once")
    figures.check_json(options.json)
    check_plot(options.plot)
    environment = machine.facts(Machine("cpu", 1))
    layer, rows = measure(options, tell, lambda given, ranks: local_ranks.run(MODULE, given, ranks))
    tell.clear()
    result: dict[str, Any] = {
        "benchmark": "wavefront",
        "environment": environment,
        "options": asdict(options) | {"json": None, "plot": None},
        "layer_seconds": layer,
        "rows": rows,
        "checks": _judged(rows, options.check),
    }
    _show(result)
    figures.write_json(options.json, result)
    if options.plot:
        draw(rows, options.plot)
    return all(verdict.passed for verdict in result["checks"])


def check_plot(path: Path | None) -> None:
    """Refuse a picture that could not be written.

    Raises:
        UserError: its directory is missing, or its name ends otherwise than in .png.
    """
    if path is not None and (path.suffix != ".png" or not path.absolute().parent.is_dir()):
        raise UserError(
            f"{path} is no FILE.png in a directory that is there", where="--plot", fix="mend it"
        )


def measure(
    options: Options, tell: Tell, measured: Measure
) -> tuple[figures.Spread, list[dict[str, Any]]]:
    """The time of a layer on one rank, and the rows; t of the formula is that of the same round.

    Args:
        options: what is measured.
        tell: takes progress.
        measured: the step times that ranks found, of the options of ``sleeping.step_seconds``.
    """
    kinds = [(1, False), (options.micro_batches, False), (options.micro_batches, True)]
    cases = [Case(ranks, *kind) for ranks in options.ranks for kind in dict.fromkeys(kinds)]
    alone: list[float] = []
    taken: dict[Case, list[float]] = {case: [] for case in cases}
    for number in range(1, options.rounds + 1):
        tell.progress(f"round {number} of {options.rounds}: one rank, for the time of a layer")
        single = max(measured(_given(options, Case(1, 1, False)), 1))
        alone.append(single / options.layers)
        for case in cases:
            tell.progress(
                f"round {number} of {options.rounds}: ranks {case.ranks}, "
                f"micro-batches {case.micro_batches}" + ", interleaved" * case.interleaved
            )
            taken[case].append(max(measured(_given(options, case), case.ranks)))
    return figures.spread(alone), [_row(case, taken[case], alone, options) for case in cases]


def _given(options: Options, case: Case) -> dict[str, Any]:
    """What a rank is told."""
    return {
        "layers": options.layers,
        "seconds": (options.forward_ms / 1000, options.backward_ms / 1000),
        "micro_batches": case.micro_batches,
        "interleaved": case.interleaved,
        "steps": options.steps,
    }


def _row(
    case: Case, seconds: Sequence[float], alone: Sequence[float], options: Options
) -> dict[str, Any]:
    ideals = [case.ideal(options.layers) * t for t in alone]
    return {
        "sequence_ranks": case.ranks,
        "micro_batches": case.micro_batches,
        "interleaved": case.interleaved,
        "seconds": figures.spread(seconds),
        "ideal_seconds": statistics.median(ideals),
        "ratio": figures.ratio(seconds, ideals),
        "lock_step_seconds": case.lock_step(options.layers) * statistics.median(alone),
    }


def _judged(rows: Sequence[Mapping[str, Any]], most: float | None) -> list[figures.Verdict]:
    if most is None:
        return []
    found = max(row["ratio"].median for row in rows)
    return [figures.Verdict("a step's time over its formula at most", most, found, found <= most)]


def _show(result: Mapping[str, Any]) -> None:
    layer = result["layer_seconds"]
    print(machine.line(result["environment"], f"{result['options']['rounds']} rounds"))
    print(f"t = {1000 * layer.median:.1f} ms a layer, measured on one rank\n")
    head = ["ranks", "micro-batches", "interleaved", "ms a step", "formula", "ratio", "lock-step"]
    rows = [
        [
            str(row["sequence_ranks"]),
            str(row["micro_batches"]),
            "yes" if row["interleaved"] else "no",
            f"{1000 * row['seconds'].median:.0f}",
            f"{1000 * row['ideal_seconds']:.0f}",
            row["ratio"].text(),
            f"{1000 * row['lock_step_seconds']:.0f}",
        ]
        for row in result["rows"]
    ]
    print(figures.table(head, rows))
    print()
    for line in figures.verdict_lines(result["checks"]):
        print(line)


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Bars of measured times, formula and lock-step."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [
        f"{row['sequence_ranks']} ranks, {row['micro_batches']} micro-batch"
        + "es" * (row["micro_batches"] > 1)
        + ", interleaved" * row["interleaved"]
        for row in rows
    ]
    places = range(len(rows))
    bars = {
        "measured": [1000 * row["seconds"].median for row in rows],
        "wavefront's formula": [1000 * row["ideal_seconds"] for row in rows],
        "lock-step": [1000 * row["lock_step_seconds"] for row in rows],
    }
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for offset, (label, values) in zip((-0.27, 0, 0.27), bars.items(), strict=True):
        axes.barh([place + offset for place in places], values, 0.25, label=label)
    axes.set_yticks(places, names)
    axes.invert_yaxis()
    axes.set_xlabel("ms a step, layers that sleep")
    axes.legend()
    with files.atomic_file(path) as handle:
        figure.savefig(handle, format="png", dpi=120)
    plt.close(figure)
