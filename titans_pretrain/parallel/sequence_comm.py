"""Messages between neighbours in a sequence, and the exchange of heads within one.

Messages carry no tags: of one pair of ranks and one direction they arrive in the order they were
sent, as NCCL has it, and both ends walk the same model in the same order.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import record_function

from titans_pretrain.model.boundary import Like, Tensors
from titans_pretrain.parallel.groups import own_group
from titans_pretrain.parallel.mesh import Mesh
from titans_pretrain.parallel.whereabouts import Whereabouts

Side = Literal["previous", "next"]


class Links:
    """This rank's channels to the ranks that hold the spans before and after its own.

    There is a process group per direction: what goes on never waits behind what comes back. On
    NCCL each pair of a group has a communicator of its own, as torch makes them at first use; the
    first message between two ranks waits for both.

    Args:
        mesh: the grid of ranks.
        rank: this rank.
        whereabouts: told when a message is awaited.

    Attributes:
        ranks: the neighbours, None where the sequence begins or ends.
        bytes_sent: by the name of the place in the model and the side, since the start.
    """

    def __init__(self, mesh: Mesh, rank: int, whereabouts: Whereabouts) -> None:
        self._whereabouts = whereabouts
        self.ranks: dict[Side, int | None] = {
            "previous": mesh.previous(rank),
            "next": mesh.next(rank),
        }
        self._outgoing: dict[Side, Any] = {}
        self._incoming: dict[Side, Any] = {}
        if mesh.sequence > 1:
            forward, backward = (own_group(mesh.sequence_groups()) for _ in range(2))
            self._outgoing = {"previous": backward, "next": forward}
            self._incoming = {"previous": forward, "next": backward}
        self._pending: deque[tuple[Any, Tensor]] = deque()
        self._awaited: deque[tuple[str, int, Any]] = deque()
        whereabouts.awaited = self._first_awaited
        self.bytes_sent: dict[tuple[str, Side], int] = {}

    def has(self, side: Side) -> bool:
        """Whether the sequence goes on there."""
        return self.ranks[side] is not None

    def send(self, side: Side, name: str, tensors: Sequence[Tensor]) -> None:
        """Send tensors as one message, without waiting.

        Args:
            side: to whom.
            name: of the place in the model.
            tensors: any shapes; the message has the widest of their dtypes.
        """
        rank = self.ranks[side]
        assert rank is not None
        with record_function(f"hand-over: {name} to rank {rank}"):
            dtype = _widest(tensor.dtype for tensor in tensors)
            message = torch.cat([tensor.detach().to(dtype).reshape(-1) for tensor in tensors])
            while self._pending and self._pending[0][0].is_completed():
                self._pending.popleft()
            self._post(rank, self._outgoing[side], message, name)
        key = (name, side)
        sent = message.numel() * message.element_size()
        self.bytes_sent[key] = self.bytes_sent.get(key, 0) + sent

    def receive(self, side: Side, name: str, like: Sequence[Like]) -> Tensors:
        """Wait for the next message and take it apart.

        Args:
            side: from whom.
            name: of the place in the model.
            like: what its tensors look like.
        """
        rank = self.ranks[side]
        assert rank is not None
        sizes = [torch.Size(one.shape).numel() for one in like]
        dtype = _widest(one.dtype for one in like)
        message = torch.empty(sum(sizes), dtype=dtype, device=like[0].device)
        with (
            record_function(f"hand-over: {name} from rank {rank}"),
            self._whereabouts.waiting(name, rank),
        ):
            self._take(rank, self._incoming[side], message, name)
        parts = message.split(sizes)
        return tuple(
            part.view(one.shape).to(one.dtype) for part, one in zip(parts, like, strict=True)
        )

    def drain(self) -> None:
        """Let go of everything sent, once it may be (on gloo: once it was taken)."""
        while self._pending:
            self._pending.popleft()[0].wait()

    def _post(self, rank: int, group: Any, message: Tensor, name: str) -> None:
        """Send one flat message."""
        self._pending.append((dist.isend(message, rank, group=group), message))

    def _take(self, rank: int, group: Any, message: Tensor, name: str) -> None:
        """Receive into one flat message."""
        work = dist.irecv(message, rank, group=group)
        assert work is not None
        work.wait()
        if message.is_cuda:  # only the stream waits: the host goes on
            self._first_awaited()
            self._awaited.append((name, rank, work))

    def _first_awaited(self) -> tuple[str, int] | None:
        """The oldest message that the device still waits for, and its sender."""
        while self._awaited:
            name, rank, work = self._awaited[0]
            if not work.is_completed():
                return name, rank
            self._awaited.popleft()
        return None


def _widest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    widest: torch.dtype | None = None
    for dtype in dtypes:
        widest = dtype if widest is None else torch.promote_types(widest, dtype)
    assert widest is not None
    return widest


def heads_for_sequence(tensor: Tensor, group: Any) -> Tensor:
    """All heads of this span (B, H, T, h) for a share of the heads of the whole sequence.

    Returns:
        (B, H / P, P T, h): the sequence of the group's P ranks, this rank's H / P heads.
    """
    ranks = dist.get_world_size(group)
    batch, heads, time, width = tensor.shape
    by_rank = tensor.unflatten(1, (ranks, heads // ranks)).transpose(0, 1)
    spans = _all_to_all(by_rank, group)
    return spans.permute(1, 2, 0, 3, 4).reshape(batch, heads // ranks, ranks * time, width)


def sequence_for_heads(tensor: Tensor, group: Any) -> Tensor:
    """The inverse of ``heads_for_sequence``."""
    ranks = dist.get_world_size(group)
    by_rank = tensor.unflatten(2, (ranks, -1)).permute(2, 0, 1, 3, 4)
    shares = _all_to_all(by_rank, group)
    return shares.transpose(0, 1).flatten(1, 2)


def join_spans(columns: Tensor, group: Any) -> Tensor:
    """(B, T) of every rank of the group, in its order, as (B, P T)."""
    spans = [torch.empty_like(columns) for _ in range(dist.get_world_size(group))]
    dist.all_gather(spans, columns.contiguous(), group=group)
    return torch.cat(spans, 1)


def _all_to_all(tensor: Tensor, group: Any) -> Tensor:
    """Give part i of the first axis to rank i of the group."""
    sent = tensor.contiguous()
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    return received
