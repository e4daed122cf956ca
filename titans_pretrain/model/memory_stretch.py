"""Stretches of the scan, a few chunks each, in which no document begins.

Backward keeps nothing of a stretch but its inputs and the state before it: all else is computed
again. What does not depend on the state is computed for the whole stretch at once.

Shapes: B batch, H heads, N = B H, t tokens of a stretch, n blocks of b tokens.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .memory_blocks import (
    Block,
    Shares,
    Stacked,
    Surprise,
    Widths,
    read_and_write,
    read_and_write_backward,
    surprise,
    surprise_backward,
)
from .memory_chunk import Rule, Tokens
from .memory_coefficients import BLOCK, coefficients


class Stretch(NamedTuple):
    """Inputs of a stretch, in the state's precision.

    Attributes:
        queries, keys, values: (N, t, d).
        gates: forget, momentum and step (3, N, t).
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    gates: Tensor

    @classmethod
    def of(cls, tokens: Tokens, dtype: torch.dtype) -> "Stretch":
        """From tokens (B, H, t, d) and gates (B, H, t)."""
        flat = [tensor.to(dtype).flatten(0, 1) for tensor in tokens]
        return cls(flat[0], flat[1], flat[2], torch.stack(flat[3:]))

    def tokens(self, batch: int) -> Tokens:
        """The inverse of ``of``."""
        flat = (self.queries, self.keys, self.values, *self.gates)
        return Tokens(*(tensor.unflatten(0, (batch, -1)) for tensor in flat))

    def wrong(self, rule: Rule) -> Tensor:
        """Twice what a memory of zeros is off by, at every key."""
        return 2 * (self.keys - self.values) if rule.residual else -2 * self.values


class Form(NamedTuple):
    """What is fixed about a scan: widths (out, in) of the memory's layers, rule and chunk size."""

    widths: Widths
    rule: Rule
    chunk_size: int

    def chunks(self, tokens: int) -> list[range]:
        """The tokens of each chunk of a stretch; the last may be shorter."""
        size = self.chunk_size
        return [range(first, min(first + size, tokens)) for first in range(0, tokens, size)]


def blocks(chunk: range) -> list[range]:
    """The tokens of each block of a chunk."""
    return [range(first, min(first + BLOCK, chunk.stop)) for first in chunk[::BLOCK]]


def scan_stretch(stretch: Stretch, state: Stacked, form: Form) -> tuple[Tensor, list[Tensor]]:
    """The reads (N, t, d), and the state after the stretch."""
    walk = _Walk(stretch, form)
    reads = torch.empty_like(stretch.queries, memory_format=torch.contiguous_format)
    for chunk in form.chunks(reads.shape[1]):
        found = walk.surprise(chunk, state)
        for block in blocks(chunk):
            read, state, _ = walk.block(found, chunk, block, state)
            reads[:, block.start : block.stop] = read
    return reads.add_(stretch.queries) if form.rule.residual else reads, list(state)


def scan_stretch_backward(
    stretch: Stretch, state: Stacked, form: Form, read_grads: Tensor, state_grads: list[Tensor]
) -> tuple[Stretch, list[Tensor]]:
    """Pull gradients through ``scan_stretch``.

    Args:
        stretch, state, form: what it took.
        read_grads: (N, t, d), of the reads.
        state_grads: of the state after the stretch.

    Returns:
        Gradients of the stretch and of the state before it.
    """
    walk, time = _Walk(stretch, form, with_gradient=True), stretch.keys.shape[1]
    queries, keys, wrong = (
        torch.empty_like(stretch.keys, memory_format=torch.contiguous_format) for _ in range(3)
    )
    trail: list[tuple[range, Surprise, list[Block]]] = []
    for chunk in form.chunks(time):
        trail.append((chunk, walk.surprise(chunk, state), []))
        for block in blocks(chunk):
            more = block.stop < time
            _, state, kept = walk.block(trail[-1][1], chunk, block, state, write=more)
            trail[-1][2].append(kept)
    while trail:
        chunk, found, own = trail.pop()
        before = own[0].state
        grads = _ChunkGrads.of(found)
        for block in blocks(chunk)[::-1]:
            span = slice(block.start, block.stop)
            queries[:, span], state_grads = walk.block_backward(
                own.pop(), found, grads, chunk, block, read_grads[:, span], state_grads
            )
        span = slice(chunk.start, chunk.stop)
        keys[:, span], wrong[:, span] = surprise_backward(
            found, before, form.widths, *grads, state_grads, form.rule
        )
    if form.rule.residual:
        queries += read_grads
        keys.add_(wrong, alpha=2)
    return Stretch(queries, keys, wrong.mul_(-2), walk.gates_grad()), state_grads


