"""The memory's equations for a plain chunk: forward, and backward written out.

A chunk's surprises are taken at once, at its first weights; reads and writes follow in blocks.
``memory_chunk.chunk_step`` is the same function for a chunk in which documents begin, or of which
only a part is there, with autograd's backward.

Shapes: L layers, N batch x heads, c tokens of a chunk, b of a block. A layer's running state is one
tensor, weights and momentum beside each other along the narrower of the layer's sides, so that what
is scaled per token is narrow too: (N, out, 2 in) of a layer that widens, else (N, 2 out, in).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .memory_chunk import Rule, activate, norm

Stacked = Sequence[Tensor]
Widths = Sequence[tuple[int, int]]


def widths_of(weights: Sequence[Tensor]) -> list[tuple[int, int]]:
    """The (out, in) of each layer."""
    return [(w.shape[-2], w.shape[-1]) for w in weights]


def stack(weights: Sequence[Tensor], momentum: Sequence[Tensor]) -> list[Tensor]:
    """States (B, H, out, in) as layers' running states."""
    pairs = zip(weights, momentum, strict=True)
    return [
        torch.cat((w.flatten(0, 1), s.flatten(0, 1)), 2 if _widens(*w.shape[-2:]) else 1)
        for w, s in pairs
    ]


def unstack(state: Stacked, widths: Widths, batch: int) -> list[Tensor]:
    """The inverse of ``stack``: weights followed by momentum, each (B, H, out, in)."""
    halves = [_halves(layer, *width) for layer, width in zip(state, widths, strict=True)]
    parts = [half[part].unflatten(0, (batch, -1)) for part in (0, 1) for half in halves]
    return [part.clone(memory_format=torch.contiguous_format) for part in parts]


def _widens(out: int, width: int) -> bool:
    return width <= out


def _halves(layer: Tensor, out: int, width: int) -> tuple[Tensor, Tensor]:
    """Views of the weights and the momentum (N, out, in)."""
    if _widens(out, width):
        return layer[..., :width], layer[..., width:]
    return layer[:, :out], layer[:, out:]


class Surprise(NamedTuple):
    """A chunk's gradients of ||M(k) - v||^2 (Eq. 12) per token, and what they came from.

    Attributes:
        inputs: by layer, activations (N, c, in) that the errors belong to; error x input is the
            surprise.
        before: what the activation was applied to, (N, c, out) but for the last layer.
        slopes: the activation's derivative there.
        backs: errors of the layer above pulled through its weights, (N, c, out) likewise.
        errors: by layer, (N, c, out), before the clip.
        norms: of errors and of inputs, (2, L, N, c).
        factors: of the clip, (L, N, c); None without.
    """

    inputs: list[Tensor]
    before: list[Tensor]
    slopes: list[Tensor]
    backs: list[Tensor]
    errors: list[Tensor]
    norms: Tensor | None
    factors: Tensor | None


def surprise(keys: Tensor, wrong: Tensor, state: Stacked, widths: Widths, rule: Rule) -> Surprise:
    """The surprises of a chunk at its first weights, those of ``state``.

    Args:
        keys: (N, c, d).
        wrong: (N, c, d), twice what a memory of zeros is off by.
        state: by layer, before the chunk.
        widths: (out, in) by layer.
        rule: activation and clip.
    """
    anchor = [_halves(layer, *width)[0] for layer, width in zip(state, widths, strict=True)]
    inputs, before, slopes, backs = [keys], [], [], []
    one = keys.new_ones(())
    for weights in anchor[:-1]:
        x = inputs[-1] @ weights.mT
        before.append(x)
        inputs.append(activate(x, rule.activation))
        slopes.append(_pull(one.expand_as(x), x, rule.activation))
    errors = [torch.baddbmm(wrong, inputs[-1], anchor[-1].mT, alpha=2)]
    for weights, slope in zip(anchor[:0:-1], slopes[::-1], strict=True):
        backs.append(errors[-1] @ weights)
        errors.append(backs[-1] * slope)
    backs.reverse()
    errors.reverse()
    norms = factors = None
    if rule.surprise_clip is not None:
        norms = torch.stack([norm(x).squeeze(-1) for x in errors + inputs]).unflatten(0, (2, -1))
        factors = rule.surprise_clip / (norms[0] * norms[1] + rule.surprise_clip)
    return Surprise(inputs, before, slopes, backs, errors, norms, factors)


