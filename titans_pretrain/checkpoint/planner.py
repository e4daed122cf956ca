"""Which box of which tensor a rank writes or reads: planners over flat shards."""

from collections.abc import Iterator, Sequence
from math import prod
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from titans_pretrain.checkpoint.tensor_file import CODES
from titans_pretrain.errors import TitansError
from titans_pretrain.parallel.shards import FlatShard


class ShardSavePlanner(DefaultSavePlanner):
    """Plans to write the boxes of this rank's shards; a box on several ranks is written once."""

    def __init__(self, shards: Sequence[FlatShard]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._shards = shards

    def create_local_plan(self) -> SavePlan:
        """One write item a box."""
        return SavePlan(
            [_write_item(shard, chunk) for shard in self._shards for chunk, _ in chunks_of(shard)]
        )

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """Join the ranks' plans.

        Raises:
            TitansError: ranks disagree on a tensor, or hold only a part of it together.
        """
        _check_agreement(all_plans)
        return super().create_global_plan(all_plans)


class ShardLoadPlanner(DefaultLoadPlanner):
    """Plans to read into this rank's shards, from whatever boxes the checkpoint has."""

    def __init__(self, shards: Sequence[FlatShard]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._shards = shards
        self._targets: dict[tuple[str, tuple[int, ...]], torch.Tensor] = {}

    def create_local_plan(self) -> LoadPlan:
        """One read item for every stored box that a wanted one meets.

        Raises:
            TitansError: the checkpoint's boxes leave a gap.
        """
        assert self.metadata is not None
        wanted_of: dict[str, list[ChunkStorageMetadata]] = {}
        for shard in self._shards:
            for chunk, part in chunks_of(shard):
                wanted_of.setdefault(shard.name, []).append(chunk)
                self._targets[shard.name, tuple(chunk.offsets)] = part
        items = []
        for name, chunks in wanted_of.items():
            entry = self.metadata.state_dict_metadata[name]
            assert isinstance(entry, TensorStorageMetadata)
            reads = create_read_items_for_chunk_list(name, entry, chunks)
            found = sum(item.lengths.numel() for item in reads)
            wanted = sum(chunk.sizes.numel() for chunk in chunks)
            if found != wanted:
                raise TitansError(
                    f"{name}: the checkpoint holds {found} of {wanted} elements of this part"
                )
            items += reads
        return LoadPlan(items)

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        """The part of a shard that ``read_item`` fills."""
        index = read_item.dest_index
        assert index.offset is not None
        part = self._targets[index.fqn, tuple(index.offset)]
        window = zip(read_item.dest_offsets, read_item.lengths, strict=True)
        for dimension, (start, length) in enumerate(window):
            part = part.narrow(dimension, start, length)
        return part


def chunks_of(shard: FlatShard) -> Iterator[tuple[ChunkStorageMetadata, torch.Tensor]]:
    """The shard's boxes and, of each, its elements as a view of the shard."""
    for box in shard.boxes():
        part = shard.tensor[box.start - shard.start : box.stop - shard.start].view(box.sizes)
        yield ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.sizes)), part


def _write_item(shard: FlatShard, chunk: ChunkStorageMetadata) -> WriteItem:
    if shard.tensor.dtype not in CODES:
        raise TitansError(
            f"{shard.name}: {shard.tensor.dtype} is not stored",
            fix="use torch.float32 or torch.bfloat16",
        )
    return WriteItem(
        index=MetadataIndex(shard.name, chunk.offsets),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=chunk,
            properties=TensorProperties(dtype=shard.tensor.dtype),
            size=torch.Size(shard.shape),
        ),
    )


def _check_agreement(plans: list[SavePlan]) -> None:
    """Refuse tensors that ranks know differently, cut crosswise, or hold only in part."""
    known: dict[str, tuple[int, Any]] = {}
    boxes: dict[MetadataIndex, tuple[int, torch.Size]] = {}
    held: dict[str, int] = {}
    for rank, plan in enumerate(plans):
        for item in plan.items:
            data, name = item.tensor_data, item.index.fqn
            assert data is not None
            mine = (tuple(data.size), data.properties.dtype)
            other, theirs = known.setdefault(name, (rank, mine))
            if mine != theirs:
                raise TitansError(f"{name}: rank {rank} holds {mine}, rank {other} {theirs}")
            sizes = data.chunk.sizes
            if item.index not in boxes:
                boxes[item.index] = (rank, sizes)
                held[name] = held.get(name, 0) + sizes.numel()
            elif boxes[item.index][1] != sizes:
                other, theirs = boxes[item.index]
                raise TitansError(
                    f"{name}: rank {rank} holds {tuple(sizes)} from {tuple(data.chunk.offsets)}, "
                    f"rank {other} {tuple(theirs)}"
                )
    for name, (_, (shape, _)) in known.items():
        if held[name] != prod(shape):
            raise TitansError(f"{name}: the ranks hold {held[name]} of its {prod(shape)} elements")
