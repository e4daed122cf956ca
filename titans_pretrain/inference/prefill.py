"""Long texts through a model of this project, in pieces and at constant memory."""

from collections.abc import Mapping
from typing import Any

from titans_pretrain.errors import UserError

PIECE = 4096  # tokens read at once
OWN = ("titans", "titans_baseline")  # model_types of this project


def prefill(model: Any, ids: Any, cache: Any, *, piece: int = PIECE) -> None:
    """Read tokens into a cache at constant memory, a piece in parallel; pieces end at multiples.

    Args:
        model: a Titans model, or a baseline of this project.
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


def continues(model: Any) -> bool:
    """Whether a model goes on from a TitansCache: all of this project do, baselines included."""
    return model.config.model_type in OWN


def check_memory(settings: Mapping[str, Any], where: str) -> None:
    """Refuse a model that has no neural memory, before any of it is loaded.

    Args:
        settings: its ``config.json``.
        where: its directory.

    Raises:
        UserError: it has none.
    """
    from titans_pretrain.model.fields import WITH_MEMORY, defaults

    kind, is_titans = settings.get("model_type"), settings.get("model_type") == "titans"
    if is_titans:
        kind = settings.get("variant", defaults()["variant"])
    if not is_titans or kind not in WITH_MEMORY:
        raise UserError(
            f"a {kind} model has no neural memory",
            where=where,
            fix=f"use a Titans model: {', '.join(sorted(WITH_MEMORY))}",
        )
