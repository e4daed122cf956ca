"""``titans bench memory``: a memory layer beside attention and titans-pytorch's. No torch here."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from titans_pretrain.bench import contenders, figures, machine, memory_targets
from titans_pretrain.bench.contenders import Contender, ContenderFailed, Field, Machine
from titans_pretrain.bench.memory_targets import ATTENTION, OURS, THEIRS
from titans_pretrain.bench.progress import Tell
from titans_pretrain.errors import UserError
from titans_pretrain.model import fields

PIP = "pip install titans-pytorch==0.5.5"
HERE = Path(__file__).parent
MISSING = ("ModuleNotFoundError", "ImportError", "FileNotFoundError", "PermissionError")


@dataclass(frozen=True)
class Options:
    """What is measured.

    Attributes:
        dim, heads, depth, expansion, chunk: of the memory; a head is dim / heads wide.
        gate_per: gates a token or a chunk.
        memory_kernels: that scan it, as ``train.memory_kernels``.
        batch: sequences.
        lengths: tokens of a sequence.
        peers: ``attention`` and ``titans-pytorch``, or one of them, or none.
        peer_limit: the longest that peers are measured at.
        rounds: turns of everyone.
        device, dtype, threads: None takes what is there.
        peer_python: an interpreter that has titans-pytorch; None takes this one.
        check: targets, see ``memory_targets``.
        json: file of the result.
    """

    lengths: Sequence[int]
    dim: int = 256
    heads: int = 4
    depth: int = 2
    expansion: int = 4
    chunk: int = 64
    gate_per: str = "token"
    memory_kernels: str = "torch"
    batch: int = 2
    peers: Sequence[str] = (ATTENTION, THEIRS)
    peer_limit: int = 8192
    rounds: int = 5
    device: str | None = None
    dtype: str | None = None
    threads: int | None = None
    peer_python: Path | None = None
    check: Sequence[str] = ()
    json: Path | None = None


def run(options: Options, tell: Tell) -> bool:
    """Measure, print, write; whether every target is met.

    Raises:
        UserError: sizes that no memory has, targets that do not fit, a peer that is asked for and
            not there, no such device.
        ContenderFailed: ours failed.
    """
    model = _model(options)
    targets = memory_targets.parse(
        options.check, options.lengths, options.peer_limit, options.peers
    )
    figures.check_json(options.json)
    place, dtype = machine.choose(options.device, options.dtype, options.threads)
    machine.check_kernels([options.memory_kernels], place)
    environment = machine.facts(place) | {"dtype": dtype}
    common = {"model": model, "batch": options.batch, "device": place.device, "dtype": dtype}
    absent = {ATTENTION, THEIRS} - set(options.peers)
    everyone = [one for one in _contenders(options, place, dtype) if one.name not in absent]
    everyone, versions = _present(everyone, options, targets, place, common, tell)
    environment |= versions
    rows, rates = _measure(everyone, options, place, common, tell)
    tell.clear()
    result: dict[str, Any] = {
        "benchmark": "memory",
        "environment": environment,
        "options": asdict(options) | {"json": None, "peer_python": str(options.peer_python or "")},
        "ceilings": machine.ceilings(rates),
        "rows": rows,
        "checks": memory_targets.judge(targets, rows),
    }
    _show(result, rates)
    figures.write_json(options.json, result)
    return all(verdict.passed for verdict in result["checks"])


def _model(options: Options) -> dict[str, Any]:
    """Fields of a model of one such layer."""
    given = {
        "variant": "lmm",
        "vocab_size": 2,
        "hidden_size": options.dim,
        "num_hidden_layers": 1,
        "num_attention_heads": options.heads,
        "intermediate_size": 1,
        "memory_heads": options.heads,
        "memory_depth": options.depth,
        "memory_expansion": options.expansion,
        "chunk_size": options.chunk,
        "gate_per": options.gate_per,
        "num_persistent_tokens": 0,
    }
    typed = {
        "hidden_size": "--dim",
        "memory_heads": "--heads",
        "memory_depth": "--depth",
        "memory_expansion": "--expansion",
        "chunk_size": "--chunk",
    }
    for problem in fields.problems(given):
        where = typed.get(problem.field, problem.field)
        raise UserError(f"{where}: {problem.message}", where=where, fix=problem.fix)
    if twice := {one for one in options.lengths if list(options.lengths).count(one) > 1}:
        raise UserError(f"{min(twice)} is given twice", where="--lengths", fix="give it once")
    return fields.defaults() | given


def _contenders(options: Options, place: Machine, dtype: str) -> list[Contender]:
    layers = HERE / "layers.py"
    theirs = Contender(
        THEIRS,
        HERE / "peer_layers.py",
        "titans_pytorch",
        python=options.peer_python or Path(sys.executable),
        required=False,
    )
    return [
        machine.contender(place, dtype),
        Contender(OURS, layers, "memory", {"memory_kernels": options.memory_kernels}),
        Contender(ATTENTION, layers, "attention", required=False),
        theirs,
    ]


def _present(
    everyone: Sequence[Contender],
    options: Options,
    targets: Sequence[memory_targets.Target],
    place: Machine,
    common: Mapping[str, Any],
    tell: Tell,
) -> tuple[list[Contender], dict[str, str]]:
    """The contenders that are there, and the peer's versions.

    Raises:
        UserError: titans-pytorch is asked for, by an interpreter or a target, and is not there.
    """
    theirs = next((one for one in everyone if one.name == THEIRS), None)
    if theirs is None:
        return list(everyone), {}
    tell.progress(f"looking for titans-pytorch in {theirs.python}")
    try:
        with contenders.Worker(theirs, place) as worker:
            found = worker.build(**common, length=options.chunk)
        return list(everyone), {"titans_pytorch": found["version"], "peer_torch": found["torch"]}
    except ContenderFailed as error:
        fix = f"{theirs.python} -m {PIP}, or name an interpreter that has it with --peer-python"
        if options.peer_python is not None or any(target.needs_theirs for target in targets):
            raise UserError(
                f"titans-pytorch cannot be measured: {error.what}", where="--peer-python", fix=fix
            ) from None
        if error.kind not in MISSING:
            tell.notice(f"titans-pytorch is left out: {error.what}")
        else:
            tell.notice(f"titans-pytorch is left out, as it is not installed; {fix}")
    return [one for one in everyone if one.name != THEIRS], {}


def _measure(
    everyone: Sequence[Contender],
    options: Options,
    place: Machine,
    common: Mapping[str, Any],
    tell: Tell,
) -> tuple[list[dict[str, Any]], dict[str, list[float]]]:
    """Rows of the table, and the machine's rates in every round of every length."""
    rows: list[dict[str, Any]] = []
    rates: dict[str, list[float]] = {"product": [], "copy": []}
    first, *further = options.lengths
    again = _again(everyone, first)
    with Field.of([*everyone, *([again] if further else [])], place, tell) as field:
        ceiling = field.build([machine.NAME])[machine.NAME]
        for length in options.lengths:
            names = [one.name for one in everyone if one.name != machine.NAME]
            if length > options.peer_limit:
                names = [OURS]
            what = f"{length:,} tokens, "
            tell.progress(f"{what}building")
            built = field.build(names, **common, length=length)
            jobs = [*machine.CEILINGS, *((name, "training") for name in built), (OURS, "scan")]
            if length != first:
                field.build([again.name], **common, length=first)
                jobs.append((again.name, "training"))
            times = field.times(jobs, options.rounds, what)
            found = machine.rates(ceiling, times)
            rates = {key: rates[key] + found[key] for key in rates}
            seconds = {
                name: [one["seconds"] for one in times[name, "training"]]
                for name in built
                if (name, "training") in times
            }
            beside = times[OURS if length == first else again.name, "training"]
            scan = [built[OURS]["scan_flops"] / one["seconds"] for one in times[OURS, "scan"]]
            for name in seconds:
                rows.append(_row(length, name, built[name], seconds, options))
            ours = next(row for row in rows if (row["tokens"], row["layer"]) == (length, OURS))
            ours["products"] = figures.ratio(scan, found["product"])
            ours["scan_flops_per_second"] = figures.spread(scan)
            ours["growth"] = figures.ratio(
                [one / length for one in seconds[OURS]],
                [one["seconds"] / first for one in beside],
            )
        field.drop()
        _memories(rows, everyone, place, common, tell)
    return rows, rates


