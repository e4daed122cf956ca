"""Applies a mesh to a built model, from outside: layers are split, boundaries are given ends."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from titans_pretrain.model.boundary import Boundary
from titans_pretrain.parallel import loss_head, tensor
from titans_pretrain.parallel.groups import Groups
from titans_pretrain.parallel.mesh import Mesh
from titans_pretrain.parallel.replay import Replay
from titans_pretrain.parallel.sequence import SpanBoundary
from titans_pretrain.parallel.sequence_comm import Links
from titans_pretrain.parallel.whereabouts import Whereabouts


class Parallel:
    """How one rank takes part in a model; made by all ranks together.

    Args:
        mesh: the grid of ranks.
        rank: this rank.
        activation_checkpointing: whether blocks are recomputed in backward.
        whereabouts: told what the rank waits for.

    Attributes:
        groups: the rank's process groups.
        links: its channels to the spans before and after its own.
        replay: what recomputed blocks received in forward.
    """

    def __init__(
        self,
        mesh: Mesh,
        rank: int,
        *,
        activation_checkpointing: bool = False,
        whereabouts: Whereabouts | None = None,
    ) -> None:
        self.mesh = mesh
        self.whereabouts = whereabouts or Whereabouts()
        self.groups = Groups(mesh, rank)
        self.links = Links(mesh, rank, self.whereabouts)
        self.replay = Replay(activation_checkpointing)

    def apply(self, unit: nn.Module, name: str) -> None:
        """Split a part of a model over tensor ranks, and give its layers this rank's span.

        Its head can answer with losses then.

        Args:
            unit: materialised weights, equal on all ranks.
            name: its full name in the model, ``""`` for a whole one.
        """
        tensor.split(unit, name, self.groups, self.replay)
        loss_head.place(unit, name)
        for place, module in unit.named_modules(prefix=name):
            if isinstance(module, GradientCheckpointingLayer):
                module.register_forward_pre_hook(self._tell(place))
            if self.mesh.sequence > 1 and isinstance(getattr(module, "boundary", None), Boundary):
                module.boundary = SpanBoundary(place, self.groups, self.links, self.replay)

    def _tell(self, place: str) -> Callable[[nn.Module, Any], None]:
        """A hook that says which block runs."""
        return lambda module, arguments: self.whereabouts.at(place)

    def span(self, columns: Tensor) -> Tensor:
        """This rank's share of the columns of (rows, T), or of (rows, T + 1) tokens.

        Of T + 1 the last column is a target only; every span has such a one, the next span's first.
        """
        ranks, index = self.mesh.sequence, self.groups.sequence_rank
        if ranks == 1:
            return columns
        length, extra = divmod(columns.shape[1], ranks)
        if extra > 1 or not length:
            raise ValueError(f"{columns.shape[1]} columns do not divide into {ranks} equal spans")
        return columns[:, index * length : (index + 1) * length + extra]
