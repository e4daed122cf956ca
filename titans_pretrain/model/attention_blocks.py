"""Windowed attention by blocks of queries, whole or continued from the keys a row saw last.

Shapes: B batch, H heads, N slots, h head width, P persistent tokens.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .layout import Layout, join, newest

_KV = ("keys", "values")


def continue_window(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    layout: Layout,
    cached: dict[str, Tensor],
    window: int | None,
    prefix: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Attention of slots over what the rows saw last and each other.

    Args:
        queries, keys, values: (B, H, N, h) of the slots.
        layout: the slots.
        cached: ``keys`` and ``values`` (B, M, H, h) of what the rows saw last, or empty.
        window: tokens in reach, None for all.
        prefix: keys and values (1, H, P, h) visible to all.

    Returns:
        Heads (B, H, N, h), and the cache afterwards, of at most ``window - 1`` tokens.
    """
    by_time = [keys.transpose(1, 2), values.transpose(1, 2)]
    history = [cached.get(name, tensor[:, :0]) for name, tensor in zip(_KV, by_time, strict=True)]
    joined = [join(old, new, layout) for old, new in zip(history, by_time, strict=True)]
    length = history[0].shape[1]
    known = layout.lead + length - layout.position.clamp(max=length)
    seen = length + layout.valid.shape[1]
    kept = seen if window is None else min(window - 1, seen)
    after = {
        name: newest(_widen(tensor, kept, layout), kept, layout)
        for name, tensor in zip(_KV, joined, strict=True)
    }
    all_keys, all_values = (tensor.transpose(1, 2) for tensor in joined)
    heads = by_blocks(queries, all_keys, all_values, window, prefix=prefix, known=known)
    return heads, after


def by_blocks(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    window: int | None,
    *,
    prefix: tuple[Tensor, Tensor] | None = None,
    known: Tensor | None = None,
    reach: Tensor | None = None,
) -> Tensor:
    """Causal attention by blocks of queries, each with only the keys its window reaches.

    Args:
        queries: (B, H, N, h).
        keys, values: (B, H, M + N, h), those of slot i at M + i.
        window: tokens in reach, None for all.
        prefix: keys and values (1, H, P, h) visible to all.
        known: (B,) first index along M + N that holds a token, None when all do.
        reach: (B, N), how many keys before its own a query sees at most, None for no bound.
    """
    slots, total = queries.shape[2], keys.shape[2]
    past = total - slots
    size = slots if window is None else min(window, slots)
    outputs = []
    for first in range(0, slots, max(size, 1)):
        last = min(first + size, slots)
        low = 0 if window is None else max(0, past + first - window + 1)
        high = past + last
        mask = _mask(queries, past + first, past + last, low, high, window, known)
        if reach is not None:
            mask = mask & _near(reach[:, first:last], past + first, low, high)
        block_keys, block_values = keys[:, :, low:high], values[:, :, low:high]
        if prefix is not None:
            block_keys, block_values, mask = with_prefix(block_keys, block_values, mask, prefix)
        outputs.append(
            F.scaled_dot_product_attention(
                queries[:, :, first:last], block_keys, block_values, attn_mask=mask
            )
        )
    return torch.cat(outputs, 2)


def with_prefix(
    keys: Tensor, values: Tensor, mask: Tensor, prefix: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values (B, H, M, h) and mask (., ., N, M) with tokens in front that all see."""
    batch = keys.shape[0]
    prefix_keys, prefix_values = (tensor.expand(batch, -1, -1, -1) for tensor in prefix)
    return (
        torch.cat([prefix_keys, keys], 2),
        torch.cat([prefix_values, values], 2),
        F.pad(mask, (prefix_keys.shape[2], 0), value=True),
    )


def _widen(joined: Tensor, length: int, layout: Layout) -> Tensor:
    """Zeros in front, so that rows shorter than ``length`` have that many entries."""
    missing = length - (joined.shape[1] - layout.valid.shape[1])
    if missing <= 0:
        return joined
    return F.pad(joined, (0, 0) * (joined.dim() - 2) + (missing, 0))


def _mask(
    like: Tensor,
    first: int,
    last: int,
    low: int,
    high: int,
    window: int | None,
    known: Tensor | None,
) -> Tensor:
    """Bool (B or 1, 1, queries, keys): which of keys [low, high) queries [first, last) see."""
    rows = torch.arange(first, last, device=like.device)[:, None]
    columns = torch.arange(low, high, device=like.device)[None, :]
    seen = columns <= rows
    if window is not None:
        seen = seen & (columns > rows - window)
    if known is None:
        return seen[None, None]
    # a slot without a token sees itself: a row of no keys at all would be undefined
    real = (columns >= known[:, None])[:, None, None, :] | (columns == rows)
    return seen & real


def _near(reach: Tensor, first: int, low: int, high: int) -> Tensor:
    """Bool (B, 1, queries, keys): which of keys [low, high) are in reach of queries from first."""
    queries = torch.arange(first, first + reach.shape[1], device=reach.device)
    columns = torch.arange(low, high, device=reach.device)
    return (columns >= (queries - reach)[..., None])[:, None]
