"""The process groups of a mesh, as this rank sees them."""

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

from titans_pretrain.parallel.mesh import Mesh


class Groups:
    """This rank's groups along the three axes; made by all ranks together.

    Attributes:
        mesh: the grid of ranks.
        rank: this rank.
        tensor: ranks that share its layers; None where it is the only one.
        data: ranks that shard its parameters and reduce their gradients (ZeRO-3).
        sequence: ranks that hold the other spans of its sequences; None where it holds all.
        tensor_rank, data_rank, sequence_rank: its index along each axis.
    """

    def __init__(self, mesh: Mesh, rank: int) -> None:
        self.mesh, self.rank = mesh, rank
        self.tensor_rank, self.data_rank, self.sequence_rank = mesh.coordinates(rank)
        # All ranks make each group: without need, a group of every single rank.
        self.tensor = own_group(mesh.tensor_groups()) if mesh.tensor > 1 else None
        self.data = own_group(mesh.data_groups())  # DeepSpeed asks for it in any case
        self.sequence = own_group(mesh.sequence_groups()) if mesh.sequence > 1 else None


def own_group(groups: Sequence[tuple[int, ...]]) -> Any:
    """The process group of this rank, of groups that every rank is in exactly one of."""
    group, _ = dist.new_subgroups_by_enumeration([list(members) for members in groups])
    return group
