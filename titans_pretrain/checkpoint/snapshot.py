"""What a rank writes, and a copy of it in host memory that training does not change."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan

from titans_pretrain.checkpoint import agreement
from titans_pretrain.checkpoint.planner import ShardSavePlanner, chunks_of
from titans_pretrain.checkpoint.storage import encode, entry_of
from titans_pretrain.checkpoint.tensor_file import Entry
from titans_pretrain.errors import TitansError
from titans_pretrain.parallel.shards import FlatShard


@dataclass(frozen=True)
class WritePlan:
    """A rank's part of a checkpoint.

    Attributes:
        file: name of the file it writes.
        boxes: the boxes it writes, in the file's order: widest dtype first.
        entries: the same as the file names them.
        index: on rank 0 the index of the whole checkpoint, else None.
    """

    file: str
    boxes: tuple[MetadataIndex, ...]
    entries: tuple[Entry, ...]
    index: dict[str, Any] | None


def plan(shards: Sequence[FlatShard], doing: str, *, fix: str) -> WritePlan:
    """Agree on who writes what; collective. A box that several ranks hold is one rank's.

    Raises:
        TitansError: on all ranks alike: ranks disagree on a tensor, or hold only a part of it
            together; a dtype that is not stored.
    """
    planner = ShardSavePlanner(shards)
    file, kept, index = agreement.through_first(
        doing, planner.create_local_plan, lambda plans: _distribute(planner, plans), fix=fix
    )
    local = planner.create_local_plan()
    items = [item for item, own in zip(local.items, kept, strict=True) if own]
    items.sort(key=lambda item: -entry_of(item).dtype.itemsize)
    return WritePlan(file, tuple(item.index for item in items), tuple(map(entry_of, items)), index)


def layout(shards: Sequence[FlatShard]) -> tuple[object, ...]:
    """All that a plan depends on: equal layouts on every rank mean equal plans."""
    return tuple(
        (shard.name, shard.shape, shard.start, shard.stop, shard.window, shard.tensor.dtype)
        for shard in shards
    )


class HostBuffer:
    """Host memory for a rank's boxes, one behind the other; kept from one save to the next.

    Attributes:
        boxes: views of it, one a box, in the plan's order.
    """

    def __init__(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)
        self.boxes: list[torch.Tensor] = []

    def fill(self, written: WritePlan, shards: Sequence[FlatShard]) -> None:
        """Copy the plan's boxes out of the shards; pinned if these are on a GPU.

        Raises:
            TitansError: the host has no memory for them.
        """
        parts = {
            MetadataIndex(shard.name, chunk.offsets): part
            for shard in shards
            for chunk, part in chunks_of(shard)
        }
        cuda = any(shard.tensor.is_cuda for shard in shards)
        self._reserve(sum(entry.bytes for entry in written.entries), pinned=cuda)
        self.boxes, position = [], 0
        for box, entry in zip(written.boxes, written.entries, strict=True):
            window = self._bytes[position : position + entry.bytes]
            self.boxes.append(window.view(entry.dtype).view(entry.shape))
            self.boxes[-1].copy_(parts[box].detach(), non_blocking=True)
            position += entry.bytes
        if cuda:
            torch.cuda.synchronize()

    def _reserve(self, size: int, *, pinned: bool) -> None:
        if self._bytes.numel() != size:
            self._bytes = torch.empty(0, dtype=torch.uint8)  # frees the old one first
            try:
                self._bytes = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
            except RuntimeError as error:
                taken = 1 << (size - 1).bit_length() if pinned else size
                kind = "pinned, which comes in powers of two" if pinned else "pageable"
                raise TitansError(
                    f"no {taken:,} bytes of host memory ({kind}) for a copy of the {size:,} that "
                    f"this rank writes: {str(error).splitlines()[0]}"
                ) from None


def _distribute(
    planner: ShardSavePlanner, plans: list[SavePlan]
) -> list[tuple[str, list[bool], dict[str, Any] | None]]:
    """Of every rank: its file, which of its boxes it writes, and on rank 0 the index."""
    final, metadata = planner.create_global_plan(plans)
    files = [f"rank-{rank:05d}.safetensors" for rank in range(len(plans))]
    kept = [{item.index for item in chosen.items} for chosen in final]
    metadata.storage_data = {
        box: file for file, boxes in zip(files, kept, strict=True) for box in boxes
    }
    return [
        (file, [item.index in own for item in local.items], encode(metadata) if rank == 0 else None)
        for rank, (file, own, local) in enumerate(zip(files, kept, plans, strict=True))
    ]
