"""The neural long-term memory in its dual form: matrix products only, exact per token.

A memory is an MLP whose weights change at every token (paper Eq. 8-15). The scan goes from chunk to
chunk (``memory_chunk.py``); ``memory_reference.py`` is the same function token by token.

Shapes: B batch, H heads, T time, d head width; weights are (B, H, out, in).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .memory_blocks import stack, unstack, widths_of
from .memory_chunk import (
    MemoryState,
    Resets,
    Rule,
    Tokens,
    chunk_step,
    exact,
    flatten,
    state_dtype,
    unflatten,
)
from .memory_stretch import Form, Stretch, scan_stretch, scan_stretch_backward

__all__ = ["MemoryState", "Resets", "memory_scan"]

STRETCH = 256  # tokens, or one chunk: between two of the states that are kept for backward


@exact
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

    Stretches of chunks are recomputed in backward: what a training step keeps is its inputs and the
    state before each. Calls that split a sequence at chunk boundaries and hand the state on
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
    reads, final, _ = _scan(tokens, state, chunk_size, rule, resets, keep_starts=False)
    return reads, unflatten(final)


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


class _Part(NamedTuple):
    """Tokens [first, end) of a scan: a stretch of whole chunks, or one chunk with resets."""

    first: int
    end: int
    resets: Resets | None


def _parts(time: int, chunk_size: int, resets: Resets | None, device: torch.device) -> list[_Part]:
    """The scan's parts in order."""
    parts: list[_Part] = []
    open_until = 0
    for first in range(0, time, chunk_size):
        end = min(first + chunk_size, time)
        begun = _within(resets, first, end, device)
        if begun is None and parts and parts[-1].resets is None and end <= open_until:
            parts[-1] = parts[-1]._replace(end=end)
            continue
        open_until = first + STRETCH
        parts.append(_Part(first, end, begun))
    return parts


def _within(resets: Resets | None, first: int, last: int, device: torch.device) -> Resets | None:
    """The resets of a chunk, or None where no row has one."""
    if resets is None or not bool(resets.first[:, first:last].any()):
        return None
    part = resets.at(first, last)
    return part._replace(first=part.first.to(device, non_blocking=True))


def _scan(
    tokens: Tokens,
    state: MemoryState,
    chunk_size: int,
    rule: Rule,
    resets: Resets | None,
    *,
    keep_starts: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The loop over parts; ``keep_starts`` collects the running state before each."""
    batch, _, time, _ = tokens.queries.shape
    reads = torch.empty_like(tokens.queries, memory_format=torch.contiguous_format)
    running, dtype = stack(*state), state.weights[0].dtype
    form = Form(widths_of(state.weights), rule, chunk_size)
    starts: list[Tensor] = []
    for first, end, begun in _parts(time, chunk_size, resets, reads.device):
        if keep_starts:
            starts += running
        part = tokens.at(first, end)
        if begun is None:
            read, running = scan_stretch(Stretch.of(part, dtype), running, form)
            reads[:, :, first:end] = read.unflatten(0, (batch, -1))
        else:
            before = unflatten(unstack(running, form.widths, batch))
            reads[:, :, first:end], after = chunk_step(
                part, before.weights, before, rule, resets=begun
            )
            running = stack(*after)
    return reads, unstack(running, form.widths, batch), starts


class _RecomputedScan(torch.autograd.Function):
    """The scan, keeping only the state before each part and recomputing the part in backward.

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
        return reads, *final

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # grad mode is on here only under create_graph, and the recomputed parts are cut off
        if torch.is_grad_enabled():
            raise RuntimeError("memory_scan has no second derivative; memory_reference has")
        with torch.autocast(device_type=grads[0].device.type, enabled=False):
            return _RecomputedScan.pull(ctx, grads)

    @staticmethod
    def pull(ctx: Any, grads: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
        """The gradients of all that ``forward`` took."""
        # checkpointing unpacks a saved tensor once
        saved, size, depth = ctx.saved_tensors, ctx.size, ctx.size // 2
        tokens, starts, resets = Tokens(*saved[:6]), saved[6:], None
        if ctx.first is not None:
            resets, starts = Resets(ctx.first, unflatten(starts[:size])), starts[size:]
        begun_grads = [] if resets is None else [torch.zeros_like(t) for t in saved[6 : 6 + size]]
        token_grads = Tokens(*(torch.empty_like(x) for x in tokens))
        batch, _, time, _ = tokens.queries.shape
        after_grads, dtype = unflatten(grads[1:]), grads[1].dtype
        form = Form(widths_of(after_grads.weights), ctx.rule, ctx.chunk_size)
        running = stack(*after_grads)
        parts = _parts(time, ctx.chunk_size, resets, tokens.queries.device)
        for number, (first, end, begun) in reversed(list(enumerate(parts))):
            start = starts[number * depth : (number + 1) * depth]
            part, read_grad = tokens.at(first, end), grads[0][:, :, first:end]
            if begun is None:
                pulled, running = scan_stretch_backward(
                    Stretch.of(part, dtype), start, form, read_grad.to(dtype).flatten(0, 1), running
                )
                own = pulled.tokens(batch)
            else:
                before, after = (unstack(x, form.widths, batch) for x in (start, running))
                found = _chunk_backward(
                    part, unflatten(before), begun, (read_grad, *after), ctx.rule
                )
                own, running = Tokens(*found[:6]), stack(*unflatten(found[6 : 6 + size]))
                for total, gradient in zip(begun_grads, found[6 + size :], strict=True):
                    total += gradient
            for total, gradient in zip(token_grads, own, strict=True):
                total[:, :, first:end] = gradient
        state_grads = unstack(running, form.widths, batch)
        return None, None, None, *token_grads, *state_grads, *begun_grads


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
