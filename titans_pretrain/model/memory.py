"""The neural long-term memory in its dual form: matrix products only, exact per token.

A memory is an MLP whose weights change at every token (paper Eq. 8-15). Inside a chunk every
surprise is taken at the chunk's first weights (Section 3.2), so all that happens there is linear in
the chunk's first state and in outer products of keys' activations with back-propagated errors; no
per-token weights exist. ``memory_reference.py`` is the same function token by token.

Shapes: B batch, H heads, T time, c chunk, d head width; weights are (B, H, out, in).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

COEFFICIENT_BLOCK = 64
T = TypeVar("T")


class MemoryState(NamedTuple):
    """What the memory hands from chunk to chunk.

    Attributes:
        weights: one (B, H, out, in) tensor per layer of the memory, W in Eq. 13.
        momentum: past surprise of the same shapes, S in Eq. 14.
    """

    weights: tuple[Tensor, ...]
    momentum: tuple[Tensor, ...]


class Rule(NamedTuple):
    """What is fixed about a memory: its activation, its residual and the bound on surprise."""

    activation: str = "gelu"
    residual: bool = True
    surprise_clip: float | None = None


class Tokens(NamedTuple):
    """What tokens bring: queries, keys, values (B, H, T, d) and gates (B, H, T)."""

    queries: Tensor
    keys: Tensor
    values: Tensor
    forget: Tensor
    momentum: Tensor
    step: Tensor

    def at(self, first: int, last: int) -> "Tokens":
        """The tokens in [first, last)."""
        return Tokens(*(tensor[:, :, first:last] for tensor in self))


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

    Returns:
        The reads (B, H, T, d) in the queries' dtype, and the state after the last token, in
        float32, or float64 when the inputs are.

    Raises:
        ValueError: a chunk size below 1, an unknown activation, or shapes that do not fit.
    """
    tokens = Tokens(queries, keys, values, forget, momentum, step)
    rule = Rule(activation, residual, surprise_clip)
    check(tokens, state, chunk_size, rule)
    dtype = state_dtype(queries)
    state = MemoryState(
        tuple(w.to(dtype) for w in state.weights), tuple(s.to(dtype) for s in state.momentum)
    )
    flat = (*tokens, *state.weights, *state.momentum)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in flat):
        reads, *final = _RecomputedScan.apply(rule, chunk_size, *flat)
        return reads, unflatten(final)
    reads, final_state, _ = _scan(tokens, state, chunk_size, rule, keep_starts=False)
    return reads, final_state


def state_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype of states and coefficients for inputs like ``tensor``."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def check(tokens: Tokens, state: MemoryState, chunk_size: int, rule: Rule) -> None:
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


def unflatten(tensors: Sequence[Tensor]) -> MemoryState:
    """A state from its weights followed by its momentum."""
    depth = len(tensors) // 2
    return MemoryState(tuple(tensors[:depth]), tuple(tensors[depth:]))


def exact(function: Callable[..., T]) -> Callable[..., T]:
    """Run without autocast: states and coefficients keep their precision, in recompute too."""

    @functools.wraps(function)
    def run(first: Any, *rest: Any) -> T:
        device = (first if isinstance(first, Tensor) else first[0]).device.type
        with torch.autocast(device_type=device, enabled=False):
            return function(first, *rest)

    return run


@exact
def retrieve(queries: Tensor, weights: Sequence[Tensor], rule: Rule) -> Tensor:
    """Read without writing, M*(q) of Eq. 15: (B, H, T, d) from one set of weights per row."""
    hidden = queries.to(weights[0].dtype)
    for layer, w in enumerate(weights):
        hidden = hidden @ w.mT
        if layer < len(weights) - 1:
            hidden = _activate(hidden, rule.activation)
    if rule.residual:
        hidden = hidden + queries
    return hidden.to(queries.dtype)


