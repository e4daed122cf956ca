"""What the contenders of prepare_data.py wrote, read back as the ids of each document.

Everything is read with tarfile, numpy and pyarrow alone. Documents come in the corpus's order.
"""

import io
import json
import struct
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
from numpy.typing import NDArray

Ids = NDArray[Any]
MEGATRON_MAGIC = b"MMIDIDX\x00\x00"
MEGATRON_TYPES = {4: np.int32, 8: np.uint16}


def equal(documents: Sequence[Ids], reference: Sequence[Ids]) -> int:
    """How many documents have exactly the reference's ids."""
    return sum(map(np.array_equal, documents, reference))


def saved(path: Path) -> list[Ids]:
    """Of an encoder alone; there is no EOS."""
    with np.load(path, allow_pickle=False) as file:
        return _cut(file["ids"], file["lengths"])


def with_eos(documents: Iterable[Ids], eos: int) -> list[Ids]:
    """The same documents, each ended by EOS."""
    return [np.append(ids, np.asarray(eos, ids.dtype)) for ids in documents]


def ours(directory: Path, files: Iterable[Path]) -> list[Ids]:
    """Of a prepared directory, by the identifiers in its provenance."""
    found = {}
    for shard in json.loads((directory / "manifest.json").read_text())["shards"]:
        with tarfile.open(directory / shard["name"]) as tar:
            arrays = [np.load(io.BytesIO(tar.extractfile(member).read())) for member in tar]
        stream = np.concatenate(arrays)
        rows = pyarrow.parquet.read_table(directory / shard["provenance"]["name"]).to_pylist()
        for row in rows:
            found[row["id"]] = stream[row["offset"] : row["offset"] + row["tokens"]]
    order = (pyarrow.parquet.read_table(file, columns=["id"]).column(0) for file in files)
    nothing = np.zeros(0, np.uint16)
    return [found.get(name, nothing) for column in order for name in column.to_pylist()]


def datatrove(directory: Path, seed: int) -> list[Ids]:
    """Of DocumentTokenizer's shuffled file, put back into order."""
    (tokens,) = directory.glob("*.ds")
    ends = np.fromfile(f"{tokens}.index", np.uint64).astype(np.int64)
    width = tokens.stat().st_size // int(ends[-1])
    stream = np.fromfile(tokens, np.uint16 if width == 2 else np.uint32)
    pieces = _cut(stream, np.diff(ends, prepend=0))
    documents = [stream] * len(pieces)
    for place, document in enumerate(np.random.default_rng(seed).permutation(len(pieces))):
        documents[document] = pieces[place]
    return documents


def megatron(prefix: Path) -> list[Ids]:
    """Of an indexed dataset, ``PREFIX_text_document.{bin,idx}``."""
    index = Path(f"{prefix}_text_document.idx").read_bytes()
    assert index.startswith(MEGATRON_MAGIC)
    kind, sequences = struct.unpack_from("<BQ", index, len(MEGATRON_MAGIC) + 8)
    start = len(MEGATRON_MAGIC) + 8 + 1 + 8 + 8
    lengths = np.frombuffer(index, np.int32, sequences, start)
    return _cut(np.fromfile(f"{prefix}_text_document.bin", MEGATRON_TYPES[kind]), lengths)


def _cut(stream: Ids, lengths: NDArray[Any]) -> list[Ids]:
    return np.split(stream, np.cumsum(lengths)[:-1])