def surprise_backward(
    found: Surprise,
    state: Stacked,
    widths: Widths,
    input_grads: list[Tensor],
    error_grads: list[Tensor],
    factor_grads: Tensor | None,
    state_grads: Stacked,
    rule: Rule,
) -> tuple[Tensor, Tensor]:
    """Pull gradients through ``surprise``; all those given are changed.

    Args:
        found: what it returned.
        state, widths: what it took.
        input_grads, error_grads: by layer, of ``found.inputs`` and ``found.errors``.
        factor_grads: of ``found.factors``.
        state_grads: the gradient of ``state`` is added to these.
        rule: activation and clip.

    Returns:
        Gradients of keys and wrong.
    """
    anchor, anchor_grads = (
        [_halves(layer, *width)[0] for layer, width in zip(layers, widths, strict=True)]
        for layers in (state, state_grads)
    )
    clip = rule.surprise_clip
    if found.norms is not None and found.factors is not None and factor_grads is not None and clip:
        slope = factor_grads * found.factors.square() / -clip
        shares = (slope * found.norms.flip(0) / found.norms).masked_fill_(found.norms == 0, 0)
        of_errors, of_inputs = shares[..., None]
        for layer in range(len(anchor)):
            input_grads[layer].addcmul_(found.inputs[layer], of_inputs[layer])
            error_grads[layer].addcmul_(found.errors[layer], of_errors[layer])
    before_grads = []
    for layer, (x, slope, back) in enumerate(
        zip(found.before, found.slopes, found.backs, strict=True)
    ):
        grad = error_grads[layer]
        before_grads.append(_curve(x, rule.activation).mul_(back).mul_(grad))
        grad.mul_(slope)
        error_grads[layer + 1].baddbmm_(grad, anchor[layer + 1].mT)
        anchor_grads[layer + 1].add_(found.errors[layer + 1].mT @ grad)
    before_grads.append(2 * error_grads[-1])
    for layer in reversed(range(len(anchor))):
        grad = before_grads[layer]
        anchor_grads[layer].add_(grad.mT @ found.inputs[layer])
        input_grads[layer].baddbmm_(grad, anchor[layer])
        if layer:
            before_grads[layer - 1].addcmul_(input_grads[layer], found.slopes[layer - 1])
    return input_grads[0], error_grads[-1]


class Shares(NamedTuple):
    """What a block's weights and last state consist of: ``memory_coefficients``, laid out anew.

    Attributes:
        carried: (N, b, 2), of the weights and of the momentum before the block, after each token.
        last: (N, 3), of weights and momentum in the last weights, and of momentum in the last.
        surprise: (N, b, b) of surprises after each token; with clips' factors, (L, N, b, b).
        gains: (N, b, 2) of surprises in the last weights and in the last momentum, likewise.
    """

    carried: Tensor
    last: Tensor
    surprise: Tensor
    gains: Tensor

    def clipped(self, factors: Tensor | None, depth: int) -> "Shares":
        """By layer, with the factors (L, N, b) of clipped surprises."""
        if factors is None:
            surprise, gains = (x.expand(depth, *x.shape) for x in (self.surprise, self.gains))
        else:
            surprise = self.surprise * factors[..., None, :]
            gains = self.gains * factors[..., None]
        return self._replace(surprise=surprise, gains=gains)

    def clipped_backward(
        self, factors: Tensor | None, grads: "Shares"
    ) -> tuple["Shares", Tensor | None]:
        """Pull gradients through ``clipped``: the coefficients', and the factors'."""
        surprise, gains, factor_grads = grads.surprise, grads.gains, None
        if factors is not None:
            factor_grads = (surprise * self.surprise).sum(-2)
            factor_grads.add_((gains * self.gains).sum(-1))
            surprise, gains = surprise * factors[..., None, :], gains * factors[..., None]
        return grads._replace(surprise=surprise.sum(0), gains=gains.sum(0)), factor_grads


class Block(NamedTuple):
    """What a block's backward needs, by layer.

    Attributes:
        state: before the block.
        shares: its coefficients, clipped.
        inputs: queries or their activations, (N, b, in).
        before: what the activation was applied to, (N, b, out) but for the last layer.
        reads: of weights and momentum apart, (N, b, 2 out); of a layer that widens, its inputs
            times their shares (N, b, 2 in).
        mixed: inputs against the inputs of surprises, without and with shares, (N, b, b).
    """

    state: Stacked
    shares: Shares
    inputs: list[Tensor]
    before: list[Tensor]
    reads: list[Tensor]
    mixed: list[tuple[Tensor, Tensor]]