@exact
def chunk_step(
    tokens: Tokens,
    anchor: Sequence[Tensor],
    state: MemoryState,
    rule: Rule,
    valid: Tensor | None = None,
) -> tuple[Tensor, MemoryState]:
    """All tokens of (a part of) one chunk at once.

    Args:
        tokens: (B, H, c, d) and gates (B, H, c).
        anchor: the weights at the chunk's start, where surprise is taken.
        state: the running state before the first of ``tokens``; at the chunk's start its weights
            are the anchor.
        rule: activation, residual and clip.
        valid: (B, c), False where a token must change nothing; None means all count.

    Returns:
        Reads (B, H, c, d) in the queries' dtype, and the state after the last token.
    """
    dtype = state.weights[0].dtype
    queries, keys, values, forget, momentum, step = (tensor.to(dtype) for tensor in tokens)
    write = coefficients(forget, momentum, step, valid)
    activations, errors = _surprise(keys, values, anchor, rule)

    hidden = queries
    weights, past = [], []
    for layer, (w, s) in enumerate(zip(state.weights, state.momentum, strict=True)):
        x, delta = activations[layer], errors[layer]
        mixed = write.surprise * (hidden @ x.mT)
        hidden = (
            write.weights[..., None] * (hidden @ w.mT)
            + write.momentum[..., None] * (hidden @ s.mT)
            - mixed @ delta
        )
        if layer < len(state.weights) - 1:
            hidden = _activate(hidden, rule.activation)
        weights.append(
            write.weights[..., -1, None, None] * w
            + write.momentum[..., -1, None, None] * s
            - (delta * write.surprise[..., -1, :, None]).mT @ x
        )
        past.append(
            write.last_momentum[..., None, None] * s
            - (delta * write.last_surprise[..., None]).mT @ x
        )
    reads = hidden + queries if rule.residual else hidden
    return reads.to(tokens.queries.dtype), MemoryState(tuple(weights), tuple(past))


class Coefficients(NamedTuple):
    """How the weights after token t consist of the chunk's first state and its surprises.

    W_t = weights[t] W_0 + momentum[t] S_0 - sum_i surprise[t, i] u_i, and after the last token
    S_c = last_momentum S_0 - sum_i last_surprise[i] u_i.
    """

    weights: Tensor
    momentum: Tensor
    surprise: Tensor
    last_momentum: Tensor
    last_surprise: Tensor


def coefficients(
    forget: Tensor, momentum: Tensor, step: Tensor, valid: Tensor | None
) -> Coefficients:
    """Unroll Eq. 13-14 over a chunk: gates (B, H, c) to (B, H, c) and (B, H, c, c) weights."""
    if valid is not None:
        alive = valid[:, None, :]
        forget = forget * alive
        momentum = torch.where(alive, momentum, 1)
        step = step * alive
    decay = _products(1 - forget)
    kept = _products(momentum)
    kept_since_start = torch.cumprod(momentum, -1)
    injected = kept if valid is None else kept * valid[:, None, :, None]
    start = kept_since_start if valid is None else kept_since_start * valid[:, None, :]
    return Coefficients(
        weights=torch.cumprod(1 - forget, -1),
        momentum=(decay @ start[..., None]).squeeze(-1),
        surprise=_decayed(decay, injected, 1 - forget) * step[..., None, :],
        last_momentum=kept_since_start[..., -1],
        last_surprise=kept[..., -1, :] * step,
    )


def _products(factors: Tensor) -> Tensor:
    """P[t, j] = prod of factors over j < m <= t, zero above the diagonal; exact at factor 0."""
    time = factors.shape[-1]
    below = torch.ones(time, time, dtype=torch.bool, device=factors.device).tril(-1)
    return torch.where(below, factors[..., :, None], 1).cumprod(-2).tril()


def _decayed(decay: Tensor, kept: Tensor, factors: Tensor) -> Tensor:
    """The product decay @ kept by blocks of rows: a row is an earlier row decayed, plus."""
    time = decay.shape[-1]
    if time <= COEFFICIENT_BLOCK:
        return decay @ kept
    rows: list[Tensor] = []
    for first in range(0, time, COEFFICIENT_BLOCK):
        last = min(first + COEFFICIENT_BLOCK, time)
        block = decay[..., first:last, first:last] @ kept[..., first:last, :]
        if rows:
            carried = torch.cumprod(factors[..., first:last], -1)
            block = block + carried[..., None] * rows[-1][..., -1:, :]
        rows.append(block)
    return torch.cat(rows, -2)


