"""The head's logits and their cross-entropy, over chunks of tokens: no batch has whole logits.

A pass holds the logits of one chunk only. Forward keeps two numbers a token, the largest logit and
the softmax's denominator; backward computes a chunk's logits again. The weight enters once and gets
one gradient, so that hooks on its accumulation, such as ZeRO's, run once a pass.

With x(v) the logits of a token of target y, m the largest of them, and Z the denominator:

    Z = sum over v of exp(x(v) - m)        s = log Z - (x(y) - m)
    ds / dx(v) = (exp(x(v) - m) - Z [v = y]) / Z

Tensor ranks hold some rows of the weight each: the maximum, the sum and x(y) come from all of them,
two exchanges a chunk. The gradient of the hidden states is summed over them.

Shapes: B batch, T time, D width, V vocabulary, R tensor ranks, n tokens of a chunk.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from titans_pretrain.model.layers import full_precision

CHUNK_BYTES = 1 << 28  # of a chunk's logits in float32: 2,048 tokens of 32,000 pieces
ALIGNED = 128  # tokens of a chunk are a multiple of it, as matrix products like best
MAX, SUM = dist.ReduceOp.MAX, dist.ReduceOp.SUM


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, group: Any) -> Tensor:
    """Cross-entropy of every target, (B, T), in float32 nats (float64 where the inputs are).

    Matrix products are in the inputs' precision, all else in the result's: so are the sums of the
    weight's gradient over chunks.

    Args:
        hidden: (B, T, D), the same on every tensor rank.
        weight: (V / R, D), this rank's rows of the head.
        targets: (B, T) token ids in [0, V); others are refused, on a GPU without waiting for it.
        group: the tensor ranks; None where the weight is whole.
    """
    losses: Tensor = _LinearCrossEntropy.apply(hidden, weight, targets, group)
    return losses


def check_ids(ids: Tensor, vocabulary: int) -> None:
    """An id no rank holds would count as zeros. On a GPU this does not wait for the result."""
    known = ((ids >= 0) & (ids < vocabulary)).all()
    torch._assert_async(known, f"token ids outside of [0, {vocabulary})")


def chunk_tokens(share: int) -> int:
    """Tokens of a chunk, of a rank's share of the vocabulary."""
    tokens = CHUNK_BYTES // (4 * share)
    return max(1, tokens - tokens % ALIGNED if tokens > ALIGNED else tokens)


class _Chunk(NamedTuple):
    """Some tokens, and where this rank's rows of the head hold their targets.

    Attributes:
        place: the tokens among all.
        rows: (n, D) hidden states.
        columns: (n, 1) the target's row of this rank's, any where another rank holds it.
        elsewhere: (n, 1) bool, where another rank does; None where the weight is whole.
    """

    place: slice
    rows: Tensor
    columns: Tensor
    elsewhere: Tensor | None

    def own(self, x: Tensor) -> Tensor:
        """(n, 1) with zeros where another rank holds the target."""
        return x if self.elsewhere is None else x.masked_fill(self.elsewhere, 0)


def _chunks(hidden: Tensor, weight: Tensor, targets: Tensor, group: Any) -> Iterator[_Chunk]:
    rows, columns, share = hidden.flatten(0, -2), targets.flatten()[:, None], weight.shape[0]
    elsewhere = None
    if group is not None:
        columns = columns - group.rank() * share
        elsewhere = (columns < 0) | (columns >= share)
        columns = columns.clamp(0, share - 1)
    size = chunk_tokens(share)
    for first in range(0, len(rows), size):
        part = slice(first, first + size)
        yield _Chunk(
            part, rows[part], columns[part], None if elsewhere is None else elsewhere[part]
        )


def _above(logits: Tensor, largest: Tensor) -> Tensor:
    """exp(x - max x) of (n, V / R) in full precision; logits that are in it are overwritten."""
    if logits.dtype == largest.dtype:
        return logits.sub_(largest).exp_()
    return (logits - largest).exp_()


def _all_reduce(x: Tensor, operation: Any, group: Any) -> Tensor:
    if group is not None:
        dist.all_reduce(x, operation, group=group)
    return x


def _losses(chunk: _Chunk, weight: Tensor, group: Any) -> Tensor:
    """(3, n, 1): the losses, the largest logits, and the denominators above these."""
    logits = chunk.rows @ weight.T
    largest = _all_reduce(full_precision(logits.amax(-1, keepdim=True)), MAX, group)
    predicted = chunk.own(logits.gather(1, chunk.columns) - largest)
    denominator = _above(logits, largest).sum(-1, keepdim=True)
    predicted, denominator = _all_reduce(torch.stack([predicted, denominator]), SUM, group)
    return torch.stack([denominator.log() - predicted, largest, denominator])


def _by_logits(chunk: _Chunk, weight: Tensor, known: Tensor, by_loss: Tensor) -> Tensor:
    """The derivative (n, V / R) by the chunk's logits, in their precision."""
    logits = chunk.rows @ weight.T
    largest, denominator = known
    above = _above(logits, largest)
    above.scatter_add_(1, chunk.columns, -chunk.own(denominator))
    return torch.mul(above, by_loss / denominator, out=logits)


class _LinearCrossEntropy(Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, group: Any) -> Tensor:
        ranks = 1 if group is None else group.size()
        check_ids(targets, ranks * weight.shape[0])
        known = full_precision(hidden.new_empty(())).new_empty((3, targets.numel(), 1))
        for chunk in _chunks(hidden, weight, targets, group):
            known[:, chunk.place] = _losses(chunk, weight, group)
        ctx.group = group
        ctx.save_for_backward(hidden, weight, targets, known[1:].clone())
        return known[0].view(targets.shape).clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        hidden, weight, targets, known = ctx.saved_tensors
        by_loss = grads[0].reshape(-1, 1)
        by_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format)
        by_rows = by_hidden.view(-1, hidden.shape[-1])
        by_weight = torch.zeros_like(weight, dtype=known.dtype)
        under_way = []
        for chunk in _chunks(hidden, weight, targets, ctx.group):
            place = chunk.place
            by_logits = _by_logits(chunk, weight, known[:, place], by_loss[place])
            by_rows[place] = by_logits @ weight
            if ctx.group is not None:  # while the weight's gradient is computed
                work = dist.all_reduce(by_rows[place], group=ctx.group, async_op=True)
                under_way.append(work)
            if by_weight.dtype == by_logits.dtype:
                by_weight.addmm_(by_logits.T, chunk.rows)
            else:
                by_weight += by_logits.T @ chunk.rows
            del by_logits  # before the next chunk's are made
        for work in under_way:
            work.wait()
        return by_hidden, by_weight.to(weight.dtype), None, None
