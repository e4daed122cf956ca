"""The neural long-term memory in its dual form: matrix products only, exact per token.

A memory is an MLP whose weights change at every token (paper Eq. 8-15). The scan goes from chunk to
chunk (``memory_chunk.py``); ``memory_reference.py`` is the same function token by token.

Shapes: B batch, H heads, T time, d head width; weights are (B, H, out, in).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .memory_chunk import (
    MemoryState,
    Resets,
    Rule,
    Tokens,
    chunk_step,
    flatten,
    state_dtype,
    unflatten,
)

__all__ = ["MemoryState", "Resets", "memory_scan"]


def memory_scan(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    forget: Tensor,
    momentum: Tensor,
    step: Tensor,
    state: MemoryState,
    *,
    chunk_size: int,
    activation: str = "gelu",
    residual: bool = True,
    surprise_clip: float | None = None,
    resets: Resets | None = None,
) -> tuple[Tensor, MemoryState]:
    """Write every token into the memory and read it back with the token's own write included.

    Chunks are recomputed in backward: what a training step keeps is its inputs and the state at
    the start of each chunk. Calls that split a sequence at chunk boundaries and hand the state on
    give the same result as one call.

    Args:
        queries, keys, values: (B, H, T, d).
        forget, momentum, step: alpha, eta and theta of Eq. 13-14, each (B, H, T).
        state: the state before the first token; expanded views are welcome.
        chunk_size: tokens per chunk; may exceed T, and the last chunk may be shorter.
        activation: ``"gelu"`` (exact) or ``"silu"``, between the memory's layers.
        residual: M(x) = x + f(x) instead of f(x).
        surprise_clip: bound on the norm of one token's surprise per layer, None for the bare rule.
        resets: documents that begin inside; a chunk with one costs up to twice the products.

    Returns:
        The reads (B, H, T, d) in the queries' dtype, and the state after the last token, in
        float32, or float64 when the inputs are.

    Raises:
        ValueError: a chunk size below 1, an unknown activation, or shapes that do not fit.
    """
    tokens = Tokens(queries, keys, values, forget, momentum, step)
    rule = Rule(activation, residual, surprise_clip)
    check(tokens, state, chunk_size, rule, resets)
    dtype = state_dtype(queries)
    state = _cast(state, dtype)
    if resets is not None:
        resets = Resets(resets.first.cpu(), _cast(resets.state, dtype))
    flat = (*tokens, *flatten(state), *([] if resets is None else flatten(resets.state)))
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in flat):
        first = None if resets is None else resets.first
        reads, *final = _RecomputedScan.apply(rule, chunk_size, first, *flat)
        return reads, unflatten(final)
    reads, final_state, _ = _scan(tokens, state, chunk_size, rule, resets, keep_starts=False)
    return reads, final_state


def _cast(state: MemoryState, dtype: torch.dtype) -> MemoryState:
    return MemoryState(
        tuple(w.to(dtype) for w in state.weights), tuple(s.to(dtype) for s in state.momentum)
    )


def check(
    tokens: Tokens, state: MemoryState, chunk_size: int, rule: Rule, resets: Resets | None = None
) -> None:
    """Raise ValueError where arguments of a scan do not fit together."""
    shape = tokens.queries.shape
    if chunk_size < 1:
        raise ValueError(f"chunk_size {chunk_size} is below 1")
    if rule.activation not in ("gelu", "silu"):
        raise ValueError(f"activation {rule.activation!r} is neither 'gelu' nor 'silu'")
    for name, tensor in tokens._asdict().items():
        expected = shape if name in ("queries", "keys", "values") else shape[:3]
        if tensor.shape != expected:
            raise ValueError(f"{name} is {tuple(tensor.shape)}, expected {tuple(expected)}")
    if not state.weights or len(state.weights) != len(state.momentum):
        raise ValueError("state needs weights and momentum for at least one layer, of equal number")
    width = shape[-1]
    for w, s in zip(state.weights, state.momentum, strict=True):
        if w.shape != s.shape or w.shape[:2] != shape[:2] or w.shape[-1] != width:
            raise ValueError(
                f"weights {tuple(w.shape)} and momentum {tuple(s.shape)} do not continue a layer "
                f"of width {width} for batch and heads {tuple(shape[:2])}"
            )
        width = w.shape[-2]
    if width != shape[-1]:
        raise ValueError(f"the last layer gives width {width}, expected {shape[-1]}")
    if resets is None:
        return
    if resets.first.dtype != torch.bool or resets.first.shape != (shape[0], shape[2]):
        raise ValueError(
            f"first tokens are {resets.first.dtype} {tuple(resets.first.shape)}, expected "
            f"{torch.bool} {(shape[0], shape[2])}"
        )
    shapes, expected_shapes = (
        [tuple(tensor.shape) for tensor in flatten(one)] for one in (resets.state, state)
    )
    if shapes != expected_shapes:
        raise ValueError(f"the state of resets is {shapes}, expected {expected_shapes}")


def _scan(
    tokens: Tokens,
    state: MemoryState,
    chunk_size: int,
    rule: Rule,
    resets: Resets | None,
    *,
    keep_starts: bool,
) -> tuple[Tensor, MemoryState, list[Tensor]]:
    """The loop over chunks; ``keep_starts`` collects the state before each."""
    reads: list[Tensor] = []
    starts: list[Tensor] = []
    for first in range(0, tokens.queries.shape[2], chunk_size):
        if keep_starts:
            starts += flatten(state)
        part = tokens.at(first, first + chunk_size)
        begun = _within(resets, first, first + chunk_size, part.queries.device)
        read, state = chunk_step(part, state.weights, state, rule, resets=begun)
        reads.append(read)
    joined = torch.cat(reads, 2) if reads else torch.zeros_like(tokens.queries)
    return joined, state, starts


def _within(resets: Resets | None, first: int, last: int, device: torch.device) -> Resets | None:
    """The resets of a chunk, or None where no row has one."""
    if resets is None or not bool(resets.first[:, first:last].any()):
        return None
    part = resets.at(first, last)
    return part._replace(first=part.first.to(device, non_blocking=True))


class _RecomputedScan(torch.autograd.Function):
    """The scan, keeping only chunk-start states and recomputing each chunk in backward.

    ``flat`` holds tokens, the first state, and the state of resets where ``first`` is given.
    """

    @staticmethod
    def forward(
        ctx: Any, rule: Rule, chunk_size: int, first: Tensor | None, *flat: Tensor
    ) -> tuple[Tensor, ...]:
        size = (len(flat) - 6) // (1 if first is None else 2)
        tokens, state, begun = Tokens(*flat[:6]), unflatten(flat[6 : 6 + size]), flat[6 + size :]
        resets = None if first is None else Resets(first, unflatten(begun))
        reads, final, starts = _scan(tokens, state, chunk_size, rule, resets, keep_starts=True)
        ctx.rule, ctx.chunk_size, ctx.first, ctx.size = rule, chunk_size, first, size
        ctx.save_for_backward(*tokens, *begun, *starts)
        # a returned input would be taken for a view of it: with no token the state is one
        fresh = [tensor if starts else tensor.clone() for tensor in flatten(final)]
        return reads, *fresh

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # grad mode is on here only under create_graph, and the recomputed chunks are cut off
        if torch.is_grad_enabled():
            raise RuntimeError("memory_scan has no second derivative; memory_reference has")
        # checkpointing unpacks a saved tensor once
        saved, size, resets = ctx.saved_tensors, ctx.size, None
        tokens, starts = Tokens(*saved[:6]), saved[6:]
        if ctx.first is not None:
            resets, starts = Resets(ctx.first, unflatten(starts[:size])), starts[size:]
        read_grad, state_grads = grads[0], list(grads[1:])
        begun_grads = [] if resets is None else [torch.zeros_like(t) for t in saved[6 : 6 + size]]
        parts = []
        for chunk in reversed(range(len(starts) // size)):
            first, last = chunk * ctx.chunk_size, (chunk + 1) * ctx.chunk_size
            state = unflatten(starts[chunk * size : (chunk + 1) * size])
            begun = _within(resets, first, last, read_grad.device)
            pulled = _chunk_backward(
                tokens.at(first, last),
                state,
                begun,
                (read_grad[:, :, first:last], *state_grads),
                ctx.rule,
            )
            parts.append(pulled[:6])
            state_grads = pulled[6 : 6 + size]
            for total, gradient in zip(begun_grads, pulled[6 + size :], strict=begun is not None):
                total += gradient
        joined = [torch.cat(part[::-1], 2) for part in zip(*parts, strict=True)] or [
            torch.zeros_like(tensor) for tensor in tokens
        ]
        return None, None, None, *joined, *state_grads, *begun_grads


def _chunk_backward(
    tokens: Tokens,
    state: MemoryState,
    resets: Resets | None,
    grads: Sequence[Tensor],
    rule: Rule,
) -> list[Tensor]:
    """Recompute one chunk and pull gradients through it: to tokens, first state and resets'."""
    size = 2 * len(state.weights)
    inputs = [*tokens, *flatten(state), *([] if resets is None else flatten(resets.state))]
    device = inputs[0].device.type
    with torch.enable_grad(), torch.autocast(device_type=device, enabled=False):
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        state = unflatten(leaves[6 : 6 + size])
        if resets is not None:
            resets = resets._replace(state=unflatten(leaves[6 + size :]))
        read, final = chunk_step(Tokens(*leaves[:6]), state.weights, state, rule, resets=resets)
        pulled = torch.autograd.grad(
            (read, *flatten(final)), leaves, grads, allow_unused=True, materialize_grads=True
        )
    return list(pulled)
