"""One chunk of the neural memory at once, in its dual form.

Inside a chunk every surprise is taken at the chunk's first weights (paper Section 3.2), so all that
happens there is linear in the chunk's first state and in outer products of keys' activations with
back-propagated errors; no per-token weights exist.

Shapes: B batch, H heads, T time, c chunk, d head width; weights are (B, H, out, in).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .memory_coefficients import Share, coefficients

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


class Resets(NamedTuple):
    """Documents that begin inside a scan: the memory forgets what was before them.

    Attributes:
        first: (B, T) bool, True for a document's first token, which opens a chunk; on the host, or
            the scan waits for the device.
        state: the memory before such a token, of the scan's shapes.
    """

    first: Tensor
    state: MemoryState

    def at(self, first: int, last: int) -> "Resets":
        """Those of the tokens in [first, last)."""
        return Resets(self.first[:, first:last], self.state)


def state_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype of states and coefficients for inputs like ``tensor``."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def flatten(state: MemoryState) -> tuple[Tensor, ...]:
    """Weights followed by momentum."""
    return *state.weights, *state.momentum


def unflatten(tensors: Sequence[Tensor]) -> MemoryState:
    """A state from its weights followed by its momentum."""
    depth = len(tensors) // 2
    return MemoryState(tuple(tensors[:depth]), tuple(tensors[depth:]))


def exact(function: Callable[..., T]) -> Callable[..., T]:
    """Run without autocast: states and coefficients keep their precision, in recompute too."""

    @functools.wraps(function)
    def run(*arguments: Any, **options: Any) -> T:
        given = arguments[0] if arguments else next(iter(options.values()))
        device = (given if isinstance(given, Tensor) else given[0]).device.type
        with torch.autocast(device_type=device, enabled=False):
            return function(*arguments, **options)

    return run


@exact
def retrieve(queries: Tensor, weights: Sequence[Tensor], rule: Rule) -> Tensor:
    """Read without writing, M*(q) of Eq. 15: (B, H, T, d) from one set of weights per row."""
    hidden = queries.to(weights[0].dtype)
    for layer, w in enumerate(weights):
        hidden = hidden @ w.mT
        if layer < len(weights) - 1:
            hidden = activate(hidden, rule.activation)
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
    resets: Resets | None = None,
) -> tuple[Tensor, MemoryState]:
    """All tokens of (a part of) one chunk at once.

    Args:
        tokens: (B, H, c, d) and gates (B, H, c).
        anchor: the weights at the chunk's start, where surprise is taken.
        state: the running state before the first of ``tokens``; at the chunk's start its weights
            are the anchor.
        rule: activation, residual and clip.
        valid: (B, c), False where a token must change nothing; None means all count.
        resets: documents that begin among ``tokens``, on their device; not with ``valid``.

    Returns:
        Reads (B, H, c, d) in the queries' dtype, and the state after the last token.
    """
    dtype = state.weights[0].dtype
    queries, keys, values, forget, momentum, step = (tensor.to(dtype) for tensor in tokens)
    first = None if resets is None else resets.first
    write = coefficients(forget, momentum, step, valid, first)
    activations, errors = surprise(keys, values, Anchors(anchor, resets), rule)

    hidden = queries
    weights, past = [], []
    for layer, (w, s) in enumerate(zip(state.weights, state.momentum, strict=True)):
        x, delta = activations[layer], errors[layer]
        mixed = write.surprise * (hidden @ x.mT)
        read, last_w = _read(write.carried, hidden, w, s), _last_weights(write.carried, w, s)
        last_s = write.carried.last_momentum[..., None, None] * s
        if write.begun is not None and resets is not None:
            begun_w, begun_s = resets.state.weights[layer], resets.state.momentum[layer]
            read = read + _read(write.begun, hidden, begun_w, begun_s)
            last_w = last_w + _last_weights(write.begun, begun_w, begun_s)
            last_s = last_s + write.begun.last_momentum[..., None, None] * begun_s
        hidden = read - mixed @ delta
        if layer < len(state.weights) - 1:
            hidden = activate(hidden, rule.activation)
        weights.append(last_w - (delta * write.surprise[..., -1, :, None]).mT @ x)
        past.append(last_s - (delta * write.last_surprise[..., None]).mT @ x)
    reads = hidden + queries if rule.residual else hidden
    return reads.to(tokens.queries.dtype), MemoryState(tuple(weights), tuple(past))


def _read(share: Share, x: Tensor, w: Tensor, s: Tensor) -> Tensor:
    """What queries or their activations (B, H, c, in) get from a state's share."""
    return share.weights[..., None] * (x @ w.mT) + share.momentum[..., None] * (x @ s.mT)


