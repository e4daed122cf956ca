"""A tiny model of the run's kind, trained one step on the planned mesh and on one process.

Every rank computes the same step alone and compares its parts: whatever reduction is missing,
doubled or scaled wrongly on this cluster shows in a second or two, before the run begins.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

from titans_pretrain.baselines import foreign
from titans_pretrain.config import RunConfig
from titans_pretrain.data.loader import Batch
from titans_pretrain.errors import TitansError
from titans_pretrain.model import fields
from titans_pretrain.parallel import devices
from titans_pretrain.parallel.construct import construct
from titans_pretrain.parallel.mesh import Mesh
from titans_pretrain.parallel.parallelize import Parallel
from titans_pretrain.parallel.zero import ZeroEngine
from titans_pretrain.parallel.zero_settings import partitioner
from titans_pretrain.train.passes import Passes

TOLERANCE = 1e-4
SMALL = 1e-3  # of the largest gradient: what is smaller is compared with this share of it
MICRO_BATCHES, SPAN, CHUNK, HEAD = 2, 8, 4, 16


def check_mesh(config: RunConfig, parallel: Parallel, device: torch.device) -> None:
    """Compare loss and gradients of a tiny step on the mesh with those of one process.

    All ranks together, at the start; the process's random state stays. Always in float32.

    Raises:
        TitansError: on all ranks alike, they differ by more than 1e-4.
    """
    mesh = parallel.mesh
    values = tiny_fields(config.model, mesh)
    tokens = _tokens(values, mesh)
    starts = _starts(values, tokens)
    loss, gradients = _alone(values, tokens, starts, device)
    try:
        found, engine = _on_mesh(config, parallel, values, tokens, starts, device)
        errors = _errors(engine, gradients)
        engine.destroy()
    finally:
        parallel.links.bytes_sent.clear()
        parallel.whereabouts.enter("starting")
    errors["the loss"] = abs(found - loss) / abs(loss)
    # NaN would slip through max().
    sizes = [(math.inf if math.isnan(error) else error, name) for name, error in errors.items()]
    worst_of_ranks = max(devices.gather_objects(max(sizes)))
    if not worst_of_ranks[0] <= TOLERANCE:
        raise TitansError(
            f"on {mesh} {worst_of_ranks[1]} of a tiny model is {worst_of_ranks[0]:.1e} off that "
            "of one process",
            where="check of the mesh at the start",
            fix="use the versions in pyproject.toml; nothing was trained or saved",
        )


def tiny_fields(model: Mapping[str, Any], mesh: Mesh) -> dict[str, Any]:
    """The run's model in the smallest sizes that the mesh divides; its kind stays.

    Another library's model has no smaller sizes that are known here. A transformer stands in for
    it: data ranks reduce any model's gradients alike.
    """
    if foreign.is_foreign(model):
        model = fields.defaults() | {"variant": "transformer"}
    variant = model["variant"]
    heads = mesh.tensor * (mesh.sequence if variant == "transformer" else 1)
    sizes: dict[str, Any] = {
        "vocab_size": HEAD * mesh.tensor,
        "hidden_size": HEAD * heads,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "intermediate_size": HEAD * mesh.tensor,
        "memory_heads": heads,
        "chunk_size": CHUNK,
        "segment_length": CHUNK,
        "window_size": SPAN if mesh.sequence <= 2 else SPAN + CHUNK,  # more than one span back
        "num_persistent_tokens": min(2, model["num_persistent_tokens"]),
        "initializer_range": 0.2,
    }
    for name in fields.unused(variant, sizes):
        del sizes[name]
    return {**model, **sizes}


def _tokens(values: Mapping[str, Any], mesh: Mesh) -> torch.Tensor:
    """(data ranks * micro-batches, sequence ranks * span + 1)."""
    shape = (mesh.data * MICRO_BATCHES, mesh.sequence * SPAN + 1)
    return torch.randint(values["vocab_size"], shape, generator=torch.Generator().manual_seed(0))


def _starts(values: Mapping[str, Any], tokens: torch.Tensor) -> torch.Tensor | None:
    """Documents of about a chunk, for a model that separates them.

    In the first row of each data rank one begins with every span.
    """
    if not fields.separates_documents(values):
        return None
    shape = (tokens.shape[0], tokens.shape[1] - 1)
    begins = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 1 / CHUNK
    begins[::MICRO_BATCHES, SPAN::SPAN] = True
    return torch.where(begins, torch.arange(shape[1]), 0).cummax(1).values


def _alone(
    values: Mapping[str, Any],
    tokens: torch.Tensor,
    starts: torch.Tensor | None,
    device: torch.device,
) -> tuple[float, dict[str, torch.Tensor]]:
    """Mean loss and gradients without any other rank."""
    model = construct(values, 0).to(device).train()
    tokens = tokens.to(device)
    logits = model(input_ids=tokens[:, :-1], document_starts=starts, use_cache=False).logits
    loss = F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
    loss.backward()
    named = model.named_parameters()
    return loss.item(), {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in named}


def _on_mesh(
    config: RunConfig,
    parallel: Parallel,
    values: Mapping[str, Any],
    tokens: torch.Tensor,
    starts: torch.Tensor | None,
    device: torch.device,
) -> tuple[float, ZeroEngine]:
    """Mean loss, and the engine with its reduced gradients."""
    mesh, groups = parallel.mesh, parallel.groups
    rows, length = tokens.shape[0], tokens.shape[1] - 1
    train = config.train.model_copy(
        update={"precision": "fp32", "micro_batch_size": 1, "global_batch_size": rows}
    )
    data = config.data.model_copy(update={"sequence_length": length})
    config = config.model_copy(update={"train": train, "data": data})
    model = construct(values, 0, parallel, partitioner(train, groups))
    engine = ZeroEngine(model, torch.optim.AdamW(model.parameters()), train, parallel, device)
    engine.train()
    own = slice(groups.data_rank * MICRO_BATCHES, (groups.data_rank + 1) * MICRO_BATCHES)
    batch = Batch(tokens[own], None, None if starts is None else starts[own])
    summed = Passes(engine, parallel, config, device).train(batch, rows * length)
    engine.gradient_norm()
    total = devices.all_sum(torch.tensor(sum(summed), dtype=torch.float64)).item()
    return total / mesh.tensor / (rows * length), engine


def _errors(engine: ZeroEngine, gradients: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """The largest difference of this rank's part of every gradient, over that gradient's size."""
    largest = max(float(gradient.abs().max()) for gradient in gradients.values())
    found = {}
    for shard in engine.gradients():
        whole = gradients[shard.name.removeprefix("gradients/")]
        scale = max(float(whole.abs().max()), SMALL * largest)
        offsets, sizes = shard.window
        part = whole[tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))]
        expected = part.flatten()[shard.start : shard.stop].to(shard.tensor.device)
        if expected.numel():
            difference = float((shard.tensor - expected).abs().max())
            found[f"the gradient of {shard.name.removeprefix('gradients/')}"] = difference / scale
    return found
