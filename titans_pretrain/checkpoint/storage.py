"""Tensors on disk for torch.distributed.checkpoint: safetensors and JSON, never a pickle."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    WriteItem,
)
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from titans_pretrain.checkpoint import format as layout
from titans_pretrain.checkpoint import tensor_file


class ShardReader(StorageReader):
    """Reads the boxes back; of a file only the parts that are asked for."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.files: dict[MetadataIndex, str] = {}

    def reset(self, checkpoint_id: Any = None) -> None:
        """Nothing is kept between loads: a reader serves one."""

    def read_metadata(self) -> Metadata:  # type: ignore[override]
        """The index of all boxes; every rank reads the one index."""
        return decode(layout.read_index(self.directory))

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        """Learn which box lies in which file."""
        self.files = metadata.storage_data

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """The plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """The plans as they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Copy every requested part into the planner's tensors."""
        by_file: dict[str, list[ReadItem]] = {}
        for item in plan.items:
            by_file.setdefault(self.files[item.storage_index], []).append(item)
        for name, items in by_file.items():
            with tensor_file.open_file(self.directory / name) as handle:
                for item in items:
                    key = _key(item.storage_index)
                    part = tensor_file.read_part(handle, key, item.storage_offsets, item.lengths)
                    target = planner.resolve_tensor(item).detach()
                    target.copy_(part)
                    planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """Readers are made by ``load`` only, never found by a path."""
        return False


def encode(metadata: Metadata) -> dict[str, Any]:
    """torch.distributed.checkpoint's metadata as JSON values.

    A tensor's boxes are lists ``[file, *offsets, *sizes]``, the file an index into ``files``.
    """
    files = sorted(set(metadata.storage_data.values()))
    number = {name: index for index, name in enumerate(files)}
    tensors = {}
    for name, entry in metadata.state_dict_metadata.items():
        assert isinstance(entry, TensorStorageMetadata)
        tensors[name] = {
            "dtype": tensor_file.CODES[entry.properties.dtype],
            "shape": list(entry.size),
            "boxes": [
                [
                    number[metadata.storage_data[MetadataIndex(name, chunk.offsets)]],
                    *chunk.offsets,
                    *chunk.sizes,
                ]
                for chunk in entry.chunks
            ],
        }
    return {"format": layout.FORMAT, "files": files, "tensors": tensors}


def decode(index: Mapping[str, Any]) -> Metadata:
    """What ``encode`` wrote, as torch.distributed.checkpoint's metadata."""
    entries: dict[str, Any] = {}
    places = {}
    for name, entry in index["tensors"].items():
        chunks = []
        for file, *numbers in entry["boxes"]:
            rank = len(entry["shape"])
            offsets, sizes = torch.Size(numbers[:rank]), torch.Size(numbers[rank:])
            chunks.append(ChunkStorageMetadata(offsets, sizes))
            places[MetadataIndex(name, offsets)] = index["files"][file]
        properties = TensorProperties(dtype=tensor_file.DTYPES[entry["dtype"]])
        entries[name] = TensorStorageMetadata(properties, torch.Size(entry["shape"]), chunks)
    return Metadata(entries, storage_data=places)


def box_key(name: str, offsets: Iterable[int]) -> str:
    """A box's name inside its file."""
    return f"{name}@{','.join(map(str, offsets))}"


def _key(index: MetadataIndex) -> str:
    assert index.offset is not None
    return box_key(index.fqn, index.offset)


def entry_of(item: WriteItem) -> tensor_file.Entry:
    """A box as its file names it."""
    data = item.tensor_data
    assert data is not None
    return tensor_file.Entry(_key(item.index), data.properties.dtype, tuple(data.chunk.sizes))