def read_and_write(
    queries: Tensor,
    inputs: Sequence[Tensor],
    errors: Sequence[Tensor],
    shares: Shares,
    state: Stacked,
    widths: Widths,
    rule: Rule,
    *,
    write: bool = True,
) -> tuple[Tensor, list[Tensor], Block]:
    """A block's reads, by Eq. 15 without the residual, and writes, by Eq. 13-14.

    Args:
        queries: (N, b, d).
        inputs, errors: of the block's surprises by layer, (N, b, in) and (N, b, out).
        shares: the block's coefficients, clipped.
        state: by layer, before the block.
        widths: (out, in) by layer.
        rule: activation.
        write: whether the state after the block is asked for.

    Returns:
        Reads (N, b, d), the state after the block, and what the backward needs.
    """
    kept, after = Block(state, shares, [queries], [], [], []), []
    hidden = queries
    for layer, (memory, x, error) in enumerate(zip(state, inputs, errors, strict=True)):
        scores = hidden @ x.mT
        mixed = scores * shares.surprise[layer]
        kept.mixed.append((scores, mixed))
        if write:
            after.append(_written(memory, x, error, shares, layer, widths[layer]))
        if _widens(*widths[layer]):
            kept.reads.append(_beside(hidden, shares.carried))
            hidden = (mixed @ error).baddbmm_(kept.reads[-1], memory.mT)
        else:
            kept.reads.append(hidden @ memory.mT)
            hidden = _combined(kept.reads[-1], shares.carried).baddbmm_(mixed, error)
        if layer < len(state) - 1:
            kept.before.append(hidden)
            hidden = activate(hidden, rule.activation)
            kept.inputs.append(hidden)
    return hidden, after, kept


def _beside(x: Tensor, factors: Tensor) -> Tensor:
    """(N, b, 2 width): the vectors times the first of two factors, beside them times the other."""
    return (x[..., None, :] * factors[..., None]).flatten(-2)


def _apart(both: Tensor) -> Tensor:
    """(N, b, 2, width) of what lies beside each other."""
    return both.unflatten(-1, (2, -1))


def _combined(both: Tensor, factors: Tensor) -> Tensor:
    """(N, b, width), the sum of what lies beside each other, each times its factor."""
    first, second = both.chunk(2, -1)
    return (first * factors[..., :1]).addcmul_(second, factors[..., 1:])


def _written(
    state: Tensor, x: Tensor, error: Tensor, shares: Shares, layer: int, widths: tuple[int, int]
) -> Tensor:
    """A layer's state after a block."""
    if _widens(*widths):
        after = error.mT @ _beside(x, shares.gains[layer])
    else:
        after = _beside(error, shares.gains[layer]).mT @ x
    (w, s), (after_w, after_s) = _halves(state, *widths), _halves(after, *widths)
    weights, momentum, kept = shares.last[..., None, None].unbind(1)
    after_w.addcmul_(w, weights).addcmul_(s, momentum)
    after_s.addcmul_(s, kept)
    return after


