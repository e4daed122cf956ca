"""Attention: sliding window or full over a stream, and over the segments of MAC.

Shapes: B batch, H heads, T time (or N slots), h head width, P persistent tokens.
"""

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention_blocks import continue_window, with_prefix
from .attention_flex import attend_window
from .boundary import WHOLE, Boundary
from .configuration_titans import TitansConfig
from .documents import Documents, Stretch
from .fields import rotated_width
from .layers import rotate, split_heads
from .layout import Layout


class AttentionProjections(nn.Module):
    """Queries, keys and values of an attention, rotated by position."""

    def __init__(self, config: TitansConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.head_width = width // config.num_attention_heads
        self.rotated = rotated_width(self.head_width, config.partial_rotary_factor)
        self.theta = config.rope_theta
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)

    def queries(self, x: Tensor, positions: Tensor) -> Tensor:
        """(B, T, D) to rotated queries (B, H, T, h)."""
        heads = split_heads(self.q_proj(x), self.head_width)
        return rotate(heads, positions, self.rotated, self.theta)

    def keys_values(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, D) to rotated keys and values, each (B, H, T, h)."""
        keys = split_heads(self.k_proj(x), self.head_width)
        values = split_heads(self.v_proj(x), self.head_width)
        return rotate(keys, positions, self.rotated, self.theta), values

    def prefix(self, persistent: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (1, H, P, h) of tokens without position: only unrotated parts count."""
        keys = split_heads(self.k_proj(persistent), self.head_width)
        values = split_heads(self.v_proj(persistent), self.head_width)
        return F.pad(keys[..., self.rotated :], (self.rotated, 0)), values


class WindowAttention(nn.Module):
    """Causal attention over the last ``window`` tokens, over all of them if None."""

    def __init__(self, config: TitansConfig, window: int | None) -> None:
        super().__init__()
        self.project = AttentionProjections(config)
        self.window = window
        self.across_documents = config.attend_across_documents
        self.boundary: Boundary = WHOLE

    def forward(
        self,
        x: Tensor,
        persistent: Tensor | None = None,
        layout: Layout | None = None,
        cached: dict[str, Tensor] | None = None,
        documents: Documents | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Attend.

        Args:
            x: (B, T, D).
            persistent: (1, P, D) tokens every row sees, or None.
            layout: the slots when decoding or padded.
            cached: ``keys`` and ``values`` (B, M, H, h) of what the rows saw last, or empty.
            documents: of the rows, without a layout; None for one a row.

        Returns:
            Heads (B, H, T, h), and the cache afterwards (empty without a layout).
        """
        if layout is None:
            return self._span(x, persistent, None if self.across_documents else documents), {}
        positions = layout.positions
        queries = self.project.queries(x, positions)
        keys, values = self.project.keys_values(x, positions)
        prefix = None if persistent is None else self.project.prefix(persistent)
        return continue_window(queries, keys, values, layout, cached or {}, self.window, prefix)

    def _span(self, x: Tensor, persistent: Tensor | None, documents: Documents | None) -> Tensor:
        """Sequences, or spans of them, without pads."""
        first = self.boundary.first(x.shape[1])
        positions = torch.arange(first, first + x.shape[1], device=x.device)
        queries = self.project.queries(x, positions)
        keys, values = self.project.keys_values(x, positions)
        if self.window is None:
            rows = None if documents is None else documents.stretches(self.boundary, x.device)
            attend = _causal if rows is None else functools.partial(_causal_within, rows)
            return self.boundary.whole(attend, queries, keys, values)
        prefix = None if persistent is None else self.project.prefix(persistent)
        own, before = self.boundary.halo(self.window - 1, (keys, values), dim=2)
        keys, values = (torch.cat(pair, 2) for pair in zip(before, own, strict=True))
        reach = None if documents is None else documents.bounds(self.boundary, x.device).reach
        return attend_window(queries, keys, values, self.window, prefix=prefix, reach=reach)


def _causal(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(queries, keys, values, is_causal=True)


def _causal_within(
    rows: Sequence[Sequence[Stretch]], queries: Tensor, keys: Tensor, values: Tensor
) -> Tensor:
    """Causal attention within the stretches of each row."""
    outputs = []
    for stretches, *row in zip(rows, *(x.split(1) for x in (queries, keys, values)), strict=True):
        # split, not slices: the gradients of these would each be as long as the row
        cut = (x.split([stretch.tokens for stretch in stretches], 2) for x in row)
        parts = [
            F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
            for (_, mask), q, k, v in zip(stretches, *cut, strict=True)
        ]
        outputs.append(torch.cat(parts, 2))
    return torch.cat(outputs)


class SegmentAttention(nn.Module):
    """MAC's attention: full causal inside a segment, over persistent, read and own tokens.

    Token i sees the memory's read for token j only for j <= i; the paper's figure shows all of
    them, which would let a token see the future.
    """

    def __init__(self, config: TitansConfig) -> None:
        super().__init__()
        self.project = AttentionProjections(config)

    def attend(
        self,
        queries: Tensor,
        reads: tuple[Tensor, Tensor],
        tokens: tuple[Tensor, Tensor],
        prefix: tuple[Tensor, Tensor] | None,
        cells: Tensor,
        reach: Tensor | None = None,
    ) -> Tensor:
        """Attend within one segment.

        Args:
            queries: (B, H, n, h).
            reads: keys and values (B, H, c, h) of what the memory returned for cell 0..c-1.
            tokens: keys and values (B, H, c, h) of the segment's tokens.
            prefix: keys and values (1, H, P, h) of the persistent tokens, or None.
            cells: (n,) or (B, n), the cell of each query.
            reach: (B, n), how many cells before its own a query sees at most, None for no bound.

        Returns:
            Heads (B, H, n, h).
        """
        reached = torch.arange(tokens[0].shape[2], device=cells.device)
        seen = reached <= cells[..., None]
        if reach is not None:
            seen = seen & (reached >= (cells - reach)[..., None])
        seen = seen[:, None] if seen.dim() == 3 else seen[None, None]
        mask = torch.cat([seen, seen], -1)
        keys, values = (torch.cat(pair, 2) for pair in zip(reads, tokens, strict=True))
        if prefix is not None:
            keys, values, mask = with_prefix(keys, values, mask, prefix)
        return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