def _again(everyone: Sequence[Contender], length: int) -> Contender:
    """Ours once more, at the first length: its turns are in the same rounds as a further one's."""
    ours = next(one for one in everyone if one.name == OURS)
    return replace(ours, name=f"{OURS} at {length:,}")


def _row(
    length: int,
    name: str,
    built: Mapping[str, Any],
    seconds: Mapping[str, Sequence[float]],
    options: Options,
) -> dict[str, Any]:
    """What was timed of a contender; ``ratios`` are tokens a second over each peer's."""
    own = seconds[name]
    peers = [peer for peer in (THEIRS, ATTENTION) if peer in seconds and peer != name]
    return {
        "tokens": length,
        "layer": name,
        "parameters": built["parameters"],
        "seconds": figures.spread(own),
        "tokens_per_second": figures.spread([options.batch * length / one for one in own]),
        "ratios": {peer: figures.ratio(seconds[peer], own) for peer in peers},
    }


def _memories(
    rows: Sequence[dict[str, Any]],
    everyone: Sequence[Contender],
    place: Machine,
    common: Mapping[str, Any],
    tell: Tell,
) -> None:
    """Add what each row needed at most beyond what it held, in a process of its own."""
    known = {one.name: one for one in everyone}
    for row in rows:
        length, contender = row["tokens"], known[row["layer"]]
        tell.progress(f"{length:,} tokens, peak memory: {contender.name}")
        try:
            found = contenders.peak(contender, place, "training", **common, length=length)
        except ContenderFailed as error:
            if contender.required:
                raise
            tell.notice(f"{contender.name} has no peak at {length:,} tokens: {error.what}")
            found = None
        row["peak_bytes"] = found


