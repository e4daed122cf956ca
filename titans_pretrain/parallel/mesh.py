"""Which rank does what: pure values from rank counts and the configuration, no communication."""

from collections.abc import Sequence
from dataclasses import dataclass

from titans_pretrain.config import MeshSection, TrainSection
from titans_pretrain.errors import UserError


@dataclass(frozen=True)
class Mesh:
    """The grid of ranks: tensor fastest, data next, sequence outermost.

    Attributes:
        tensor: ranks that share a layer.
        data: ranks that train on different sequences and share the parameters (ZeRO-3).
        sequence: ranks that share a sequence.
    """

    tensor: int = 1
    data: int = 1
    sequence: int = 1

    @property
    def ranks(self) -> int:
        """Ranks of the whole grid."""
        return self.tensor * self.data * self.sequence

    def coordinates(self, rank: int) -> tuple[int, int, int]:
        """The (tensor, data, sequence) indices of a rank."""
        if not 0 <= rank < self.ranks:
            raise ValueError(f"rank {rank} is not in a grid of {self.ranks}")
        return (
            rank % self.tensor,
            rank // self.tensor % self.data,
            rank // (self.tensor * self.data),
        )

    def data_group(self, rank: int) -> tuple[int, ...]:
        """The ranks that shard the parameters together with ``rank``, in data order."""
        tensor, _, sequence = self.coordinates(rank)
        first = tensor + self.tensor * self.data * sequence
        return tuple(first + self.tensor * index for index in range(self.data))

    def data_groups(self) -> list[tuple[int, ...]]:
        """All data groups; every rank is in exactly one."""
        return sorted({self.data_group(rank) for rank in range(self.ranks)})

    def accumulation(self, train: TrainSection) -> int:
        """Forward passes per rank and optimizer step."""
        return train.global_batch_size // (self.data * train.micro_batch_size)

    def __str__(self) -> str:
        sizes = " x ".join(
            f"{name} {size}"
            for name, size in (
                ("tensor", self.tensor),
                ("data", self.data),
                ("sequence", self.sequence),
            )
        )
        return f"{self.ranks} rank{'s' * (self.ranks > 1)} = {sizes}"


def plan(ranks: int, mesh: MeshSection, train: TrainSection) -> Mesh:
    """The grid for a number of ranks.

    Raises:
        UserError: the ranks are no multiple of tensor * sequence, or the global batch is no
            multiple of data ranks * micro batch; the nearest sizes that fit are named.
    """
    share = mesh.tensor * mesh.sequence
    if ranks < 1 or ranks % share:
        raise UserError(
            f"{ranks} ranks are no multiple of mesh.tensor * mesh.sequence = {share}",
            where="--ranks",
            fix=f"start {_either(_neighbours(ranks, share))} ranks",
        )
    found = Mesh(tensor=mesh.tensor, data=ranks // share, sequence=mesh.sequence)
    unit = found.data * train.micro_batch_size
    if train.global_batch_size % unit:
        fitting = _fitting_ranks(ranks, share, train)
        raise UserError(
            f"train.global_batch_size: {train.global_batch_size} is no multiple of data ranks * "
            f"micro_batch_size = {found.data} * {train.micro_batch_size} = {unit}",
            where=f"train.global_batch_size with {ranks} ranks",
            fix=f"use {_either(_neighbours(train.global_batch_size, unit))}"
            + (f", or start {fitting} ranks" if fitting else ""),
        )
    return found


def _neighbours(value: int, unit: int) -> list[int]:
    """The multiples of ``unit`` next to ``value``."""
    below = value // unit * unit
    return [below, below + unit] if below else [unit]


def _either(values: Sequence[int]) -> str:
    return " or ".join(str(value) for value in values)


def _fitting_ranks(ranks: int, share: int, train: TrainSection) -> int | None:
    """The rank count nearest to ``ranks`` that the global batch fits."""
    micro_batches, rest = divmod(train.global_batch_size, train.micro_batch_size)
    if rest:
        return None
    counts = [n * share for n in range(1, micro_batches + 1) if micro_batches % n == 0]
    return min(counts, key=lambda count: abs(count - ranks))
