"""Files in the safetensors format: written as a stream, read in parts."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from titans_pretrain.checkpoint.manifest import FileRecord
from titans_pretrain.errors import TitansError

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16}
CODES = {dtype: code for code, dtype in DTYPES.items()}
ALIGNMENT = 64


@dataclass(frozen=True)
class Entry:
    """A tensor that a file is to hold.

    Attributes:
        key: its name in the file.
        dtype: float32 or bfloat16.
        shape: its shape.
    """

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Its size in the file."""
        return prod(self.shape) * self.dtype.itemsize


def write(
    path: Path,
    entries: Sequence[Entry],
    tensors: Iterable[torch.Tensor],
    metadata: Mapping[str, str] | None = None,
) -> FileRecord:
    """Write a new file, one tensor in memory at a time; sync it and hash it on the way.

    Args:
        path: the file, which must not exist.
        entries: what it will hold. The first begins at a multiple of 64 bytes, and the next ones
            too while sizes are multiples of it; the format allows no gaps.
        tensors: their values, in the same order, on any device.
        metadata: strings for the header.

    Raises:
        OSError: with the file's name.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for entry in entries:
        header[entry.key] = {
            "dtype": CODES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [position, position + entry.bytes],
        }
        position += entry.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    digest = hashlib.sha256()
    try:
        with open(path, "xb") as handle:
            for data in _pieces(text, entries, tensors):
                handle.write(data)
                digest.update(data)
            handle.flush()
            os.fsync(handle.fileno())
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    return FileRecord(path.name, 8 + len(text) + position, digest.hexdigest())


@contextlib.contextmanager
def open_file(path: Path) -> Iterator[Any]:
    """A file open for ``read_part``; a TitansError names a bad one."""
    try:
        with safe_open(path, framework="pt", device="cpu") as handle:
            yield handle
    except (SafetensorError, OSError, IndexError) as error:
        raise TitansError(
            f"cannot read tensors: {error}",
            where=str(path),
            fix="titans checkpoint verify RUN tells which checkpoints are good",
        ) from None


def read_part(handle: Any, key: str, offsets: Iterable[int], sizes: Iterable[int]) -> torch.Tensor:
    """A hyper-rectangle of one tensor of the file."""
    window = tuple(slice(start, start + size) for start, size in zip(offsets, sizes, strict=True))
    return handle.get_slice(key)[window] if window else handle.get_tensor(key)


def _pieces(
    header: bytes, entries: Sequence[Entry], tensors: Iterable[torch.Tensor]
) -> Iterable[bytes | memoryview]:
    yield len(header).to_bytes(8, "little")
    yield header
    for entry, tensor in zip(entries, tensors, strict=True):
        assert (entry.dtype, entry.shape) == (tensor.dtype, tuple(tensor.shape))
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        yield flat.view(torch.uint8).numpy().data
