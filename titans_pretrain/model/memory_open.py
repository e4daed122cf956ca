"""The memory scan over chunks that begin or end inside a call: decoding, padding, prefill in parts.

An open chunk is one whose later tokens have not come yet. Its surprise is still taken at the
weights it began with, so besides the running state those weights are kept, per row.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .layout import Layout, choose
from .memory_chunk import MemoryState, Rule, Tokens, chunk_step, state_dtype


class OpenMemory(NamedTuple):
    """A memory at any token.

    Attributes:
        anchor: weights at the start of the row's open chunk; the running weights at a boundary.
        state: the running state.
    """

    anchor: tuple[Tensor, ...]
    state: MemoryState

    def pack(self, prefix: str) -> dict[str, Tensor]:
        """As named tensors with the batch first, for a cache."""
        groups = {"anchor": self.anchor, "weights": self.state.weights}
        groups["momentum"] = self.state.momentum
        return {
            f"{prefix}.{group}.{layer}": tensor
            for group, tensors in groups.items()
            for layer, tensor in enumerate(tensors)
        }

    @classmethod
    def unpack(cls, tensors: dict[str, Tensor], prefix: str, depth: int) -> "OpenMemory":
        """The inverse of ``pack``."""
        anchor, weights, momentum = (
            tuple(tensors[f"{prefix}.{group}.{layer}"] for layer in range(depth))
            for group in ("anchor", "weights", "momentum")
        )
        return cls(anchor, MemoryState(weights, momentum))


def scan_open(
    tokens: Tokens, memory: OpenMemory, layout: Layout, chunk_size: int, rule: Rule
) -> tuple[Tensor, OpenMemory]:
    """``memory_scan`` for rows that stand anywhere in a chunk; slots without a token are no-ops.

    Args:
        tokens: slots (B, H, N, d) and gates (B, H, N).
        memory: each row's memory before its first token.
        layout: which slots hold tokens, and where each row stands on the chunk grid.
        chunk_size: tokens per chunk.
        rule: activation, residual and clip.

    Returns:
        Reads (B, H, N, d), any value in slots without a token, and the memory afterwards.
    """
    dtype = state_dtype(tokens.queries)
    anchor = tuple(w.to(dtype) for w in memory.anchor)
    state = MemoryState(
        tuple(w.to(dtype) for w in memory.state.weights),
        tuple(s.to(dtype) for s in memory.state.momentum),
    )
    opened, closing = layout.start // chunk_size, layout.end // chunk_size
    kept = anchor
    reads = []
    slots = tokens.queries.shape[2]
    alone = slots == 1
    for chunk, first in enumerate(range(0, slots, chunk_size)):
        fresh = torch.zeros_like(opened, dtype=torch.bool) if alone else opened < chunk
        begun = _choose_all(fresh, state.weights, anchor)
        kept = _choose_all(fresh & (closing == chunk), state.weights, kept)
        valid = layout.valid[:, first : first + chunk_size]
        part = tokens.at(first, first + chunk_size)
        read, state = chunk_step(part, begun, state, rule, valid)
        reads.append(read)
    boundary = (layout.end % chunk_size == 0) & (closing > opened)
    kept = _choose_all(boundary, state.weights, kept)
    return torch.cat(reads, 2), OpenMemory(kept, state)


def _choose_all(row: Tensor, yes: tuple[Tensor, ...], no: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(choose(row, y, n) for y, n in zip(yes, no, strict=True))
