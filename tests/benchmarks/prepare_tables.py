"""What prepare_data.py found, as rows, verdicts and the Markdown of docs/performance.md."""

import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from prepare_runs import ALONE, DATATROVE, ENCODERS, Contender, Trial

from titans_pretrain.errors import TitansError

# At least so many times the rate, per core and second of processor time.
TARGETS = (
    ("sentencepiece", DATATROVE, 2.0),
    ("fast", DATATROVE, 8.0),
    ("sentencepiece", ALONE["sentencepiece"], 0.90),
    ("fast", ALONE["fast"], 0.45),
)
# A worker's peak at the large input may be at most so many times that at the small one.
MEMORY_TARGET = 1.10
Found = dict[str, Any]


@dataclass
class Row:
    """A contender's trials, and how many documents have sentencepiece's ids."""

    contender: Contender
    trials: list[Trial] = field(default_factory=list)
    identical: int = 0

    def rates(self, tokens: int) -> list[float]:
        """Tokens per core and second of processor time, a trial each.

        Raises:
            TitansError: a trial took no longer than one on a single document.
        """
        work = self._work("cpu")
        if min(work) <= 0:
            raise TitansError(
                f"{self.contender.name} takes no longer than on one document",
                where=f"processor seconds beyond start-up: {work}",
                fix="give more text: --characters",
            )
        return [tokens / seconds for seconds in work]

    def found(self, tokens: int) -> Found:
        """Medians of the trials."""
        # On a busy machine the clock may say that the work took less than no time.
        seconds = statistics.median(self._work("wall")) * self.contender.cores
        names = ("cpu", "wall", "start_cpu", "start_wall", "main_peak", "child_peak")
        rates = self.rates(tokens)
        return {name: statistics.median(self._all(name)) for name in names} | {
            "name": self.contender.name,
            "cores": self.contender.cores,
            "alone": self.contender.timed,
            "rate": statistics.median(rates),
            "rates": rates,
            "wall_rate": tokens / seconds if seconds > 0 else None,
            "identical": self.identical,
        }

    def _all(self, name: str) -> list[float]:
        return [getattr(trial, name) for trial in self.trials]

    def _work(self, clock: str) -> list[float]:
        """Seconds of each trial without what comes before the work."""
        starts = self._all(f"start_{clock}")
        if not self.contender.timed:
            starts = [statistics.median(starts)] * len(starts)
        return [whole - start for whole, start in zip(self._all(clock), starts, strict=True)]


def verdicts(rows: list[Row], tokens: int) -> list[Found]:
    """The targets, each for ours with one worker and with two."""
    by_name = {row.contender.name: row for row in rows}
    found = []
    for encoder, peer, target in TARGETS:
        theirs = by_name[peer].rates(tokens)
        for row in rows:
            if row.contender.encoder == encoder:
                # Within a round the machine is nearly the same, whatever else it does.
                ratios = [a / b for a, b in zip(row.rates(tokens), theirs, strict=True)]
                median = statistics.median(ratios)
                found.append(
                    {"ours": row.contender.name, "peer": peer, "target": target}
                    | {"ratio": median, "least": min(ratios), "most": max(ratios)}
                    | {"pass": median >= target}
                )
    return found


def memory_verdicts(rows: list[Found]) -> list[Found]:
    """A worker's peak at the larger input against that at the smaller one."""
    found = []
    for encoder in ENCODERS:
        small, large = (row["worker"] for row in rows if row["encoder"] == encoder)
        ratio = large / small
        found.append({"encoder": encoder, "ratio": ratio, "pass": ratio <= MEMORY_TARGET})
    return found


def markdown(result: Found) -> str:
    """All tables."""
    return "\n\n".join(["\n".join(block) for block in _blocks(result)])


def _blocks(result: Found) -> Iterator[list[str]]:
    text, machine = result["text"], result["machine"]
    sources = ", ".join(
        f"{name} {characters / 1e6:.1f}" for name, characters in text["sources"].items()
    )
    yield [
        f"{machine['processor']}, {machine['cores']} cores, load {machine['load']:.1f} before; "
        f"{result['versions']}; medians of {result['rounds']} rounds; "
        f"{text['characters']:,} characters in {text['documents']:,} documents, "
        f"{result['tokens']:,} tokens (millions of characters: {sources})"
    ]
    yield [
        "| | cores | Mtok/s/core, CPU time | Mtok/s/core, clock x cores | start-up, CPU s "
        "| peak MB, main / largest other process | documents with sentencepiece's ids |",
        "|---|---|---|---|---|---|---|",
        *(_rate_line(row, text["documents"]) for row in result["rows"]),
        *(f"| {name} | not run: {why} | | | | | |" for name, why in result["not_run"]),
    ]
    yield [f"`titans data plan` before it, once for all tasks: {result['plan_cpu']:.1f} s CPU."]
    yield [
        "| | of | at least | is (least to most) | |",
        "|---|---|---|---|---|",
        *(
            f"| {found['ours']} | {found['peer']} | {found['target']:.2f} "
            f"| {found['ratio']:.2f} ({found['least']:.2f} to {found['most']:.2f}) "
            f"| {_verdict(found)} |"
            for found in result["verdicts"]
        ),
    ]
    if result["memory"]:
        yield [
            "| titans data prepare, 2 workers | text, MB | peak MB, main | peak MB, a worker |",
            "|---|---|---|---|",
            *(
                f"| {row['encoder']} | {row['bytes'] / 1e6:,.0f} | {row['main'] / 1e6:.0f} "
                f"| {row['worker'] / 1e6:.0f} |"
                for row in result["memory"]
            ),
        ]
        yield [
            f"{found['encoder']}: a worker needs {found['ratio']:.2f} times the memory (at most "
            f"{MEMORY_TARGET:.2f}) {_verdict(found)}"
            for found in result["memory_verdicts"]
        ]


def _rate_line(row: Found, documents: int) -> str:
    main, child = (
        f"{row[peak] / 1e6:.0f}" if row[peak] and not row["alone"] else "-"
        for peak in ("main_peak", "child_peak")
    )
    wall = f"{row['wall_rate'] / 1e6:.2f}" if row["wall_rate"] else "-"
    same = "all" if row["identical"] == documents else f"{row['identical']:,} of {documents:,}"
    return (
        f"| {row['name']} | {row['cores']} | {row['rate'] / 1e6:.2f} "
        f"| {wall} | {row['start_cpu']:.1f} "
        f"| {main} / {child} | {same} |"
    )


def _verdict(found: Found) -> str:
    return "PASS" if found["pass"] else "FAIL"
