"""What tensor ranks tell each other: sums and gathers of tensors that differ from rank to rank.

Between the places where a layer's work is shared out, all tensor ranks hold the same tensors. Such
a tensor enters the shared work (``enter``), each rank computes its heads from it, and the partial
results are summed (``total``). In backward the directions change: the partial gradients are summed
where a tensor entered, and the gradient of a sum is already that of every part. All ranks make the
same calls in the same order.

Shapes: B batch, T time, D width, R tensor ranks.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from titans_pretrain.parallel.replay import Replay


class Exchange:
    """A place where a block communicates in forward; its recomputation takes what was received.

    Args:
        group: the tensor ranks.
        name: the place's full name in the model.
        replay: keeps what forward received.
    """

    def __init__(self, group: Any, name: str, replay: Replay) -> None:
        self.group = group
        self._name = name
        self._replay = replay

    def total(self, partial: Tensor) -> Tensor:
        """The sum over tensor ranks of a tensor nothing else uses; it is overwritten."""
        summed: Tensor = _Total.apply(partial, self)
        return summed

    def gather(self, part: Tensor) -> Tensor:
        """All ranks' channels (B, T, D / R) next to each other, (B, T, D).

        The gradient of the whole must be partial on every rank, as it is where only shared layers
        use it; it is summed and cut at once.
        """
        gathered: Tensor = _Gather.apply(part, self)
        return gathered

    def all_reduce(self, partial: Tensor) -> Tensor:
        """Sum in place, in forward only."""

        def reduce() -> tuple[Tensor]:
            dist.all_reduce(partial, group=self.group)
            return (partial,)

        return self._replay.once(self._name, reduce)[0]

    def all_gather(self, part: Tensor) -> Tensor:
        """One rank's rows after the other's, (R B, T, D / R), in forward only."""

        def gather() -> tuple[Tensor]:
            parts = part.new_empty((self.group.size() * part.shape[0], *part.shape[1:]))
            dist.all_gather_into_tensor(parts, part.contiguous(), group=self.group)
            return (parts,)

        return self._replay.once(self._name, gather)[0]


class _Total(Function):
    @staticmethod
    def forward(ctx: Any, partial: Tensor, exchange: Exchange) -> Tensor:
        # a view: what the replay keeps must not become part of a graph
        return exchange.all_reduce(partial.detach()).detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _Gather(Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, exchange: Exchange) -> Tensor:
        ctx.group = exchange.group
        by_rank = exchange.all_gather(part).unflatten(0, (ctx.group.size(), -1))
        return by_rank.movedim(0, -2).flatten(-2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        by_rank = grads[0].unflatten(-1, (ctx.group.size(), -1)).movedim(-2, 0)
        own = by_rank.new_empty(by_rank.shape[1:])
        dist.reduce_scatter_tensor(own, by_rank.flatten(0, 1), group=ctx.group)
        return own, None


def enter(whole: Tensor, group: Any) -> Tensor:
    """A tensor all ranks hold alike, at its way into shared layers, which must be all that use it.

    Its gradient, partial on every rank, is summed once for all of them.
    """
    entered: Tensor = _Enter.apply(whole, group)
    return entered


class _Enter(Function):
    @staticmethod
    def forward(ctx: Any, whole: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return whole.view_as(whole)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return sum_gradient(grads[0], ctx.group), None


def sum_gradient(gradient: Tensor, group: Any) -> Tensor:
    """The sum over tensor ranks of their partial gradients, on every rank."""
    summed = gradient.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(summed, group=group)
    return summed
