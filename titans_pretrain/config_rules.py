"""The rules between the sections of a run's configuration, each with its fix. No torch here."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from titans_pretrain.baselines import foreign
from titans_pretrain.model.fields import WITH_ATTENTION, WITH_MEMORY

if TYPE_CHECKING:
    from titans_pretrain.config import RunConfig


@dataclass(frozen=True)
class Problem:
    """A combination a run cannot have: at which key, what is wrong, how to mend it."""

    key: tuple[str, str]
    what: str
    fix: str


def problems(config: "RunConfig") -> Iterator[Problem]:
    """Everything wrong between the values of a run whose values are good one by one."""
    yield from _steps(config)
    yield from _sources(config)
    yield from _lengths(config)
    if foreign.is_foreign(config.model):
        yield from _foreign(config)
    else:
        yield from _tensor(config)
        yield from _sequence(config)
    yield from _guard(config)
    yield from _evaluation(config)
    yield from _pipeline(config)


def grid(model: dict[str, Any]) -> int:
    """Tokens that sequence ranks cannot share: a chunk, of MAC a segment, of a transformer one."""
    if model["variant"] == "mac":
        return int(model["segment_length"])
    return int(model["chunk_size"]) if model["variant"] in WITH_MEMORY else 1


def heads(model: dict[str, Any]) -> dict[str, int]:
    """The variant's head counts by field."""
    count = model["num_attention_heads"]
    found = {"num_attention_heads": count} if model["variant"] in WITH_ATTENTION else {}
    if model["variant"] in WITH_MEMORY:
        found["memory_heads"] = model["memory_heads"] or count
    return found


def _steps(config: "RunConfig") -> Iterator[Problem]:
    train, kept = config.train, config.checkpoint
    if train.warmup_steps > train.steps:
        yield Problem(
            ("train", "warmup_steps"),
            f"{train.warmup_steps} exceeds train.steps {train.steps}",
            f"use {train.steps} or less",
        )
    if train.global_batch_size % train.micro_batch_size:
        yield Problem(
            ("train", "global_batch_size"),
            f"{train.global_batch_size} is no multiple of micro_batch_size "
            f"{train.micro_batch_size}",
            f"use {_above(train.global_batch_size, train.micro_batch_size)}",
        )
    if config.run.trace_step > train.steps:
        yield Problem(
            ("run", "trace_step"),
            f"{config.run.trace_step} exceeds train.steps {train.steps}",
            f"use {train.steps} or less",
        )
    if kept.keep_every and not kept.every:
        yield Problem(
            ("checkpoint", "keep_every"),
            f"{kept.keep_every} keeps nothing where checkpoint.every is 0",
            f"set checkpoint.every to {kept.keep_every} or a divisor of it",
        )
    elif kept.keep_every and kept.keep_every % kept.every:
        yield Problem(
            ("checkpoint", "keep_every"),
            f"{kept.keep_every} is no multiple of checkpoint.every {kept.every}",
            f"use {_either(_next_to(kept.keep_every, kept.every))}",
        )


def _sources(config: "RunConfig") -> Iterator[Problem]:
    data = config.data
    if data.manifest is None and not data.mixture:
        yield Problem(("data", "manifest"), "missing", "add manifest to data, or mixture")
    if data.manifest is not None and data.mixture:
        yield Problem(("data", "mixture"), "given beside data.manifest", "give only one of the two")


def _lengths(config: "RunConfig") -> Iterator[Problem]:
    data, key = config.data, ("data", "length_schedule")
    starts = [stage.from_step for stage in data.length_schedule]
    if starts and (starts[0] != 0 or starts != sorted(set(starts))):
        yield Problem(
            key,
            f"stages start at {starts}",
            "start the first at step 0 and each later one at a larger step",
        )
    for stage in data.length_schedule:
        if data.sequence_length % stage.length:
            yield Problem(
                key,
                f"{stage.length} does not divide sequence_length {data.sequence_length}",
                "use a divisor of it",
            )


def _tensor(config: "RunConfig") -> Iterator[Problem]:
    """Tensor ranks hold whole heads and equal slices."""
    model, ranks = config.model, config.mesh.tensor
    split = heads(model) | {name: model[name] for name in ("intermediate_size", "vocab_size")}
    for name, value in split.items():
        if value % ranks:
            fitting = _next_to(value, ranks)
            if name in heads(model):
                fitting = [n for n in fitting if model["hidden_size"] % n == 0]
            fixes = [f"mesh.tensor {_largest_divisor(math.gcd(*split.values()), ranks)}"]
            fixes += [f"model.{name} {_either(fitting)}"] * bool(fitting)
            yield Problem(
                ("mesh", "tensor"),
                f"{ranks} ranks cannot share model.{name} {value} equally",
                f"use {', or '.join(fixes)}",
            )