def _show(result: Mapping[str, Any], rates: Mapping[str, Sequence[float]]) -> None:
    options, environment = result["options"], result["environment"]
    peer = environment.get("titans_pytorch")
    more = [f"titans-pytorch {peer} with torch {environment['peer_torch']}"] if peer else []
    print(machine.line(environment, *more))
    print(machine.ceilings_line(rates, environment["dtype"]))
    print(
        f"{environment['dtype']}, width {options['dim']}, {options['heads']} heads, memory of "
        f"{options['depth']} layers x {options['expansion']}, chunk {options['chunk']}, scanned by "
        f"{options['memory_kernels']}, batch {options['batch']}; forward and backward, "
        f"{options['rounds']} rounds\n"
    )
    head = ["tokens", "layer", "seconds", "tokens/s", f"tokens/s, of {THEIRS}"]
    head += [f"of {ATTENTION}", "extra peak MB", "scan forward, of products", "time a token"]
    print(figures.table(head, [_cells(row) for row in result["rows"]]))
    print()
    for line in figures.verdict_lines(result["checks"]):
        print(line)


def _cells(row: Mapping[str, Any]) -> list[str]:
    def shown(spread: figures.Spread | None) -> str:
        return spread.text() if spread else "-"

    peak = row["peak_bytes"]
    return [
        f"{row['tokens']:,}",
        row["layer"],
        row["seconds"].text(".3f"),
        f"{row['tokens_per_second'].median:,.0f}",
        shown(row["ratios"].get(THEIRS)),
        shown(row["ratios"].get(ATTENTION)),
        "-" if peak is None else f"{peak / 1e6:,.0f}",
        shown(row.get("products")),
        shown(row.get("growth")),
    ]
