"""``titans bench data``: tokens a second and core that loaders read from the page cache."""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from titans_pretrain.bench import figures, machine
from titans_pretrain.bench.contenders import Contender, Field, Machine
from titans_pretrain.bench.loaders import OURS, RAW, SEQUENCES, SPAN
from titans_pretrain.bench.progress import Tell
from titans_pretrain.errors import UserError

TOLD = {
    "raw-sequential": "numpy memmap, spans in order",
    "raw-random": "numpy memmap, random spans",
    "webdataset": "webdataset, our tars, members of 2^18 tokens in order",
    "ours-0": "ours, random spans, unchecked",
    "ours-1": "ours, random spans, unchecked, read ahead",
    "ours-checked-0": "ours, random spans, checksums",
    "ours-checked-1": "ours, random spans, checksums, read ahead (default)",
}
BASE, DEFAULT, OTHER = "raw-random", "ours-checked-1", "webdataset"
JUDGED = (DEFAULT, "ours-0")
SHARD_TOKENS = 2**23
VOCABULARY = 32_000
LEAST_TOKENS = SEQUENCES * SPAN
ONE_CORE = Machine("cpu", 1, 1)


@dataclass(frozen=True)
class Options:
    """What is measured.

    Attributes:
        tokens: of the stream, rounded down to whole batches of ours.
        rounds: turns of everyone.
        folder: where files are made for the while; None is the system's.
        check: least million tokens a second and core of ours.
        json: file of the result.
    """

    tokens: int = 48 * 2**20
    rounds: int = 3
    folder: Path | None = None
    check: float | None = None
    json: Path | None = None


def run(options: Options, tell: Tell) -> bool:
    """Measure, print, write; whether every target is met.

    Raises:
        UserError: fewer tokens than a batch, no such folder.
    """
    figures.check_json(options.json)
    with stream(options, tell) as made:
        result = measure(options, Path(made), [], tell)
    show(result)
    figures.write_json(options.json, result)
    return all(verdict.passed for verdict in result["checks"])


def stream(options: Options, tell: Tell) -> "tempfile.TemporaryDirectory[str]":
    """Make the folder of a stream: raw, and in our format.

    Raises:
        UserError: fewer tokens than a batch, no such folder.
    """
    if options.tokens < LEAST_TOKENS:
        what = f"{options.tokens:,} tokens are less than a batch"
        raise UserError(what, where="--tokens", fix=f"give at least {LEAST_TOKENS}")
    if options.folder is not None and not options.folder.is_dir():
        raise UserError(f"{options.folder} is no directory", where="--folder", fix="make it")
    from titans_pretrain.bench import token_shards

    tell.progress("writing the stream")
    made = tempfile.TemporaryDirectory(dir=options.folder, prefix="titans-bench-data-")
    try:
        tokens = options.tokens // LEAST_TOKENS * LEAST_TOKENS
        drawn = np.random.default_rng(0).integers(3, VOCABULARY, tokens, dtype=np.uint16)
        drawn.tofile(Path(made.name) / RAW)
        token_shards.write(Path(made.name) / OURS, drawn, SHARD_TOKENS, VOCABULARY)
    except BaseException:
        made.cleanup()
        raise
    return made


def measure(
    options: Options,
    folder: Path,
    others: Sequence[Contender],
    tell: Tell,
    told: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The result; a rate is by the processor time of all threads of a loader's process.

    Args:
        options: what is measured.
        folder: of the stream.
        others: that take their turns too; pass ``read``, fact ``tokens``.
        tell: takes progress.
        told: how the others are called in the table.
    """
    environment = machine.facts(ONE_CORE)
    file = Path(__file__).with_name("loaders.py")
    ours = [
        Contender(name, file, "build", {"loader": name, "folder": str(folder)}) for name in TOLD
    ]
    everyone = [machine.contender(ONE_CORE, "fp32"), *ours, *others]
    with Field.of(everyone, ONE_CORE, tell) as field:
        built = field.build()
        jobs = [(machine.NAME, "copy")]
        jobs += [(name, "read") for name in built if name != machine.NAME]
        times = field.times(jobs, options.rounds)
    tell.clear()
    copied = [built[machine.NAME]["bytes"] / t["seconds"] for t in times[machine.NAME, "copy"]]
    rates = {
        name: [built[name]["tokens"] / one["processor"] for one in found]
        for (name, _), found in times.items()
        if name != machine.NAME
    }
    names = TOLD | dict(told or {})
    rows = [
        {
            "loader": name,
            "told": names[name],
            "tokens_per_second": figures.spread(found),
            "of_raw": figures.ratio(found, rates[BASE]),
        }
        for name, found in rates.items()
    ]
    return {
        "benchmark": "data",
        "environment": environment,
        "options": {**asdict(options), "json": None, "folder": None, "span": SPAN},
        "ceilings": {"copy_bytes_per_second": figures.spread(copied)},
        "rows": rows,
        "checks": [] if options.check is None else _judged(rates, names, options.check),
    }


def _judged(
    rates: Mapping[str, Sequence[float]], names: Mapping[str, str], least: float
) -> list[figures.Verdict]:
    """The targets: a rate of ours, and at least that of every other loader."""
    verdicts = []
    for name in JUDGED:
        found = figures.spread(rates[name]).median / 1e6
        told = f"{names[name]}: M tokens/s/core at least"
        verdicts.append(figures.Verdict(told, least, found, found >= least))
    for other in rates:
        if other.startswith(("ours", "raw")):
            continue
        found = figures.ratio(rates[DEFAULT], rates[other]).median
        told = f"{names[DEFAULT]}: rate of {names[other]}'s at least"
        verdicts.append(figures.Verdict(told, 1.0, found, found >= 1))
    return verdicts


def show(result: Mapping[str, Any]) -> None:
    """Print a result."""
    copied = result["ceilings"]["copy_bytes_per_second"]
    print(machine.line(result["environment"], f"{result['options']['rounds']} rounds"))
    rate = figures.Spread(*(one / 1e9 for one in (copied.median, copied.least, copied.most)))
    print(f"measured ceiling: copies {rate.text('.1f')} GB/s read and written by one core\n")
    head = ["loader", "M tokens/s/core", "of raw"]
    rows = []
    for row in result["rows"]:
        found = row["tokens_per_second"]
        shown = figures.Spread(*(one / 1e6 for one in (found.median, found.least, found.most)))
        rows.append([row["told"], shown.text(".0f"), row["of_raw"].text()])
    print(figures.table(head, rows))
    print()
    for line in figures.verdict_lines(result["checks"]):
        print(line)
