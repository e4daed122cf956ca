"""What `titans plan` prints: a run's size, its grid of ranks, memory, steps and what ranks send."""

from collections.abc import Iterator, Mapping
from typing import Any

from titans_pretrain.baselines import foreign
from titans_pretrain.config import RunConfig
from titans_pretrain.parallel import wavefront
from titans_pretrain.parallel.mesh import Mesh
from titans_pretrain.plan import flops, handover, memory_table, parameters


def facts(config: RunConfig, mesh: Mesh) -> dict[str, Any]:
    """Everything about a run that follows from its configuration and its grid of ranks."""
    stages = [_stage(config, mesh, step, length) for step, length in _stages(config).items()]
    return {
        "parameters": {"total": parameters.count(config.model), **parameters.parts(config.model)},
        "mesh": {
            "ranks": mesh.ranks,
            "tensor": mesh.tensor,
            "data": mesh.data,
            "sequence": mesh.sequence,
        },
        "memory": memory_table.facts(config, mesh, list(_stages(config).values())),
        "stages": stages,
        "flops": _all_flops(config, stages),
    }


def text(config: RunConfig, mesh: Mesh) -> str:
    """The same for reading in a terminal."""
    known = facts(config, mesh)
    lines = [*_size(config, known["parameters"]), "", mesh.table()]
    lines += ["", *memory_table.text(config, known["memory"])]
    for stage in known["stages"]:
        lines += ["", *_steps(config, mesh, stage)]
        if mesh.sequence > 1:
            lines += _volumes(config, mesh, stage)
    lines += ["", *_flops_of_all(config, known["flops"])]
    return "\n".join(lines)


def _stages(config: RunConfig) -> dict[int, int]:
    """First step and sequence length of each stage."""
    given = {stage.from_step: stage.length for stage in config.data.length_schedule}
    return given or {0: config.data.sequence_length}


def _stage(config: RunConfig, mesh: Mesh, step: int, length: int) -> dict[str, Any]:
    boundaries = [
        {
            "boundary": boundary,
            **vars(handover.message(config, boundary, length)),
            "bytes_per_layer_and_step": handover.step_bytes(config, mesh, boundary, length),
        }
        for boundary in range(1, mesh.sequence)
    ]
    count = mesh.accumulation(config.train)
    interleaved = mesh.sequence > 1 and wavefront.is_interleaved(config)
    return {
        "from_step": step,
        "sequence_length": length,
        "span": length // mesh.sequence,
        "tokens_per_step": config.train.global_batch_size * config.data.sequence_length,
        "micro_batches": count,
        "rows_per_micro_batch": handover.rows(config, length),
        "interleaved": interleaved,
        "micro_batches_in_flight": min(count, mesh.sequence) if interleaved else 1,
        "layer_times_per_step": _layer_times(config, mesh),
        **_stage_flops(config, length),
        "exchanged_bytes_per_layer_and_pass": handover.exchange_bytes(config, length),
        "boundaries": boundaries,
    }


def _stage_flops(config: RunConfig, length: int) -> dict[str, Any]:
    """Of one token's forward pass by part, and of a step; nothing where they are not counted."""
    if not flops.is_counted(config.model):
        return {}
    return {
        "forward_flops_per_token": flops.token(config.model, length),
        "flops_per_step": flops.step(config, length),
    }


def _all_flops(config: RunConfig, stages: list[dict[str, Any]]) -> int | None:
    """Model FLOPs of the whole run without validations; None where they are not counted."""
    if not flops.is_counted(config.model):
        return None
    ends = [*(stage["from_step"] for stage in stages[1:]), config.train.steps]
    steps = [
        max(0, min(end, config.train.steps) - stage["from_step"])
        for end, stage in zip(ends, stages, strict=True)
    ]
    return sum(
        count * int(stage["flops_per_step"]) for count, stage in zip(steps, stages, strict=True)
    )


def _layer_times(config: RunConfig, mesh: Mesh) -> int:
    """Times of one layer's forward and backward pass that a step takes on the line of ranks."""
    layers, count = parameters.layers(config.model), mesh.accumulation(config.train)
    if config.model.get("variant") == "transformer":
        return int(count * layers)
    if wavefront.is_interleaved(config):
        return int(count * layers + mesh.sequence - 1)
    return int(count * (layers + mesh.sequence - 1))