def _last_weights(share: Share, w: Tensor, s: Tensor) -> Tensor:
    """A state's share of the weights after the last token."""
    return share.weights[..., -1, None, None] * w + share.momentum[..., -1, None, None] * s


class Anchors:
    """The weights at which surprise is taken: a chunk's first, or those a document begins with."""

    def __init__(self, weights: Sequence[Tensor], resets: Resets | None) -> None:
        self.weights = weights
        self._begun = None if resets is None else resets.state.weights
        if resets is not None:
            self._fresh = (resets.first.cumsum(-1) > 0)[:, None, :, None]

    def forward(self, x: Tensor, layer: int) -> Tensor:
        """(B, H, c, in) through a layer."""
        own = x @ self.weights[layer].mT
        if self._begun is None:
            return own
        return torch.where(self._fresh, x @ self._begun[layer].mT, own)

    def back(self, error: Tensor, layer: int) -> Tensor:
        """(B, H, c, out) back through a layer."""
        own = error @ self.weights[layer]
        if self._begun is None:
            return own
        return torch.where(self._fresh, error @ self._begun[layer], own)


def surprise(
    keys: Tensor, values: Tensor, anchors: Anchors, rule: Rule
) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients of ||M(k) - v||^2 (Eq. 12) per token, as outer products error x activation.

    Returns:
        Per layer the inputs (B, H, c, in) and the errors (B, H, c, out), clipped if asked for.
    """
    activations, slopes, hidden = [], [], keys
    last = len(anchors.weights) - 1
    for layer in range(last + 1):
        activations.append(hidden)
        hidden = anchors.forward(hidden, layer)
        if layer < last:
            slopes.append(_slope(hidden, rule.activation))
            hidden = activate(hidden, rule.activation)
    prediction = hidden + keys if rule.residual else hidden
    errors = [2 * (prediction - values)]
    for layer in range(last, 0, -1):
        errors.append(anchors.back(errors[-1], layer) * slopes[layer - 1])
    errors.reverse()
    if rule.surprise_clip is not None:
        clip = rule.surprise_clip
        errors = [
            error * (clip / (norm(error) * norm(x) + clip))
            for error, x in zip(errors, activations, strict=True)
        ]
    return activations, errors


def norm(tensor: Tensor) -> Tensor:
    """Euclidean norm over the last axis, kept; gradient zero at zero.

    The scale keeps squares of float32 from overflow up to 1e28; what underflows is below 1e-9.
    """
    return torch.linalg.vector_norm(tensor * 2.0**-32, dim=-1, keepdim=True) * 2.0**32


def activate(x: Tensor, activation: str) -> Tensor:
    """The function between a memory's layers."""
    return F.gelu(x) if activation == "gelu" else F.silu(x)


def _slope(x: Tensor, activation: str) -> Tensor:
    """The activation's derivative."""
    if activation == "gelu":
        density = torch.exp(-0.5 * x * x) * 0.3989422804014327
        return 0.5 * (1 + torch.erf(x * 0.7071067811865476)) + x * density
    sigmoid = torch.sigmoid(x)
    return sigmoid * (1 + x * (1 - sigmoid))
