"""Reading a checkpoint at any number of ranks, whatever number wrote it."""

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import state_dict_loader
from torch.distributed.checkpoint.api import CheckpointException

from titans_pretrain.checkpoint import agreement
from titans_pretrain.checkpoint import format as layout
from titans_pretrain.checkpoint.planner import ShardLoadPlanner
from titans_pretrain.checkpoint.storage import ShardReader, box_key
from titans_pretrain.checkpoint.tensor_file import DTYPES, open_file, read_part
from titans_pretrain.errors import TitansError, UserError
from titans_pretrain.parallel import devices
from titans_pretrain.parallel.shards import FlatShard

_SHOWN = 5


def load(path: Path, shards: Sequence[FlatShard]) -> dict[str, Any]:
    """Fill the shards in place; collective over the default process group, or alone without one.

    Checksums are not compared here: take ``path`` from ``newest_good``, or ``verify`` it.

    Args:
        path: a ``step-N`` directory.
        shards: this rank's parts, all names of the checkpoint over all ranks; any cut.

    Returns:
        The ``state`` that was saved.

    Raises:
        UserError: on all ranks alike: missing or unexpected names, other shapes or dtypes.
        TitansError: on all ranks alike: a file is damaged or cannot be read.
    """
    doing = f"loading {path}"
    wanted = agreement.on_all(doing, lambda: [shard.name for shard in shards if prod(shard.shape)])
    names = {name for rank in wanted for name in rank}
    _refuse_another_model(
        path,
        agreement.on_all(
            doing,
            lambda: _differences(layout.read_index(path)["tensors"], names, shards),
            fix=layout.CHOOSE,
        ),
    )
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            planner = ShardLoadPlanner(shards)
            state_dict_loader.load({}, storage_reader=ShardReader(path), planner=planner)
    except CheckpointException as error:
        raise agreement.translate(doing, error, fix=layout.CHOOSE) from None
    return agreement.on_all(doing, lambda: layout.read_state(path), fix=layout.CHOOSE)[
        devices.rank()
    ]


def read_tensors(path: Path, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Whole logical tensors, one at a time, in the order of their names; in this process alone.

    Args:
        path: a ``step-N`` directory.
        prefix: what the names start with.

    Yields:
        Full name and tensor, on the CPU, in the dtype it was saved in.
    """
    names = sorted(name for name in layout.read_index(path)["tensors"] if name.startswith(prefix))
    yield from zip(names, read_named(path, names), strict=True)


def read_named(path: Path, names: Iterable[str]) -> Iterator[torch.Tensor]:
    """Like ``read_tensors``, for exactly these names in this order."""
    index = layout.read_index(path)
    for name in names:
        yield _assemble(path, index["files"], name, index["tensors"][name])


def _assemble(path: Path, files: list[str], name: str, entry: Mapping[str, Any]) -> torch.Tensor:
    shape = entry["shape"]
    tensor = torch.empty(shape, dtype=DTYPES[entry["dtype"]])
    filled = 0
    for file, *numbers in entry["boxes"]:
        offsets, sizes = numbers[: len(shape)], numbers[len(shape) :]
        with open_file(path / files[file]) as handle:
            part = read_part(handle, box_key(name, offsets), (0,) * len(sizes), sizes)
        window = tuple(
            slice(start, start + size) for start, size in zip(offsets, sizes, strict=True)
        )
        tensor[window] = part
        filled += part.numel()
    if filled != tensor.numel():
        raise TitansError(
            f"{name}: the checkpoint holds {filled} of its {tensor.numel()} elements",
            where=str(path),
            fix=layout.CHOOSE,
        )
    return tensor


def _refuse_another_model(path: Path, differences: Sequence[str]) -> None:
    """Of all ranks' differences tell the first."""
    for rank, difference in enumerate(differences):
        if difference:
            raise UserError(
                f"the checkpoint is of another model or optimizer: {difference}",
                where=f"{path} (rank {rank})",
                fix=f"use the model section of {path / 'config.yaml'}, or give this run another "
                "run.directory",
            )


def _differences(stored: Mapping[str, Any], wanted: set[str], shards: Sequence[FlatShard]) -> str:
    """What the checkpoint and the shards do not agree on; empty if nothing."""
    complaints = []
    if missing := sorted(wanted - set(stored)):
        complaints.append(f"missing from the checkpoint: {_some(missing)}")
    if unexpected := sorted(set(stored) - wanted):
        complaints.append(f"unexpected in the checkpoint: {_some(unexpected)}")
    different: dict[str, None] = {}
    for shard in shards:
        entry = stored.get(shard.name)
        if entry is None:
            continue
        if tuple(entry["shape"]) != shard.shape:
            different[f"{shard.name} {tuple(entry['shape'])} instead of {shard.shape}"] = None
        elif DTYPES[entry["dtype"]] != shard.tensor.dtype:
            stored_dtype = DTYPES[entry["dtype"]]
            different[f"{shard.name} {stored_dtype} instead of {shard.tensor.dtype}"] = None
    if different:
        complaints.append(f"different in the checkpoint: {_some(list(different))}")
    return "; ".join(complaints)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
