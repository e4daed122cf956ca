"""Small prepared data: of a made-up corpus, or of given tokens."""

import io
import json
import random
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_prep import inputs, manifest, plan, schema, task
from data_prep.settings import Settings
from data_prep.tar import BlockSums, TarWriter
from data_prep.window import npy
from titans_pretrain.files import sha256_file, write_json

TEXT = "a memory that learns what surprises it and forgets what it does not need"
WORDS = TEXT.split()
EOS = 2


def corpus(count):
    draw = random.Random(count)
    return [" ".join(draw.choices(WORDS, k=draw.randint(3, 15))) for _ in range(count)]


def documents_of(tokens, seed=0):
    """A stream of that many tokens: documents of 1 to 60 tokens, each ended by EOS."""
    draw = np.random.default_rng(seed)
    stream = draw.integers(3, 300, tokens)
    ends = np.cumsum(draw.integers(2, 61, tokens))
    stream[ends[ends < tokens]] = EOS
    stream[-1] = EOS
    return stream


def masks_of(stream, start=0, stop=None):
    """Which tokens of a stream are trained on as targets, (stop - start,)."""
    stop = stream.tokens if stop is None else stop
    out = np.ones(stop - start, bool)
    stream.copy([out], np.array([start]), np.array([stop]), mask=True)
    return out


def prepared(folder, model, rows, **settings):
    """The manifest of rows that `titans data prepare` tokenized."""
    folder.mkdir(exist_ok=True)
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"shard_bytes": 20_000, "member_tokens": 500} | settings
    items = inputs.find([str(folder / "a.jsonl")])
    command = ["--input", str(folder / "a.jsonl")]
    plan.freeze(items, model, folder / "out", Settings(**settings), 1, command)
    task.prepare(folder / "out", 0, workers=0, say=lambda line: None)
    return folder / "out/manifest.json"


def written(
    folder,
    streams,
    *,
    held_out=(),
    masks=None,
    member_tokens=500,
    dtype="uint16",
    model=b"m",
    bos=False,
    held_out_share=0.0,
):
    """The manifest of shards that hold given streams of tokens, documents ended by EOS.

    Args:
        folder: new directory.
        streams: arrays of tokens, a training shard each.
        held_out: likewise, held-out shards.
        masks: arrays of 0 and 1 for every stream, then for every held-out one.
        member_tokens: tokens of a tar member.
        dtype: of stored tokens.
        model: bytes that pose as the tokenizer.
        bos: what the manifest tells.
        held_out_share: likewise.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / manifest.TOKENIZER).write_bytes(model)
    names = [f"00000-{i:05d}" for i in range(len(streams))]
    names += [f"held-out-00000-{i:05d}" for i in range(len(held_out))]
    entries = [
        _shard(folder, name, np.asarray(stream, dtype), masks and masks[i], member_tokens)
        for i, (name, stream) in enumerate(zip(names, [*streams, *held_out], strict=True))
    ]
    content = {
        "shards": entries[: len(streams)],
        "held_out": entries[len(streams) :],
        "dtype": dtype,
        "masks": masks is not None,
        "tokenizer_sha256": sha256_file(folder / manifest.TOKENIZER),
        "bos": bos,
        "settings": asdict(Settings(member_tokens=member_tokens, held_out=held_out_share)),
    }
    return write_manifest(folder, content, member_tokens)


def write_manifest(folder, content, member_tokens):
    """``manifest.json`` around shards."""
    settings = Settings(member_tokens=member_tokens)
    shards, held_out = content["shards"], content["held_out"]
    content = {
        "format": schema.FORMAT,
        "tokens": sum(shard["tokens"] for shard in shards),
        "held_out_tokens": sum(shard["tokens"] for shard in held_out),
        "documents": {"read": 1, "kept": 1},
        "unigram_entropy": 1.0,
        "vocab_size": 300,
        "eos_id": EOS,
        "bos_id": 1,
        "bos": False,
        "settings": asdict(settings),
        "tasks": 1,
        "inputs": [],
    } | content
    path = folder / "manifest.json"
    write_json(path, content | {"fingerprint": manifest.fingerprint(content)})
    return path


def _shard(folder, name, stream, mask, member_tokens):
    out, sums, mask_sums = io.BytesIO(), BlockSums(), BlockSums()
    tar = TarWriter(out)
    for number, start in enumerate(range(0, len(stream), member_tokens)):
        part = slice(start, start + member_tokens)
        tar.write(f"{name}-{number:06d}.npy", stream[part])
        if mask is not None:
            tar.write(f"{name}-{number:06d}.mask.npy", np.asarray(mask[part], np.uint8))
    tar.close()
    sums.add(stream)
    index = sums.finish()
    if mask is not None:
        mask_sums.add(np.asarray(mask, np.uint8))
        index = np.stack([index, mask_sums.finish()])
    ends = np.flatnonzero(stream == EOS) + 1
    ends = ends if len(ends) and ends[-1] == len(stream) else np.append(ends, len(stream))
    starts = np.append(0, ends[:-1])
    documents = {
        "id": [f"{name}/{i}" for i in range(len(starts))],
        "url": [f"https://example.org/{name}/{i}" for i in range(len(starts))],
        "dump": ["CC-1"] * len(starts),
        "offset": starts,
        "tokens": ends - starts,
    }
    parquet = io.BytesIO()
    pq.write_table(pa.table(documents), parquet)
    return {
        "task": 0,
        "tokens": len(stream),
        "documents": len(starts),
        **_file(folder / f"{name}.tar", out.getvalue()),
        "provenance": _file(folder / f"{name}.documents.parquet", parquet.getvalue()),
        "index": _file(folder / f"{name}.index.npy", npy(index)),
    }


def _file(path: Path, content):
    path.write_bytes(content)
    return {"name": path.name, "bytes": len(content), "sha256": sha256_file(path)}
