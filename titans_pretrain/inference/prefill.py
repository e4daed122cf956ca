"""Long texts through a Titans model, in pieces and at constant memory."""

from typing import Any

from titans_pretrain.errors import UserError

PIECE = 4096  # tokens read at once


def prefill(model: Any, ids: Any, cache: Any, *, piece: int = PIECE) -> None:
    """Read tokens into a cache at constant memory, a piece in parallel; pieces end at multiples.

    Args:
        model: a Titans model.
        ids: (B, T) tokens without pads, of rows that stand at the same position; T may be 0.
        cache: a TitansCache, which is changed.
        piece: tokens of a call.
    """
    position = int(cache.position(ids.shape[0], ids.device)[0])
    first = 0
    while first < ids.shape[1]:
        last = first + piece - (position + first) % piece
        model(input_ids=ids[:, first:last], past_key_values=cache, use_cache=True, logits_to_keep=1)
        first = last


def new_cache(model: Any) -> Any:
    """An empty TitansCache."""
    from titans_pretrain.model.cache import TitansCache

    return TitansCache(model.config)


def is_titans(model: Any) -> bool:
    """Whether a model is of this project's kind, the Transformer++ baseline included."""
    return model.config.model_type == "titans"


def check_memory(model: Any, where: str) -> None:
    """Refuse a model that has no neural memory."""
    from titans_pretrain.model.fields import WITH_MEMORY

    if not is_titans(model) or model.config.variant not in WITH_MEMORY:
        kind = model.config.variant if is_titans(model) else model.config.model_type
        raise UserError(
            f"a {kind} model has no neural memory",
            where=where,
            fix=f"use a Titans model: {', '.join(sorted(WITH_MEMORY))}",
        )
