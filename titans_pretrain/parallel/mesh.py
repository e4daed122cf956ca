"""Which rank does what: pure values from rank counts and the configuration, no communication."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from titans_pretrain.config import MeshSection, TrainSection
from titans_pretrain.errors import UserError

WHOLE_TABLE = 16
SHOWN_AT_EACH_END = 4


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

    def rank_of(self, tensor: int, data: int, sequence: int) -> int:
        """The rank at (tensor, data, sequence) indices."""
        place, sizes = (tensor, data, sequence), (self.tensor, self.data, self.sequence)
        if not all(0 <= index < size for index, size in zip(place, sizes, strict=True)):
            raise ValueError(f"place {place} is not in a grid of {sizes}")
        return tensor + self.tensor * (data + self.data * sequence)

    def tensor_group(self, rank: int) -> tuple[int, ...]:
        """The ranks that share layers with ``rank``, itself included, in tensor order."""
        _, data, sequence = self.coordinates(rank)
        return tuple(self.rank_of(index, data, sequence) for index in range(self.tensor))

    def data_group(self, rank: int) -> tuple[int, ...]:
        """The ranks that shard the parameters together with ``rank``, in data order."""
        tensor, _, sequence = self.coordinates(rank)
        return tuple(self.rank_of(tensor, index, sequence) for index in range(self.data))

    def sequence_group(self, rank: int) -> tuple[int, ...]:
        """The ranks that hold the spans of the same sequences, in the order of the spans."""
        tensor, data, _ = self.coordinates(rank)
        return tuple(self.rank_of(tensor, data, index) for index in range(self.sequence))

    def tensor_groups(self) -> list[tuple[int, ...]]:
        """All tensor groups; every rank is in exactly one."""
        return [
            self.tensor_group(self.rank_of(0, data, sequence))
            for sequence in range(self.sequence)
            for data in range(self.data)
        ]

    def data_groups(self) -> list[tuple[int, ...]]:
        """All data groups; every rank is in exactly one."""
        return [
            self.data_group(self.rank_of(tensor, 0, sequence))
            for sequence in range(self.sequence)
            for tensor in range(self.tensor)
        ]

    def sequence_groups(self) -> list[tuple[int, ...]]:
        """All sequence groups; every rank is in exactly one."""
        return [
            self.sequence_group(self.rank_of(tensor, data, 0))
            for data in range(self.data)
            for tensor in range(self.tensor)
        ]

    def previous(self, rank: int) -> int | None:
        """The rank whose memory states ``rank`` goes on from, None at a sequence's start."""
        tensor, data, sequence = self.coordinates(rank)
        return self.rank_of(tensor, data, sequence - 1) if sequence else None

    def next(self, rank: int) -> int | None:
        """The rank that goes on from the memory states of ``rank``, None at a sequence's end."""
        tensor, data, sequence = self.coordinates(rank)
        return self.rank_of(tensor, data, sequence + 1) if sequence + 1 < self.sequence else None

    def accumulation(self, train: TrainSection) -> int:
        """Micro-batches of a rank in an optimizer step."""
        return train.global_batch_size // (self.data * train.micro_batch_size)

    def table(self) -> str:
        """Who works with whom, for reading in a terminal; large grids show both ends only."""
        ranks: list[int | None] = list(range(self.ranks))
        if self.ranks > WHOLE_TABLE:
            ranks[SHOWN_AT_EACH_END:-SHOWN_AT_EACH_END] = [None]
        heads = (
            "rank",
            "tensor data sequence",
            "shares layers with",
            "shards parameters with",
            "state from",
            "state to",
        )
        rows = [heads, *(self._row(rank) for rank in ranks)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(heads))]
        lines = [
            "  ".join(
                [row[0].rjust(widths[0])]
                + [cell.ljust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
            ).rstrip()
            for row in rows
        ]
        return "\n".join([str(self), *lines, *self._summary()])

    def _row(self, rank: int | None) -> tuple[str, ...]:
        if rank is None:
            return ("…", "", "", "", "", "")
        tensor, data, sequence = self.coordinates(rank)
        before, after = self.previous(rank), self.next(rank)
        return (
            str(rank),
            f"{tensor:>6} {data:>4} {sequence:>8}",
            _others(rank, self.tensor_group(rank)),
            _others(rank, self.data_group(rank)),
            "-" if before is None else str(before),
            "-" if after is None else str(after),
        )

    def _summary(self) -> Iterator[str]:
        """What the left-out rows would show."""
        if self.ranks <= WHOLE_TABLE:
            return
        for kind, first in (("tensor", self.tensor_group(0)), ("data", self.data_group(0))):
            size = len(first)
            each = f" of {size} ranks each" if size > 1 else ", each rank alone"
            yield f"{kind} groups: {self.ranks // size}{each}; the first is {_named(first)}"
        if self.sequence > 1:
            yield (
                f"states go from rank n to n + {self.tensor * self.data}, "
                f"over {self.sequence} sequence ranks"
            )

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
            multiple of data ranks * micro batch; the nearest sizes and meshes that fit are named.
    """
    share = mesh.tensor * mesh.sequence
    if ranks < 1 or ranks % share:
        raise UserError(
            f"{ranks} ranks are no multiple of mesh.tensor * mesh.sequence = "
            f"{mesh.tensor} * {mesh.sequence} = {share}",
            where="--ranks",
            fix=f"start {_either(_fitting_neighbours(ranks, share, train))} ranks"
            + _other_shape(ranks, mesh, train),
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


def _fitting_neighbours(ranks: int, share: int, train: TrainSection) -> list[int]:
    """The rank counts next to ``ranks`` that share and global batch fit; else the share alone."""
    micro_batches = train.global_batch_size // train.micro_batch_size
    fitting = [n * share for n in range(1, micro_batches + 1) if micro_batches % n == 0]
    below = [count for count in fitting if count < ranks][-1:]
    above = [count for count in fitting if count > ranks][:1]
    return below + above or _neighbours(ranks, share)


def _either(values: Sequence[int]) -> str:
    return " or ".join(str(value) for value in values)


def _other_shape(ranks: int, mesh: MeshSection, train: TrainSection) -> str:
    """The tensor and sequence sizes nearest to those asked for that ranks and batch fit.

    Only divisors of those asked for: what can be shared by six ranks can be by two.
    """
    shapes = [
        (tensor, sequence)
        for tensor in _divisors(mesh.tensor, ranks)
        for sequence in _divisors(mesh.sequence, ranks)
        if ranks % (tensor * sequence) == 0
        and train.global_batch_size * tensor * sequence % (ranks * train.micro_batch_size) == 0
    ]
    if not shapes:
        return ""
    tensor, sequence = min(
        shapes,
        key=lambda shape: (abs(shape[0] - mesh.tensor) + abs(shape[1] - mesh.sequence), shape),
    )
    return f", or keep {ranks} with mesh.tensor={tensor} mesh.sequence={sequence}"


def _divisors(value: int, at_most: int) -> list[int]:
    return [n for n in range(1, min(value, at_most) + 1) if value % n == 0]


def _fitting_ranks(ranks: int, share: int, train: TrainSection) -> int | None:
    """The rank count nearest to ``ranks`` that the global batch fits."""
    micro_batches, rest = divmod(train.global_batch_size, train.micro_batch_size)
    if rest:
        return None
    counts = [n * share for n in range(1, micro_batches + 1) if micro_batches % n == 0]
    return min(counts, key=lambda count: abs(count - ranks))


def _others(rank: int, group: Sequence[int]) -> str:
    """The members of a group besides ``rank``, long groups by their ends."""
    return _named([member for member in group if member != rank]) or "-"


def _named(members: Sequence[int]) -> str:
    if len(members) > SHOWN_AT_EACH_END:
        return f"{members[0]} {members[1]} … {members[-1]}"
    return " ".join(map(str, members))
