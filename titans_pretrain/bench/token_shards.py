"""A prepared directory around a stream of tokens that nobody tokenized, to read it from."""

import io
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
from numpy.typing import NDArray

from data_prep import manifest, schema
from data_prep.settings import Settings
from data_prep.tar import MEMBER_TOKENS, BlockSums, TarWriter
from data_prep.window import npy
from titans_pretrain.files import sha256_file, write_json

EOS = 2


def write(folder: Path, stream: NDArray[np.uint16], shard_tokens: int, vocab_size: int) -> Path:
    """Write shards of a stream, each one document, and their manifest; returns its path.

    Args:
        folder: a new directory.
        stream: (tokens,), ids from 3.
        shard_tokens: of a shard, the last one shorter.
        vocab_size: ids are below it.
    """
    folder.mkdir(parents=True)
    (folder / manifest.TOKENIZER).write_bytes(b"no tokenizer: these tokens come from no text")
    starts = range(0, len(stream), shard_tokens)
    shards = [
        _shard(folder, f"00000-{number:05d}", stream[start : start + shard_tokens])
        for number, start in enumerate(starts)
    ]
    settings = Settings(member_tokens=MEMBER_TOKENS)
    content: dict[str, Any] = {
        "format": schema.FORMAT,
        "shards": shards,
        "held_out": [],
        "tokens": len(stream),
        "held_out_tokens": 0,
        "documents": {"read": len(shards), "kept": len(shards)},
        "unigram_entropy": float(np.log(vocab_size)),
        "vocab_size": vocab_size,
        "eos_id": EOS,
        "bos_id": 1,
        "bos": False,
        "dtype": "uint16",
        "masks": False,
        "tokenizer_sha256": sha256_file(folder / manifest.TOKENIZER),
        "settings": asdict(settings),
        "tasks": 1,
        "inputs": [],
    }
    path = folder / manifest.MANIFEST
    write_json(path, content | {"fingerprint": manifest.fingerprint(content)})
    return path


def _shard(folder: Path, name: str, stream: NDArray[np.uint16]) -> dict[str, Any]:
    """Write a shard's tar, index and provenance; its entry in the manifest."""
    out, sums = io.BytesIO(), BlockSums()
    tar = TarWriter(out)
    for number, start in enumerate(range(0, len(stream), MEMBER_TOKENS)):
        tar.write(f"{name}-{number:06d}.npy", stream[start : start + MEMBER_TOKENS])
    tar.close()
    sums.add(stream)
    documents = {"id": [name], "url": [""], "dump": [""], "offset": [0], "tokens": [len(stream)]}
    parquet = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(documents), parquet)
    return {
        "task": 0,
        "tokens": len(stream),
        "documents": 1,
        **_file(folder / f"{name}.tar", out.getvalue()),
        "provenance": _file(folder / f"{name}.documents.parquet", parquet.getvalue()),
        "index": _file(folder / f"{name}.index.npy", npy(sums.finish())),
    }


def _file(path: Path, content: bytes) -> Mapping[str, Any]:
    path.write_bytes(content)
    return {"name": path.name, "bytes": len(content), "sha256": sha256_file(path)}