def _size(config: RunConfig, sizes: Mapping[str, int]) -> Iterator[str]:
    model = config.model
    name = config.run.name or config.run.directory
    layers = parameters.layers(model)
    head = f", head {sizes['head']:,}" if sizes["head"] else ", which is the head too"
    if foreign.is_foreign(model):
        yield f"{name}: {foreign.name_of(model)}, {sizes['total']:,} parameters"
        yield f"  embedding {sizes['embedding']:,}{head}"
        yield f"  {layers} block{'s' * (layers > 1)} and norms of {sizes['blocks']:,} together"
        return
    yield f"{name}: {model['variant']}, {sizes['total']:,} parameters"
    block = ", ".join(
        f"{part.replace('_', ' ')} {elements:,}"
        for part, elements in parameters.block(model).items()
        if elements
    )
    yield f"  embedding {sizes['embedding']:,}{head}"
    yield f"  {layers} block{'s' * (layers > 1)} of {sizes['blocks'] // layers:,}:"
    yield f"    {block}"


def _steps(config: RunConfig, mesh: Mesh, stage: Mapping[str, Any]) -> Iterator[str]:
    count, rows = stage["micro_batches"], stage["rows_per_micro_batch"]
    yield (
        f"from step {stage['from_step']}: sequences of {stage['sequence_length']:,} tokens"
        + f", spans of {stage['span']:,}" * (mesh.sequence > 1)
        + f"; {stage['tokens_per_step']:,} tokens a step"
    )
    yield (
        f"  {count} micro-batch{'es' * (count > 1)} a rank, "
        f"each of {rows} sequence{'s' * (rows > 1)}"
        + (
            f", interleaved: the first sequence rank keeps {stage['micro_batches_in_flight']} "
            "at a time, the last 1"
            if stage["interleaved"]
            else ", one after another"
        )
    )
    layers = parameters.layers(config.model)
    if mesh.sequence > 1 and config.model["variant"] != "transformer":
        yield (
            f"  a step takes {stage['layer_times_per_step']} layer times; ranks that waited for "
            f"each other layer by layer would take {count * layers * mesh.sequence}"
        )
    if "flops_per_step" in stage:
        parts = stage["forward_flops_per_token"]
        whole = sum(parts.values())
        shares = ", ".join(
            f"{part.replace('_', ' ')} {count / whole:.1%}"
            for part, count in parts.items()
            if count
        )
        yield f"  {flops.scaled(whole)}FLOPs a token and forward pass: {shares}"
        yield f"  {flops.scaled(stage['flops_per_step'])}FLOPs a step, backward passes included"


def _flops_of_all(config: RunConfig, count: int | None) -> Iterator[str]:
    if count is None:
        yield f"FLOPs of {foreign.name_of(config.model)} are not counted"
    else:
        yield f"{flops.scaled(count)}FLOPs in {config.train.steps:,} steps, without validations"


def _volumes(config: RunConfig, mesh: Mesh, stage: Mapping[str, Any]) -> Iterator[str]:
    if config.model["variant"] == "transformer":
        sent = stage["exchanged_bytes_per_layer_and_pass"]
        yield (
            f"  a rank sends {_bytes(sent)} a layer and pass to the others of its sequence, "
            f"{_bytes(2 * stage['micro_batches'] * sent)} a layer and step"
        )
        return
    yield "  bytes a layer and tensor rank:"
    heads = ("between sequence ranks", "state", "convolution", "window", "step, both ways")
    rows = [heads, *_rows(stage["boundaries"])]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for first, *rest in rows:
        cells = [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
        yield "    " + "  ".join([first.ljust(widths[0]), *cells])
    reach = handover.free_of_length(config.model)
    if stage["span"] >= reach:
        yield "  the same for sequences of any length in micro-batches of as many sequences"
    else:
        yield f"  grows with the sequence until spans have {reach:,} tokens"


def _rows(boundaries: list[dict[str, int]]) -> Iterator[tuple[str, ...]]:
    """A row for each run of boundaries with equal volumes."""
    runs: list[tuple[int, dict[str, int]]] = []
    for one in boundaries:
        if not runs or _volume(runs[-1][1]) != _volume(one):
            runs.append((one["boundary"], one))
    for index, (first, one) in enumerate(runs):
        last = runs[index + 1][0] - 1 if index + 1 < len(runs) else boundaries[-1]["boundary"]
        name = f"{first - 1} and {first}"
        if last > first:
            name += f" … {last - 1} and {last}"
        yield (name, *(f"{value:,}" for value in _volume(one)))


def _volume(boundary: Mapping[str, int]) -> tuple[int, ...]:
    names = ("state", "convolution", "window", "bytes_per_layer_and_step")
    return tuple(boundary[name] for name in names)


def _bytes(count: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"
