"""How a chunk's weights consist of its first state and its tokens' surprises: Eq. 13-14 unrolled.

Shapes: B batch, H heads, c chunk.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 64


class Share(NamedTuple):
    """How much of a state (W, S) is in the weights after each token, and in the last momentum.

    Attributes:
        weights, momentum: (B, H, c), of W and of S in the weights.
        last_momentum: (B, H), of S in the momentum after the last token.
    """

    weights: Tensor
    momentum: Tensor
    last_momentum: Tensor


class Coefficients(NamedTuple):
    """What the weights after each token and the last momentum consist of.

    W_t = weights[t] W_0 + momentum[t] S_0 - sum_i surprise[t, i] u_i, and after the last token
    S_c = last_momentum S_0 - sum_i last_surprise[i] u_i.

    Attributes:
        carried: the share of (W_0, S_0), the state before the chunk.
        begun: where documents begin in the chunk, the share of the state they begin with.
        surprise: (B, H, c, c).
        last_surprise: (B, H, c).
    """

    carried: Share
    begun: Share | None
    surprise: Tensor
    last_surprise: Tensor


def coefficients(
    forget: Tensor,
    momentum: Tensor,
    step: Tensor,
    valid: Tensor | None,
    first: Tensor | None = None,
) -> Coefficients:
    """Unroll a chunk.

    Args:
        forget, momentum, step: gates (B, H, c).
        valid: (B, c), False where a token changes nothing; None means all count.
        first: (B, c), True where a document begins; not together with ``valid``.
    """
    if valid is not None:
        alive = valid[:, None, :]
        forget = forget * alive
        momentum = torch.where(alive, momentum, 1)
        step = step * alive
    own_forget, own_momentum = forget, momentum
    if first is not None:
        # all that was before a document is erased by its first token
        forget = torch.where(first[:, None, :], 1, forget)
        momentum = torch.where(first[:, None, :], 0, momentum)
    decay = _products(1 - forget)
    kept = _products(momentum)
    kept_since_start = kept[..., 0] * momentum[..., :1]
    injected = kept if valid is None else kept * valid[:, None, :, None]
    start = kept_since_start if valid is None else kept_since_start * valid[:, None, :]
    begun = None
    if first is not None:
        begun = _begun(decay, kept, 1 - own_forget, own_momentum, first[:, None, :])
    return Coefficients(
        carried=Share(
            weights=decay[..., 0] * (1 - forget[..., :1]),
            momentum=_apply(decay, start),
            last_momentum=kept_since_start[..., -1],
        ),
        begun=begun,
        surprise=_decayed(decay, injected, 1 - forget) * step[..., None, :],
        last_surprise=kept[..., -1, :] * step,
    )


def _begun(decay: Tensor, kept: Tensor, left: Tensor, momentum: Tensor, first: Tensor) -> Share:
    """What a document's first token leaves of the state it begins with, and what comes of it."""
    since_begun = _apply(kept, momentum * first)
    return Share(
        weights=_apply(decay, left * first),
        momentum=_apply(decay, since_begun),
        last_momentum=since_begun[..., -1],
    )


def _products(factors: Tensor) -> Tensor:
    """P[t, j] = prod of factors over j < m <= t, zero above the diagonal; exact at factor 0."""
    return _Products.apply(factors) if factors.shape[-1] <= BLOCK else _multiplied(factors)


def _multiplied(factors: Tensor) -> Tensor:
    time = factors.shape[-1]
    below = torch.ones(time, time, dtype=torch.bool, device=factors.device).tril(-1)
    return torch.where(below, factors[..., :, None], 1).cumprod(-2).tril()


class _Products(torch.autograd.Function):
    """With the derivative as a matrix product, which is less than that of ``cumprod`` in a block.

    dP[t, j] / df[m] = P[t, m] P[m - 1, j] for j < m <= t.
    """

    @staticmethod
    def forward(ctx: Any, factors: Tensor) -> Tensor:
        products = _multiplied(factors)
        ctx.save_for_backward(products)
        return products

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (products,) = ctx.saved_tensors
        before = F.pad(products[..., :-1, :], (0, 0, 1, 0))
        return ((grad @ before.mT) * products).sum(-2)


def _apply(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector[..., None]).squeeze(-1)


def _decayed(decay: Tensor, kept: Tensor, factors: Tensor) -> Tensor:
    """The product decay @ kept by blocks of rows: a row is an earlier row decayed, plus."""
    time = decay.shape[-1]
    if time <= BLOCK:
        return decay @ kept
    rows: list[Tensor] = []
    for first in range(0, time, BLOCK):
        last = min(first + BLOCK, time)
        block = decay[..., first:last, first:last] @ kept[..., first:last, :]
        if rows:
            carried = torch.cumprod(factors[..., first:last], -1)
            block = block + carried[..., None] * rows[-1][..., -1:, :]
        rows.append(block)
    return torch.cat(rows, -2)
