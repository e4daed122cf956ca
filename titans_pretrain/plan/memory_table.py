"""A step's memory on one rank, as `titans plan` tells it."""

from collections.abc import Iterator, Mapping
from typing import Any

from titans_pretrain.config import RunConfig
from titans_pretrain.model import fields
from titans_pretrain.parallel.mesh import Mesh
from titans_pretrain.plan import memory

GIB = 2**30
GPUS = {"A100 40 GB": 39, "A100 or H100 80 GB": 79, "H200 141 GB": 139, "B200": 178}  # GiB
USED = 0.9  # of a GPU: CUDA, its libraries and the allocator's fragments have the rest
NAMES = {
    "gathered": "gathered weights",
    "optimizer": "float32 weights, moments",
    "communication": "reduction buckets",
    "block": "one block",
    "states": "memory states of it",
    "scan": "memory scan, backward",
    "loss": "loss and head",
    "update": "optimizer's arithmetic",
}


def facts(config: RunConfig, mesh: Mesh, lengths: list[int]) -> dict[str, Any] | None:
    """Bytes by moment and term where sequences have the length, of ``lengths``, that takes most.

    None where the model's activations are not known. ``largest_micro_batch`` holds, by GPU, the
    sequences of full length that a micro-batch may have, 0 where none fits. ``documents_counted``
    is false of a model that tells documents apart: what that takes is not among the bytes.
    """
    if not memory.is_counted(config):
        return None
    length = max(lengths, key=lambda one: memory.total(config, mesh, one))
    moments = memory.moments(config, mesh, length)
    return {
        "sequence_length": length,
        "memory_kernels": config.train.memory_kernels,
        "documents_counted": not fields.separates_documents(config.model),
        "bytes": max(terms.total for terms in moments.values()),
        "moments": {name: vars(terms) | {"total": terms.total} for name, terms in moments.items()},
        "largest_micro_batch": {
            name: memory.largest_micro_batch(config, mesh, size * GIB * USED, length)
            for name, size in GPUS.items()
        },
    }


def text(config: RunConfig, known: Mapping[str, Any] | None) -> Iterator[str]:
    """The same for reading in a terminal."""
    if known is None:
        yield "what a step takes in memory is not known of this model"
        return
    count, length = config.train.micro_batch_size, known["sequence_length"]
    tokens = count * config.data.sequence_length
    again = " and activation checkpointing" * config.train.activation_checkpointing
    yield (
        f"tensors on a rank, GiB, in micro-batches of {tokens:,} tokens, {length:,} a sequence"
        f"{again}:"
    )
    moments: Mapping[str, Mapping[str, int]] = known["moments"]
    rows = [("", *moments)]
    for term in next(iter(moments.values())):
        values = [moment[term] for moment in moments.values()]
        if any(values):
            name = _name(term, checkpointed=config.train.activation_checkpointing)
            rows.append((name, *(_gib(value) for value in values)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for first, *rest in rows:
        cells = [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
        yield "  " + "  ".join([first.ljust(widths[0]), *cells])
    if not known["documents_counted"]:
        yield (
            "  not counted: what telling documents apart takes, up to a memory state before each "
            "chunk and masks of each row"
        )
    yield f"  most sequences of {config.data.sequence_length:,} tokens in a micro-batch:"
    yield "    " + ", ".join(
        f"{gpu}: {most or 'none'}" for gpu, most in known["largest_micro_batch"].items()
    )


def _name(term: str, *, checkpointed: bool) -> str:
    if term == "kept":
        return "blocks' inputs" if checkpointed else "kept by other blocks"
    return NAMES.get(term, term)


def _gib(count: int) -> str:
    return f"{count / GIB:.2f}" if count else "-"