def _surprise(
    keys: Tensor, values: Tensor, anchor: Sequence[Tensor], rule: Rule
) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients of ||M(k) - v||^2 (Eq. 12) per token, as outer products error x activation.

    Returns:
        Per layer the inputs (B, H, c, in) and the errors (B, H, c, out), clipped if asked for.
    """
    activations, slopes, hidden = [], [], keys
    for layer, w in enumerate(anchor):
        activations.append(hidden)
        hidden = hidden @ w.mT
        if layer < len(anchor) - 1:
            slopes.append(_slope(hidden, rule.activation))
            hidden = _activate(hidden, rule.activation)
    prediction = hidden + keys if rule.residual else hidden
    errors = [2 * (prediction - values)]
    for w, slope in zip(reversed(anchor[1:]), reversed(slopes), strict=True):
        errors.append((errors[-1] @ w) * slope)
    errors.reverse()
    if rule.surprise_clip is not None:
        clip = rule.surprise_clip
        errors = [
            error * (clip / (_norm(error) * _norm(x) + clip))
            for error, x in zip(errors, activations, strict=True)
        ]
    return activations, errors


def _norm(tensor: Tensor) -> Tensor:
    """Euclidean norm over the last axis, kept; no overflow, and gradient zero at zero."""
    scale = tensor.detach().abs().amax(-1, keepdim=True)
    scale = torch.where(scale > 0, scale, 1)
    square = (tensor / scale).square().sum(-1, keepdim=True)
    positive = square > 0
    return torch.where(positive, torch.where(positive, square, 1).sqrt(), 0) * scale


def _activate(x: Tensor, activation: str) -> Tensor:
    return F.gelu(x) if activation == "gelu" else F.silu(x)


def _slope(x: Tensor, activation: str) -> Tensor:
    """The activation's derivative."""
    if activation == "gelu":
        density = torch.exp(-0.5 * x * x) * 0.3989422804014327
        return 0.5 * (1 + torch.erf(x * 0.7071067811865476)) + x * density
    sigmoid = torch.sigmoid(x)
    return sigmoid * (1 + x * (1 - sigmoid))


def _scan(
    tokens: Tokens, state: MemoryState, chunk_size: int, rule: Rule, *, keep_starts: bool
) -> tuple[Tensor, MemoryState, list[Tensor]]:
    """The loop over chunks; ``keep_starts`` collects the state before each."""
    reads, starts = [], []
    for first in range(0, tokens.queries.shape[2], chunk_size):
        if keep_starts:
            starts += [*state.weights, *state.momentum]
        part = tokens.at(first, first + chunk_size)
        read, state = chunk_step(part, state.weights, state, rule)
        reads.append(read)
    joined = torch.cat(reads, 2) if reads else torch.zeros_like(tokens.queries)
    return joined, state, starts


class _RecomputedScan(torch.autograd.Function):
    """The scan, keeping only chunk-start states and recomputing each chunk in backward."""

    @staticmethod
    def forward(ctx: Any, rule: Rule, chunk_size: int, *flat: Tensor) -> tuple[Tensor, ...]:
        tokens, state = Tokens(*flat[:6]), unflatten(flat[6:])
        reads, final, starts = _scan(tokens, state, chunk_size, rule, keep_starts=True)
        ctx.rule, ctx.chunk_size, ctx.depth = rule, chunk_size, len(state.weights)
        ctx.save_for_backward(*tokens, *starts)
        # a returned input would be taken for a view of it: with no token the state is one
        fresh = [
            tensor if starts else tensor.clone() for tensor in (*final.weights, *final.momentum)
        ]
        return reads, *fresh

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # grad mode is on here only under create_graph, and the recomputed chunks are cut off
        if torch.is_grad_enabled():
            raise RuntimeError("memory_scan has no second derivative; memory_reference has")
        # checkpointing unpacks a saved tensor once
        saved = ctx.saved_tensors
        tokens, starts = Tokens(*saved[:6]), saved[6:]
        read_grad, state_grads = grads[0], list(grads[1:])
        size, parts = 2 * ctx.depth, []
        for chunk in reversed(range(len(starts) // size)):
            first = chunk * ctx.chunk_size
            part = tokens.at(first, first + ctx.chunk_size)
            inputs = [*part, *starts[chunk * size : (chunk + 1) * size]]
            token_grads, state_grads = _chunk_backward(
                inputs, read_grad[:, :, first : first + ctx.chunk_size], state_grads, ctx.rule
            )
            parts.append(token_grads)
        joined = [torch.cat(part[::-1], 2) for part in zip(*parts, strict=True)] or [
            torch.zeros_like(tensor) for tensor in tokens
        ]
        return None, None, *joined, *state_grads


def _chunk_backward(
    inputs: Sequence[Tensor], read_grad: Tensor, state_grads: Sequence[Tensor], rule: Rule
) -> tuple[list[Tensor], list[Tensor]]:
    """Recompute one chunk and pull gradients through it: to its tokens, and to its first state."""
    device = inputs[0].device.type
    with torch.enable_grad(), torch.autocast(device_type=device, enabled=False):
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        state = unflatten(leaves[6:])
        read, final = chunk_step(Tokens(*leaves[:6]), state.weights, state, rule)
        pulled = torch.autograd.grad(
            (read, *final.weights, *final.momentum),
            leaves,
            (read_grad, *state_grads),
            allow_unused=True,
            materialize_grads=True,
        )
    return list(pulled[:6]), list(pulled[6:])