class _ChunkGrads(NamedTuple):
    """Gradients of a chunk's inputs and errors, by layer, and of clips' factors, to be filled."""

    inputs: list[Tensor]
    errors: list[Tensor]
    factors: Tensor | None

    @classmethod
    def of(cls, found: Surprise) -> "_ChunkGrads":
        inputs, errors = (
            [torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors]
            for tensors in (found.inputs, found.errors)
        )
        return cls(
            inputs, errors, None if found.factors is None else torch.empty_like(found.factors)
        )


class _Walk:
    """Steps over the chunks and blocks of a stretch, forth and, if asked for, back.

    Args:
        stretch: its inputs.
        form: of the scan.
        with_gradient: whether there will be steps back.
    """

    def __init__(self, stretch: Stretch, form: Form, *, with_gradient: bool = False) -> None:
        self._stretch, self._form = stretch, form
        self._wrong = stretch.wrong(form.rule)
        self._gates = stretch.gates.detach().requires_grad_(with_gradient)
        spans = [block for chunk in form.chunks(self._wrong.shape[1]) for block in blocks(chunk)]
        self._groups: list[tuple[list[range], Shares]] = []
        self._shares: dict[range, Shares] = {}
        self._grads: dict[range, Shares] = {}
        for length in dict.fromkeys(map(len, spans)):
            group = [span for span in spans if len(span) == length]
            with torch.set_grad_enabled(with_gradient):
                shares = self._computed(group)
            self._groups.append((group, shares))
            apart = zip(*(x.detach().unbind(1) for x in shares), strict=True)
            self._shares |= dict(zip(group, (Shares(*one) for one in apart), strict=True))

    def _computed(self, spans: Sequence[range]) -> Shares:
        """The shares (N, n, ...) of blocks of equal length."""
        gates = torch.stack([self._gates[..., span.start : span.stop] for span in spans], 2)
        forget, momentum, step = gates
        found = coefficients(forget, momentum, step, None)
        carried, surprise = found.carried, -found.surprise
        return Shares(
            torch.stack((carried.weights, carried.momentum), -1),
            torch.stack(
                (carried.weights[..., -1], carried.momentum[..., -1], carried.last_momentum), -1
            ),
            surprise,
            torch.stack((surprise[..., -1, :], -found.last_surprise), -1),
        )

    def surprise(self, chunk: range, state: Stacked) -> Surprise:
        """The surprises of a chunk that begins with a state."""
        keys, wrong = (x[:, chunk.start : chunk.stop] for x in (self._stretch.keys, self._wrong))
        return surprise(keys, wrong, state, self._form.widths, self._form.rule)

    def block(
        self, found: Surprise, chunk: range, block: range, state: Stacked, *, write: bool = True
    ) -> tuple[Tensor, list[Tensor], Block]:
        """``read_and_write`` of a block."""
        inputs, errors, factors = _within(found, chunk, block)
        shares = self._shares[block].clipped(factors, len(inputs))
        queries = self._stretch.queries[:, block.start : block.stop]
        widths, rule, _ = self._form
        return read_and_write(queries, inputs, errors, shares, state, widths, rule, write=write)

    def block_backward(
        self,
        kept: Block,
        found: Surprise,
        grads: _ChunkGrads,
        chunk: range,
        block: range,
        read_grad: Tensor,
        state_grads: list[Tensor],
    ) -> tuple[Tensor, list[Tensor]]:
        """Pull gradients through ``block``: those of its queries and of the state before it."""
        inputs, errors, factors = _within(found, chunk, block)
        input_grads, error_grads, factor_grads = _within(grads, chunk, block)
        widths, rule, _ = self._form
        query_grad, before, shares_grads = read_and_write_backward(
            kept, inputs, errors, widths, read_grad, state_grads, input_grads, error_grads, rule
        )
        own = self._shares[block].clipped_backward(factors, shares_grads)
        self._grads[block] = own[0]
        if factor_grads is not None and own[1] is not None:
            factor_grads.copy_(own[1])
        return query_grad, before

    def gates_grad(self) -> Tensor:
        """The gradient (3, N, t) of the gates, after all steps back."""
        grads: list[Tensor] = []
        outputs: list[Tensor] = []
        for spans, shares in self._groups:
            outputs += shares
            found = zip(*(self._grads[span] for span in spans), strict=True)
            grads += [torch.stack(one, 1) for one in found]
        return torch.autograd.grad(outputs, self._gates, grads)[0]


def _within(
    whole: Surprise | _ChunkGrads, chunk: range, block: range
) -> tuple[list[Tensor], list[Tensor], Tensor | None]:
    """Views of a block's part of what a chunk has: inputs, errors and factors."""
    if chunk == block:
        return whole.inputs, whole.errors, whole.factors
    first, end = block.start - chunk.start, block.stop - chunk.start
    inputs, errors = ([x[:, first:end] for x in xs] for xs in (whole.inputs, whole.errors))
    return inputs, errors, None if whole.factors is None else whole.factors[..., first:end]