def read_and_write_backward(
    kept: Block,
    inputs: Sequence[Tensor],
    errors: Sequence[Tensor],
    widths: Widths,
    read_grad: Tensor,
    state_grads: Stacked,
    input_grads: Sequence[Tensor],
    error_grads: Sequence[Tensor],
    rule: Rule,
) -> tuple[Tensor, list[Tensor], Shares]:
    """Pull gradients through ``read_and_write``.

    Args:
        kept: what it kept.
        inputs, errors, widths: what it took.
        read_grad, state_grads: of what it returned.
        input_grads, error_grads: of ``inputs`` and ``errors``, filled here.
        rule: activation.

    Returns:
        Gradients of the queries, of the state before the block, and of the clipped shares.
    """
    shares, before = kept.shares, []
    grads = Shares(
        torch.zeros_like(shares.carried),
        torch.zeros_like(shares.last),
        torch.empty_like(shares.surprise, memory_format=torch.contiguous_format),
        torch.empty_like(shares.gains, memory_format=torch.contiguous_format),
    )
    grad = read_grad
    for layer in reversed(range(len(inputs))):
        x, error, hidden = inputs[layer], errors[layer], kept.inputs[layer]
        scores, mixed = kept.mixed[layer]
        grads.gains[layer] = _write_backward(
            x,
            error,
            shares.gains[layer],
            state_grads[layer],
            widths[layer],
            input_grads[layer],
            error_grads[layer],
        )
        mixed_grad = grad @ error.mT
        torch.mul(mixed_grad, scores, out=grads.surprise[layer])
        scores_grad = mixed_grad.mul_(shares.surprise[layer])
        error_grads[layer].baddbmm_(mixed.mT, grad)
        input_grads[layer].baddbmm_(scores_grad.mT, hidden)
        carried = _carry_backward(kept, layer, state_grads[layer], widths[layer], grads.last)
        grad = _read_backward(kept, layer, grad, widths[layer], carried, grads.carried)
        grad.baddbmm_(scores_grad, x)
        before.append(carried)
        if layer:
            grad = _pull(grad, kept.before[layer - 1], rule.activation)
    return grad, before[::-1], grads


def _write_backward(
    x: Tensor,
    error: Tensor,
    gains: Tensor,
    after_grad: Tensor,
    widths: tuple[int, int],
    input_grad: Tensor,
    error_grad: Tensor,
) -> Tensor:
    """Fill in gradients of inputs and errors by a block's writes; that of the gains (N, b, 2)."""
    if _widens(*widths):
        torch.bmm(_beside(x, gains), after_grad.mT, out=error_grad)
        both, narrow, narrow_grad = error @ after_grad, x, input_grad
    else:
        torch.bmm(_beside(error, gains), after_grad, out=input_grad)
        both, narrow, narrow_grad = x @ after_grad.mT, error, error_grad
    narrow_grad.copy_(_combined(both, gains))
    return (_apart(both) * narrow[..., None, :]).sum(-1)


def _carry_backward(
    kept: Block, layer: int, after_grad: Tensor, widths: tuple[int, int], last_grad: Tensor
) -> Tensor:
    """The gradient of the state before a block by that after it; adds to those of the shares."""
    before = torch.empty_like(after_grad)
    (w, s), (by_w, by_s) = _halves(kept.state[layer], *widths), _halves(after_grad, *widths)
    before_w, before_s = _halves(before, *widths)
    weights, momentum, last = kept.shares.last[..., None, None].unbind(1)
    torch.mul(by_w, weights, out=before_w)
    torch.mul(by_w, momentum, out=before_s).addcmul_(by_s, last)
    pairs = ((by_w, w), (by_w, s), (by_s, s))
    last_grad += torch.stack([(one * other).sum((1, 2)) for one, other in pairs], -1)
    return before


def _read_backward(
    kept: Block,
    layer: int,
    grad: Tensor,
    widths: tuple[int, int],
    state_grad: Tensor,
    carried_grad: Tensor,
) -> Tensor:
    """Pull a gradient (N, b, out) through a layer's read; adds to those of state and shares."""
    state, carried, hidden = kept.state[layer], kept.shares.carried, kept.inputs[layer]
    if _widens(*widths):
        state_grad.baddbmm_(grad.mT, kept.reads[layer])
        both = grad @ state
        carried_grad += (_apart(both) * hidden[..., None, :]).sum(-1)
        return _combined(both, carried)
    scaled = _beside(grad, carried)
    state_grad.baddbmm_(scaled.mT, hidden)
    carried_grad += (_apart(kept.reads[layer]) * grad[..., None, :]).sum(-1)
    return scaled @ state


def _pull(grad: Tensor, x: Tensor, activation: str) -> Tensor:
    """A gradient times the activation's derivative at x."""
    if activation == "gelu":
        return torch.ops.aten.gelu_backward(grad, x)
    return torch.ops.aten.silu_backward(grad, x)


def _curve(x: Tensor, activation: str) -> Tensor:
    """The activation's second derivative."""
    square = (x * x).clamp_(max=1e4)  # the density is zero there, and no infinity times it
    if activation == "gelu":
        density = torch.exp2(-0.7213475204444817 * square)
        return square.sub_(2).mul_(density).mul_(-0.3989422804014327)
    sigmoid = torch.sigmoid(x)
    return sigmoid * (1 - sigmoid) * (2 + x * (1 - 2 * sigmoid))
