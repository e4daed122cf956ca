"""``titans bench model``: training steps of whole models beside Transformer++ of their sizes."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from titans_pretrain import config
from titans_pretrain.baselines import foreign
from titans_pretrain.bench import contenders, figures, machine
from titans_pretrain.bench.contenders import Contender, Field, Machine
from titans_pretrain.bench.progress import Tell
from titans_pretrain.errors import UserError
from titans_pretrain.model import fields
from titans_pretrain.plan import flops, parameters

HERE = Path(__file__).parent
PEER = "Transformer++"
KINDS = {
    "speed": f"tokens/s of its {PEER}'s at least",
    "mfu": "share of the known peak, else of the measured products at least",
}
SAME = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "rms_norm_eps",
    "rope_theta",
    "tie_word_embeddings",
    "initializer_range",
)
MULTIPLE = 8  # of feed-forward widths that a GPU's products like


@dataclass(frozen=True)
class Options:
    """What is measured.

    Attributes:
        models: presets, or runs' YAML files.
        override: fields of all of them, ``KEY=VALUE``.
        length: tokens of a sequence.
        micro_batch: sequences.
        checkpointing: whether blocks are recomputed in backward.
        memory_kernels: that scan memories, as ``train.memory_kernels``; None takes each run's.
        against: a preset or a run's YAML file whose speed all others' are compared with.
        peer: whether each Titans has a Transformer++ of equal parameters beside it.
        rounds, device, dtype, threads, json: see ``memory.Options``.
        check: targets, ``KIND=BOUND`` with a kind out of ``KINDS``.
    """

    models: Sequence[str]
    override: Sequence[str] = ()
    length: int = 4096
    micro_batch: int = 1
    checkpointing: bool = False
    memory_kernels: str | None = None
    against: str | None = None
    peer: bool = True
    rounds: int = 5
    device: str | None = None
    dtype: str | None = None
    threads: int | None = None
    check: Sequence[str] = ()
    json: Path | None = None


def run(options: Options, tell: Tell) -> bool:
    """Measure, print, write; whether the target is met.

    Raises:
        UserError: no such model, a target without anyone to compare with, no such device.
        ContenderFailed: a model cannot be trained, for lack of memory for example.
    """
    figures.check_json(options.json)
    models = _models(options)
    kernels = _kernels(options, models)
    peers = {name: beside for name, model in models.items() if (beside := _peer(model, options))}
    targets = _targets(options.check, models, peers)
    place, dtype = machine.choose(options.device, options.dtype, options.threads)
    machine.check_kernels(kernels.values(), place)
    environment = machine.facts(place) | {"dtype": dtype}
    entrants = models | {f"{PEER} for {name}": model for name, model in peers.items()}
    rows, rates = _measure(entrants, kernels, options, place, dtype, tell)
    tell.clear()
    peak = machine.known_peak(place, dtype)
    _judge_rates(rows, rates["product"], peak)
    result: dict[str, Any] = {
        "benchmark": "model",
        "environment": environment,
        "options": asdict(options) | {"json": None},
        "ceilings": machine.ceilings(rates) | {"known_peak_flops_per_second": peak},
        "rows": [{k: v for k, v in row.items() if k != "rates"} for row in rows],
        "checks": _verdicts(rows, targets),
    }
    _show(result, rates)
    figures.write_json(options.json, result)
    return all(verdict.passed for verdict in result["checks"])


def named(models: Sequence[str], override: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The fields of each model by its preset's or file's name.

    Raises:
        UserError: no such preset or file, an unknown field, one name twice.
    """
    found: dict[str, dict[str, Any]] = {}
    for text in models:
        name = _name(text)
        if name in found:
            raise UserError(f"{name} is given twice", where="MODEL", fix="give it once")
        found[name] = _fields(text, override)
    return found


def _models(options: Options) -> dict[str, dict[str, Any]]:
    """The fields of all models, the one that others are compared with among them."""
    models = named(options.models, options.override)
    if options.against is None or options.against in options.models:
        return models
    (name,) = against = named([options.against], [])
    if name in models:
        raise UserError(f"{name} is given twice", where="--against", fix="give another file's name")
    return models | against


def _is_run(text: str) -> bool:
    return text.endswith((".yaml", ".yml"))


def _name(text: str) -> str:
    """Of a preset, or of a run's file."""
    return Path(text).stem if _is_run(text) else text


