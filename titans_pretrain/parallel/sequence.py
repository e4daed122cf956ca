"""A layer's boundary where a sequence is cut into spans: states go on, their gradients come back.

Rank r of P holds span r of every sequence. A layer needs from rank r - 1 only that layer's memory
state and a few last inputs, so ranks work on different layers at a time: a pass over L layers takes
L + P - 1 layer times. Whatever does not depend on the state runs before it is awaited, and it is
sent the moment it exists.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from titans_pretrain.model.boundary import Boundary, Like, Tensors
from titans_pretrain.parallel import sequence_comm
from titans_pretrain.parallel.groups import Groups
from titans_pretrain.parallel.replay import Replay
from titans_pretrain.parallel.sequence_comm import Links


class SpanBoundary(Boundary):
    """The ends of this rank's span at one place in the model.

    Args:
        name: of the place.
        groups: the mesh's groups, for the span's place and the exchange of heads.
        links: to the neighbours.
        replay: gives a recomputed block what was received before.
    """

    def __init__(self, name: str, groups: Groups, links: Links, replay: Replay) -> None:
        self.name = name
        self.groups = groups
        self.links = links
        self.replay = replay

    def first(self, tokens: int) -> int:
        """Place in its sequence of the span's first token."""
        return self.groups.sequence_rank * tokens

    def halo(self, length: int, tensors: Tensors, dim: int) -> tuple[Tensors, Tensors]:
        """The last entries of the spans before, from the previous rank; the next one gets ours."""
        if not length:
            return super().halo(length, tensors, dim)
        out = _Halo.apply(self, length, dim, *tensors)
        return out[: len(tensors)], out[len(tensors) :]

    def enter(self, start: Callable[[], Tensors], like: tuple[Like, ...]) -> Tensors:
        """The previous rank's state; at a sequence's first span its start."""
        if not self.links.has("previous"):
            return start()
        anchor = torch.zeros((), device=like[0].device, requires_grad=True)
        entered: Tensors = _Enter.apply(self, like, anchor)
        return entered

    def leave(self, tied: Tensor, state: Tensors) -> Tensor:
        """Send the state to the next rank; what comes before ``tied`` awaits the gradient."""
        if not self.links.has("next"):
            return tied
        left: Tensor = _Leave.apply(self, tied, *state)
        return left

    def whole(self, attend: Callable[..., Tensor], queries: Tensor, *others: Tensor) -> Tensor:
        """Attention over whole sequences, each rank doing a share of the heads."""
        shares = [self._exchange(TO_SEQUENCES, tensor) for tensor in (queries, *others)]
        return self._exchange(TO_SPANS, attend(*shares))

    def joined(self, columns: Tensor, device: torch.device) -> Tensor:
        """What every rank of the sequence holds, in its order; the host waits for it."""
        return sequence_comm.join_spans(columns.to(device), self.groups.sequence).cpu()

    def _exchange(self, way: "Way", tensor: Tensor) -> Tensor:
        exchanged: Tensor = _Exchange.apply(self, way, tensor)
        return exchanged


class _Enter(Function):
    """Receives a state; backward sends its gradient back.

    The anchor puts it into the graph, and keeps it apart from the layer's input: the gradient
    leaves as soon as the scan has it, before that of the projections.
    """

    @staticmethod
    def forward(
        ctx: Any, boundary: SpanBoundary, like: tuple[Like, ...], anchor: Tensor
    ) -> Tensors:
        ctx.boundary = boundary
        name, links = f"{boundary.name}.state", boundary.links
        received = boundary.replay.once(name, lambda: links.receive("previous", name, like))
        return tuple(tensor.detach() for tensor in received)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, None]:
        ctx.boundary.links.send("previous", f"{ctx.boundary.name}.state", grads)
        return None, None, None


class _Leave(Function):
    """Sends a state on; backward waits for its gradient."""

    @staticmethod
    def forward(ctx: Any, boundary: SpanBoundary, tied: Tensor, *state: Tensor) -> Tensor:
        ctx.boundary, ctx.like = boundary, _like(state)
        name = f"{boundary.name}.state"

        def send() -> Tensors:
            boundary.links.send("next", name, state)
            return ()

        boundary.replay.once(f"{name} sent", send)
        return tied.view_as(tied)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        name, links = f"{ctx.boundary.name}.state", ctx.boundary.links
        return None, grads[0], *links.receive("next", name, ctx.like)


