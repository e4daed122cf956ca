"""A checkpoint's parameters as safetensors files in Hugging Face's layout, streamed."""

import re
from collections.abc import Iterable, Iterator, Mapping
from math import prod
from pathlib import Path

import torch

from titans_pretrain.checkpoint import tensor_file
from titans_pretrain.checkpoint.format import read_index
from titans_pretrain.checkpoint.load import read_named
from titans_pretrain.checkpoint.manifest import FileRecord, record_file
from titans_pretrain.checkpoint.tensor_file import ALIGNMENT, Entry
from titans_pretrain.errors import TitansError, UserError
from titans_pretrain.export.reload import INDEX, SINGLE
from titans_pretrain.files import write_json

PREFIX = "parameters/"
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


def shard_bytes(size: str) -> int:
    """``"5GB"`` in bytes; KB, MB and GB are powers of ten."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)(KB|MB|GB)", size.upper())
    if not match or not float(match[1]):
        raise UserError(f"{size!r} is no size", where="--max-shard-size", fix="write 5GB or 500MB")
    return int(float(match[1]) * _UNITS[match[2]])


def shapes(checkpoint: Path) -> dict[str, tuple[int, ...]]:
    """Parameter name -> shape, in the order of names."""
    tensors = read_index(checkpoint)["tensors"]
    return {
        name.removeprefix(PREFIX): tuple(entry["shape"])
        for name, entry in sorted(tensors.items())
        if name.startswith(PREFIX)
    }


def check_names(
    stored: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]
) -> None:
    """Refuse a checkpoint whose parameters are not the model's.

    Raises:
        TitansError: naming what is missing, unexpected or of another shape.
    """
    complaints = [f"{name} is missing" for name in wanted if name not in stored]
    complaints += [f"{name} is unexpected" for name in stored if name not in wanted]
    complaints += [
        f"{name} is {stored[name]} instead of {shape}"
        for name, shape in wanted.items()
        if name in stored and stored[name] != shape
    ]
    if complaints:
        raise TitansError(
            f"the checkpoint is not of this model: {'; '.join(complaints[:5])}",
            where="config.yaml",
            fix="export with the version of titans-pretrain that trained it",
        )


def read(checkpoint: Path, names: Iterable[str], dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """Parameters one at a time, in the order of these names, as ``dtype``."""
    for tensor in read_named(checkpoint, [PREFIX + name for name in names]):
        yield tensor.to(dtype)


def write(checkpoint: Path, directory: Path, dtype: torch.dtype, limit: int) -> list[FileRecord]:
    """Write the weights files, one tensor in memory at a time.

    Tensors lie at multiples of 64 bytes as far as the format allows: what is mapped from the file
    then goes through the same kernels as what was trained, and gives the same bits.

    Args:
        checkpoint: a ``step-N`` directory.
        directory: where the files go.
        dtype: of the written weights.
        limit: bytes of tensors a file holds, unless a single one is larger.

    Returns:
        The records of the files.
    """
    entries = [Entry(name, dtype, shape) for name, shape in shapes(checkpoint).items()]
    groups = _groups(entries, limit)
    if len(groups) == 1:
        return [_write_file(checkpoint, directory / SINGLE, groups[0])]
    files, weight_map = [], {}
    for number, group in enumerate(groups, start=1):
        name = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        files.append(_write_file(checkpoint, directory / name, group))
        weight_map.update({entry.key: name for entry in group})
    totals = {
        "total_parameters": sum(prod(entry.shape) for entry in entries),
        "total_size": sum(entry.bytes for entry in entries),
    }
    write_json(directory / INDEX, {"metadata": totals, "weight_map": weight_map})
    return [*files, record_file(directory, INDEX)]


def _groups(entries: Iterable[Entry], limit: int) -> list[list[Entry]]:
    groups: list[list[Entry]] = [[]]
    filled = 0
    for entry in entries:
        if groups[-1] and filled + entry.bytes > limit:
            groups.append([])
            filled = 0
        groups[-1].append(entry)
        filled += entry.bytes
    return groups


def _write_file(checkpoint: Path, path: Path, entries: list[Entry]) -> FileRecord:
    ordered = sorted(entries, key=lambda entry: entry.bytes % ALIGNMENT != 0)
    tensors = read(checkpoint, [entry.key for entry in ordered], ordered[0].dtype)
    return tensor_file.write(path, ordered, tensors, {"format": "pt"})
