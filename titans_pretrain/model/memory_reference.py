"""The neural long-term memory token by token, straight from the equations of arXiv 2501.00663.

The oracle that the fast path is tested against: slow, and as short as the mathematics.

Shapes: B batch, H heads, T time, D head width; a layer's weights are (B, H, out, in).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .memory_chunk import MemoryState, Resets

Layers = tuple[Tensor, ...]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "silu": F.silu}


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
    """Write every token into the memory, then read it, one token after the other.

    Args:
        queries: (B, H, T, D).
        keys: (B, H, T, D).
        values: (B, H, T, D).
        forget: alpha in [0, 1], (B, H, T): share of the weights erased before the write.
        momentum: eta in [0, 1], (B, H, T): share of past surprise kept.
        step: theta >= 0, (B, H, T): inner learning rate.
        state: weights and momentum before the first token, which opens a chunk.
        chunk_size: tokens whose surprise is taken at the same weights.
        activation: "gelu" (exact) or "silu", between the layers of the memory.
        residual: M(x) = x + f(x) instead of f(x).
        surprise_clip: bound on the norm of one token's surprise per layer; None for none.
        resets: before which tokens weights and momentum are set to which, and a chunk begins.

    Returns:
        What the queries read, (B, H, T, D) in the queries' dtype, and the state after the last
        token, float32 (float64 when the inputs are).
    """
    dtype = torch.promote_types(queries.dtype, torch.float32)
    q, k, v = (x.to(dtype) for x in (queries, keys, values))
    alpha, eta, theta = (gate.to(dtype)[..., None, None] for gate in (forget, momentum, step))
    weights = tuple(w.to(dtype) for w in state.weights)
    past = tuple(s.to(dtype) for s in state.momentum)
    start, reads = weights, []
    for t in range(q.shape[2]):
        if t % chunk_size == 0:
            start = weights  # Eq. 16: M_{t'}, t' = t - mod(t, b)
        if resets is not None:
            first = resets.first[:, t].to(q.device)
            weights = _where(first, resets.state.weights, weights)
            past = _where(first, resets.state.momentum, past)
            start = _where(first, resets.state.weights, start)
        surprise = _surprise(start, k[:, :, t], v[:, :, t], activation, residual)
        if surprise_clip is not None:
            surprise = tuple(_clamp(u, surprise_clip) for u in surprise)
        a, e, th = alpha[:, :, t], eta[:, :, t], theta[:, :, t]
        past = tuple(e * s - th * u for s, u in zip(past, surprise, strict=True))  # Eq. 10, 14
        weights = tuple((1 - a) * w + s for w, s in zip(weights, past, strict=True))  # Eq. 13
        reads.append(_apply(weights, q[:, :, t], activation, residual))  # Eq. 15
    read = torch.stack(reads, dim=2) if reads else torch.zeros_like(q)
    return read.to(queries.dtype), MemoryState(weights, past)


def _where(row: Tensor, yes: Layers, no: Layers) -> Layers:
    """``yes`` in rows (B,) that are true, ``no`` in the others."""
    row = row[:, None, None, None]
    return tuple(torch.where(row, y.to(n.dtype), n) for y, n in zip(yes, no, strict=True))


def _apply(weights: Layers, x: Tensor, activation: str, residual: bool) -> Tensor:
    """M(x): an MLP without biases; (B, H, D) to (B, H, D)."""
    hidden = x
    for layer, weight in enumerate(weights):
        if layer > 0:
            hidden = ACTIVATIONS[activation](hidden)
        hidden = (weight @ hidden[..., None])[..., 0]
    return x + hidden if residual else hidden


def _surprise(start: Layers, k: Tensor, v: Tensor, activation: str, residual: bool) -> Layers:
    """The gradient of Eq. 12's loss ||M(k) - v||^2 at the chunk's first weights.

    Batch rows and heads have weights of their own, so the gradient of the sum is each one's.
    """
    differentiable = torch.is_grad_enabled()
    with torch.enable_grad():
        # views: keys and values may depend on the weights as well, which is no part of Eq. 12
        at = tuple(
            w.view_as(w) if differentiable and w.requires_grad else w.detach().requires_grad_()
            for w in start
        )
        loss = (_apply(at, k, activation, residual) - v).square().sum()  # Eq. 12
        return torch.autograd.grad(loss, at, create_graph=differentiable)


def _clamp(surprise: Tensor, clip: float) -> Tensor:
    """Shrink a layer's surprise smoothly below ``clip`` in Frobenius norm."""
    square = surprise.square().sum((-2, -1), keepdim=True)
    zero = square == 0  # the root's slope there is infinite; the clamp's is taken as zero
    norm = torch.where(zero, 1, square).sqrt().masked_fill(zero, 0)
    return surprise * (clip / (norm + clip))