class _Halo(Function):
    """Gets the last entries before the span, gives the span's own last ones; backward likewise."""

    @staticmethod
    def forward(
        ctx: Any, boundary: SpanBoundary, length: int, dim: int, *tensors: Tensor
    ) -> Tensors:
        ctx.boundary, ctx.length, ctx.dim = boundary, length, dim
        name = f"{boundary.name}.halo"
        before = boundary.replay.once(
            name, lambda: _look_back(boundary, name, length, dim, tensors)
        )
        ctx.own, ctx.before = _like(tensors), _like(before)
        return *(tensor.view_as(tensor) for tensor in tensors), *(b.detach() for b in before)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        links, name, dim = ctx.boundary.links, f"{ctx.boundary.name}.halo", ctx.dim
        own, before = list(grads[: len(ctx.own)]), list(grads[len(ctx.own) :])
        time, known = own[0].shape[dim], before[0].shape[dim]
        given = min(ctx.length, known + time)
        passes_through = given > time
        if links.has("previous") and not passes_through:
            links.send("previous", name, before)
        if links.has("next"):
            back = links.receive("next", name, [_cut(one, dim, given) for one in ctx.own])
            for index, gradient in enumerate(back):
                passed, kept = gradient.split([max(0, given - time), min(given, time)], dim)
                own[index] = _add_to_last(own[index], kept, dim)
                before[index] = _add_to_last(before[index], passed, dim)
        if links.has("previous") and passes_through:
            links.send("previous", name, before)
        return None, None, None, *own


def _look_back(
    boundary: SpanBoundary, name: str, length: int, dim: int, tensors: Tensors
) -> Tensors:
    """Send the next rank the last entries up to the end of this span; receive those before it."""
    links, time = boundary.links, tensors[0].shape[dim]
    known = min(length, boundary.first(time))
    before = [
        tensor.new_empty(_cut(one, dim, 0).shape)
        for tensor, one in zip(tensors, _like(tensors), strict=True)
    ]
    waits = time < length
    if links.has("next") and not waits:
        links.send("next", name, [_last(tensor, length, dim) for tensor in tensors])
    if links.has("previous"):
        like = [_cut(one, dim, known) for one in _like(tensors)]
        before = list(links.receive("previous", name, like))
    if links.has("next") and waits:
        joined = [torch.cat(pair, dim) for pair in zip(before, tensors, strict=True)]
        links.send("next", name, [_last(tensor, length, dim) for tensor in joined])
    return tuple(before)


class Way(NamedTuple):
    """One direction of the exchange of heads, and the way its gradient takes."""

    forward: Callable[[Tensor, Any], Tensor]
    backward: Callable[[Tensor, Any], Tensor]


TO_SEQUENCES = Way(sequence_comm.heads_for_sequence, sequence_comm.sequence_for_heads)
TO_SPANS = Way(sequence_comm.sequence_for_heads, sequence_comm.heads_for_sequence)


class _Exchange(Function):
    """Exchanges heads for sequence, or back; backward is the other direction."""

    @staticmethod
    def forward(ctx: Any, boundary: SpanBoundary, way: Way, tensor: Tensor) -> Tensor:
        ctx.way, ctx.group = way, boundary.groups.sequence
        name = f"{boundary.name}.heads"
        (exchanged,) = boundary.replay.once(name, lambda: (way.forward(tensor, ctx.group),))
        return exchanged.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, Tensor]:
        return None, None, ctx.way.backward(grads[0], ctx.group)


def _like(tensors: Tensors) -> tuple[Like, ...]:
    return tuple(Like(tuple(tensor.shape), tensor.dtype, tensor.device) for tensor in tensors)


def _cut(like: Like, dim: int, length: int) -> Like:
    """The same with another length along ``dim``."""
    shape = list(like.shape)
    shape[dim] = length
    return like._replace(shape=tuple(shape))


def _last(tensor: Tensor, length: int, dim: int) -> Tensor:
    """At most ``length`` last entries along ``dim``."""
    count = min(length, tensor.shape[dim])
    return tensor.narrow(dim, tensor.shape[dim] - count, count)


def _add_to_last(tensor: Tensor, addend: Tensor, dim: int) -> Tensor:
    """The sum where ``addend`` lies at the end of ``tensor`` along ``dim``."""
    count = addend.shape[dim]
    first, last = tensor.split([tensor.shape[dim] - count, count], dim)
    return torch.cat([first, last + addend], dim)