def _foreign(config: "RunConfig") -> Iterator[Problem]:
    """Another library's layers are not divided; their ranks share parameters alone."""
    name = config.model[foreign.KEY]
    for axis in ("tensor", "sequence"):
        if (ranks := getattr(config.mesh, axis)) > 1:
            yield Problem(
                ("mesh", axis),
                f"{ranks} ranks cannot share the layers of model.hf {name!r}",
                "use 1; ranks beyond are data ranks, which share its parameters",
            )
    longest, length = foreign.longest(config.model), config.data.sequence_length
    if longest is not None and length > longest:
        yield Problem(
            ("data", "sequence_length"),
            f"{length} exceeds model.max_position_embeddings {longest}",
            f"use {longest} or less, or model.max_position_embeddings={length}",
        )
    if config.train.activation_checkpointing and not foreign.can_recompute(config.model):
        yield Problem(
            ("train", "activation_checkpointing"),
            f"the class of model.hf {name!r} does not support it",
            "take it out",
        )


def _sequence(config: "RunConfig") -> Iterator[Problem]:
    """Sequence ranks hold equal spans of whole chunks, segments or, in all-to-all, heads."""
    model, ranks, unit = config.model, config.mesh.sequence, grid(config.model)
    if ranks == 1:
        return
    lengths = [("sequence_length", config.data.sequence_length)]
    lengths += [("length_schedule", stage.length) for stage in config.data.length_schedule]
    common = math.gcd(*(length for _, length in lengths))
    shares = common // unit if common % unit == 0 else 1
    if model["variant"] == "transformer" and model["attention_window"] is not None:
        yield Problem(
            ("mesh", "sequence"),
            f"{ranks} ranks cannot share a sequence of which attention sees "
            f"model.attention_window {model['attention_window']} tokens",
            "use 1, or leave model.attention_window out",
        )
    if model["variant"] == "transformer":
        count = model["num_attention_heads"] // config.mesh.tensor
        shares = math.gcd(shares, count)
        if count % ranks:
            yield Problem(
                ("mesh", "sequence"),
                f"{ranks} ranks cannot share the {count} attention heads of a tensor rank equally",
                f"use {_largest_divisor(shares, ranks)}",
            )
    of = {"mac": " * segment_length", "transformer": ""}.get(model["variant"], " * chunk_size")
    for name, length in lengths:
        if length % (ranks * unit):
            yield Problem(
                ("data", name),
                f"{length} is no multiple of mesh.sequence{of} = {ranks}"
                + (f" * {unit} = {ranks * unit}" if of else ""),
                f"use {_either(_next_to(length, ranks * unit))}, "
                f"or mesh.sequence {_largest_divisor(shares, ranks)}",
            )


def _guard(config: "RunConfig") -> Iterator[Problem]:
    guard = config.guard
    for name in ("loss_spike", "gradient_spike"):
        factor = getattr(guard, name)
        if 0 < factor <= 1:
            yield Problem(
                ("guard", name),
                f"{factor} would call ordinary steps spikes",
                "use a factor above 1, such as 2, or 0 to turn it off",
            )
    if guard.policy == "rollback" and not config.checkpoint.every:
        yield Problem(
            ("guard", "policy"),
            "rollback has no step to go back to where checkpoint.every is 0",
            "set checkpoint.every, or use policy skip or stop",
        )
    if guard.rollback_steps and guard.policy != "rollback":
        yield Problem(
            ("guard", "rollback_steps"),
            f"policy {guard.policy!r} does not use it",
            "take it out, or use policy rollback",
        )


def _evaluation(config: "RunConfig") -> Iterator[Problem]:
    asked, saved = config.pipeline.eval, config.checkpoint.every
    if asked.every and not saved:
        yield Problem(
            ("pipeline", "eval"),
            f"every {asked.every} evaluates nothing where checkpoint.every is 0",
            f"set checkpoint.every to {asked.every} or a divisor of it",
        )
    elif asked.every and asked.every % saved:
        yield Problem(
            ("pipeline", "eval"),
            f"every {asked.every} is no multiple of checkpoint.every {saved}",
            f"use {_either(_next_to(asked.every, saved))}",
        )
    if asked.every and config.data.manifest is None and not asked.tasks:
        yield Problem(
            ("pipeline", "eval"),
            "there is nothing to evaluate on: one data set is scored, and the run trains on a "
            "mixture",
            "give pipeline.eval.tasks, or every 0",
        )
    if asked.options and not asked.tasks:
        yield Problem(
            ("pipeline", "eval"),
            f"options {asked.options[0]!r} says nothing without tasks",
            "give pipeline.eval.tasks, or take it out",
        )


def _pipeline(config: "RunConfig") -> Iterator[Problem]:
    data = config.pipeline.data
    if data is None:
        return
    named = any(option.startswith("--dataset=") for option in data.options)
    if bool(data.input) == named:
        yield Problem(
            ("pipeline", "data"),
            "input and --dataset are both given" if named else "there is nothing to prepare",
            "give either input, a list of files, or --dataset=NAME among options",
        )
    if config.data.manifest is None or "://" in config.data.manifest:
        yield Problem(
            ("pipeline", "data"),
            "prepared data needs a directory of its own",
            "set data.manifest to DIRECTORY/manifest.json",
        )


def _largest_divisor(value: int, at_most: int) -> int:
    return next(n for n in range(min(value, at_most), 0, -1) if value % n == 0)


def _above(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def _next_to(value: int, unit: int) -> list[int]:
    """The multiples of ``unit`` next to ``value``."""
    return [n for n in (value // unit * unit, _above(value, unit)) if n]


def _either(values: Iterable[int]) -> str:
    return " or ".join(map(str, values))