def _kernels(options: Options, models: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Which kernels scan the memory of each model that has one.

    Raises:
        UserError: kernels are asked for, and no model has a memory.
    """
    typed = {_name(text): (text, options.override) for text in options.models}
    if options.against is not None:
        typed.setdefault(_name(options.against), (options.against, ()))
    found = {}
    for name, (text, override) in typed.items():
        if foreign.is_foreign(models[name]) or models[name]["variant"] not in fields.WITH_MEMORY:
            continue
        of_run = _run(text, override).train.memory_kernels if _is_run(text) else "torch"
        found[name] = options.memory_kernels or of_run
    if options.memory_kernels == "triton" and not found:
        raise UserError("no model has a memory", where="--memory-kernels", fix="leave it out")
    return found


def _run(text: str, override: Sequence[str]) -> config.RunConfig:
    return config.load(text, [f"model.{given}" for given in override])


def _fields(text: str, override: Sequence[str]) -> dict[str, Any]:
    """Of a preset, or of a run's YAML."""
    for given in override:
        key, equals, _ = given.partition("=")
        if not equals or not key:
            raise UserError(f"{given!r} sets nothing", where="--set", fix="write KEY=VALUE")
    if _is_run(text):
        return _run(text, override).model
    values = {}
    for given in override:
        key, _, value = given.partition("=")
        try:
            values[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise UserError(f"{value!r} is no YAML value", where="--set", fix="quote it") from None
    return config.resolve_model({"preset": text, **values})


def equal_transformer(model: Mapping[str, Any]) -> dict[str, Any]:
    """The Transformer++ of as many layers, as wide, whose feed-forward makes up for the memory.

    Of a model without attention it takes the memory's heads.
    """
    given = {name: model[name] for name in SAME} | {"variant": "transformer"}
    attends = model["variant"] in fields.WITH_ATTENTION
    heads = model["num_attention_heads"] if attends else parameters.memory_heads(model)
    given["num_attention_heads"] = heads
    width = model["hidden_size"]
    without = fields.defaults() | given | {"intermediate_size": 0}
    missing = parameters.count(model) - parameters.count(without)
    steps = missing / (3 * width * model["num_hidden_layers"] * MULTIPLE)
    full = fields.defaults() | given | {"intermediate_size": max(1, round(steps)) * MULTIPLE}
    full["partial_rotary_factor"] = fields.rotary_factor(full)
    return full


def _peer(model: Mapping[str, Any], options: Options) -> dict[str, Any] | None:
    if not options.peer or foreign.is_foreign(model) or model["variant"] == "transformer":
        return None
    return equal_transformer(model)


def _measure(
    entrants: Mapping[str, Mapping[str, Any]],
    kernels: Mapping[str, str],
    options: Options,
    place: Machine,
    dtype: str,
    tell: Tell,
) -> tuple[list[dict[str, Any]], dict[str, list[float]]]:
    """Rows of the table, and the machine's rates in every round."""
    common = {
        "length": options.length,
        "rows": options.micro_batch,
        "checkpointing": options.checkpointing,
        "device": place.device,
        "dtype": dtype,
    }
    models = [
        _contender(name, model, kernels.get(name, "torch")) for name, model in entrants.items()
    ]
    with Field.of([machine.contender(place, dtype), *models], place, tell) as field:
        tell.progress("building")
        ceiling = field.build([machine.NAME])[machine.NAME]
        built = field.build(list(entrants), **common)
        jobs = [*machine.CEILINGS, *((name, "training") for name in entrants)]
        times = field.times(jobs, options.rounds)
    tokens = options.length * options.micro_batch
    seconds = {name: [one["seconds"] for one in times[name, "training"]] for name in entrants}
    rows = [
        _row(name, model, seconds, built[name]["parameters"], tokens, options)
        for name, model in entrants.items()
    ]
    for row, contender in zip(rows, models, strict=True):
        row["memory_kernels"] = kernels.get(contender.name)
        tell.progress(f"peak memory: {contender.name}")
        row["peak_bytes"] = contenders.peak(contender, place, "training", **common)
    return rows, machine.rates(ceiling, times)


def _contender(name: str, model: Mapping[str, Any], kernels: str) -> Contender:
    options = {"model": dict(model), "memory_kernels": kernels}
    return Contender(name, HERE / "steps.py", "build", options)


def _row(
    name: str,
    model: Mapping[str, Any],
    seconds: Mapping[str, Sequence[float]],
    count: int,
    tokens: int,
    options: Options,
) -> dict[str, Any]:
    """What was timed of a model; ``rates`` are its model FLOP/s, None where they are not known."""
    own = seconds[name]
    beside = seconds.get(f"{PEER} for {name}")
    against = None if options.against is None else _name(options.against)
    other = None if against in (None, name) else seconds[str(against)]
    needed = (
        flops.training(model, options.length, options.micro_batch)
        if flops.is_counted(model)
        else None
    )
    return {
        "model": name,
        "parameters": count,
        "seconds": figures.spread(own),
        "tokens_per_second": figures.spread([tokens / one for one in own]),
        "of_peer": None if beside is None else figures.ratio(beside, own),
        "of_against": None if other is None else figures.ratio(other, own),
        "flops": needed,
        "rates": None if needed is None else [needed / one for one in own],
    }


def _judge_rates(
    rows: Sequence[dict[str, Any]], product: Sequence[float], peak: float | None
) -> None:
    """Set each row's ``mfu``, of the known peak, and ``products``, its share of the measured."""
    for row in rows:
        rates = row["rates"]
        row["products"] = None if rates is None else figures.ratio(rates, product)
        row["mfu"] = (
            None if rates is None or peak is None else figures.spread([one / peak for one in rates])
        )


def _targets(
    given: Sequence[str], models: Mapping[str, Mapping[str, Any]], peers: Mapping[str, Any]
) -> list[tuple[str, str, float]]:
    """Kind, model and bound of every target.

    Raises:
        UserError: no such kind or bound, or no model that it could be judged by.
    """
    counted = [name for name, model in models.items() if flops.is_counted(model)]
    targets = []
    for text in given:
        kind, place, bound = figures.bound(text, KINDS)
        judged = list(peers) if kind == "speed" else counted
        chosen = [name for name in judged if place in ("", name)]
        if not chosen:
            raise UserError(
                f"{text!r}: no model that it could be judged by",
                where="--check",
                fix=f"name one of: {', '.join(judged)}" if judged else "leave it out",
            )
        targets += [(kind, name, bound) for name in chosen]
    return targets


def _verdicts(
    rows: Sequence[Mapping[str, Any]], targets: Sequence[tuple[str, str, float]]
) -> list[figures.Verdict]:
    at = {row["model"]: row for row in rows}
    verdicts = []
    for kind, name, bound in targets:
        row = at[name]
        found = (row["of_peer"] if kind == "speed" else row["mfu"] or row["products"]).median
        told = f"{name}: {KINDS[kind]}"
        verdicts.append(figures.Verdict(told, bound, found, found >= bound))
    return verdicts


def _show(result: Mapping[str, Any], rates: Mapping[str, Sequence[float]]) -> None:
    options, environment = result["options"], result["environment"]
    print(machine.line(environment))
    print(machine.ceilings_line(rates, environment["dtype"]))
    print(
        f"{environment['dtype']}, {options['micro_batch']} x {options['length']:,} tokens"
        + ", blocks recomputed" * options["checkpointing"]
        + f"; forward, loss and backward, {options['rounds']} rounds\n"
    )
    peak = result["ceilings"]["known_peak_flops_per_second"]
    share = "share of measured products" if peak is None else "MFU"
    head = ["model", "memory scanned by", "parameters", "seconds", "tokens/s", f"of {PEER}'s"]
    if against := options["against"]:
        head.append(f"of {_name(against)}'s")
    head += [share, "extra peak MB"]
    cells = [_cells(row, peak, against=against is not None) for row in result["rows"]]
    print(figures.table(head, cells))
    print()
    for line in figures.verdict_lines(result["checks"]):
        print(line)


def _cells(row: Mapping[str, Any], peak: float | None, *, against: bool) -> list[str]:
    share = row["products"] if peak is None else row["mfu"]
    ratios = [row["of_peer"], *([row["of_against"]] if against else []), share]
    return [
        row["model"],
        row["memory_kernels"] or "-",
        f"{row['parameters']:,}",
        row["seconds"].text(".3f"),
        f"{row['tokens_per_second'].median:,.0f}",
        *("-" if ratio is None else ratio.text() for ratio in ratios),
        f"{row['peak_bytes'] / 1e6:,.0f}",
    ]
