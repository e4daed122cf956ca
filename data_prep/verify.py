"""``titans data verify`` and ``inspect``: is a prepared directory whole, and what is in it."""

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_prep import manifest
from data_prep.tar import TarStream
from data_prep.tokenizer import Tokenizer
from titans_pretrain.errors import UserError
from titans_pretrain.files import sha256_file


def verify(directory: Path) -> dict[str, Any]:
    """Check every file of a prepared directory against its manifest.

    Checksums, sizes, member and token counts, ids below the vocabulary's size, EOS at the end of
    every document and of every shard, masks of 0 and 1, and no tar that the manifest lacks. Each
    problem is printed on stdout.

    Returns:
        The manifest's content.

    Raises:
        UserError: anything is wrong; the fix is the command that redoes it.
    """
    content = manifest.load(directory / manifest.MANIFEST)
    problems = list(_directory_problems(directory, content))
    for shard in content["shards"]:
        fix = manifest.redo(directory, shard["task"])
        problems += [(text, fix) for text in shard_problems(directory, content, shard)]
    for problem, _ in problems:
        print(problem)
    if problems:
        first, fix = problems[0]
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        raise UserError(f"{count}, first: {first}", where=str(directory), fix=fix)
    return content


def _directory_problems(directory: Path, content: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What is wrong besides the shards, each with its fix."""
    path = directory / manifest.TOKENIZER
    copy = f"copy back the model with sha256 {content['tokenizer_sha256']}"
    if not path.exists():
        yield f"{path.name} is missing", copy
    elif sha256_file(path) != content["tokenizer_sha256"]:
        yield f"{path.name} is not the tokenizer that the data was prepared with", copy
    known = {shard["name"] for shard in content["shards"]}
    for extra in sorted(path.name for path in directory.glob("*.tar")):
        if extra not in known:
            yield f"{extra} is not in the manifest", f"remove {directory / extra}"
    merge = f"run `titans data merge --output {directory}`"
    if sum(shard["tokens"] for shard in content["shards"]) != content["tokens"]:
        yield "the shards' tokens do not add up to the manifest's", merge
    if sum(shard["documents"] for shard in content["shards"]) != content["documents"]["kept"]:
        yield "the shards' documents do not add up to the manifest's", merge


def shard_problems(
    directory: Path, content: Mapping[str, Any], shard: Mapping[str, Any]
) -> Iterator[str]:
    """What is wrong with one shard and its provenance."""
    for entry in (shard, shard["provenance"]):
        path = directory / entry["name"]
        if problem := _file_problem(path, entry):
            yield problem
            return
    try:
        stream = open_stream(directory, content, shard)
    except UserError as error:
        yield error.what
        return
    name = shard["name"]
    if stream.tokens != shard["tokens"]:
        yield f"{name} holds {stream.tokens} tokens instead of {shard['tokens']}"
    if stream.masks != content["masks"]:
        yield f"{name} has {'' if stream.masks else 'no '}masks, against the manifest"
    ends = []
    position = 0
    for member, tokens, mask in stream.chunks():
        if len(tokens) and tokens.max() >= content["vocab_size"]:
            yield f"{name}, {member}: id {tokens.max()} in a vocabulary of {content['vocab_size']}"
        if mask is not None and mask.max(initial=0) > 1:
            yield f"{name}, {member}: the mask holds {mask.max()}"
        ends.append(position + np.flatnonzero(tokens == content["eos_id"]))
        position += len(tokens)
    yield from _boundary_problems(directory, shard, np.concatenate(ends), position)


def _file_problem(path: Path, entry: Mapping[str, Any]) -> str:
    """How a file departs from its entry in the manifest, or an empty string."""
    if problem := manifest.size_problem(path, entry["bytes"]):
        return problem
    try:
        found = sha256_file(path)
    except OSError as error:
        return f"{path.name} cannot be read: {error.strerror}"
    return "" if found == entry["sha256"] else f"{path.name} does not have its checksum"


def _boundary_problems(
    directory: Path, shard: Mapping[str, Any], ends: Any, tokens: int
) -> Iterator[str]:
    """Documents as the stream's EOS, the manifest and the provenance tell them."""
    name = shard["name"]
    if not len(ends) or ends[-1] != tokens - 1:
        yield f"{name} does not end with EOS"
    if len(ends) != shard["documents"]:
        yield f"{name} holds {len(ends)} documents instead of {shard['documents']}"
    table = pq.read_table(directory / shard["provenance"]["name"])
    told = table["offset"].to_numpy() + table["tokens"].to_numpy() - 1
    if not np.array_equal(told, ends):
        yield f"{shard['provenance']['name']} does not tell where the documents of {name} end"


def open_stream(directory: Path, content: Mapping[str, Any], shard: Mapping[str, Any]) -> TarStream:
    """A shard's tokens."""
    return TarStream.open(
        directory / shard["name"],
        dtype=content["dtype"],
        member_tokens=content["settings"]["member_tokens"],
    )


def inspect(directory: Path, documents: int) -> None:
    """Print counts and the first documents, decoded.

    Raises:
        UserError: no manifest, or a tokenizer other than the data's.
    """
    content = manifest.load(directory / manifest.MANIFEST)
    size = sum(bytes_ for _, bytes_ in manifest.sizes(content["shards"]))
    counts = content["documents"]
    dropped = ", ".join(f"{counts[r]:,} {r}" for r in counts if r not in ("read", "kept"))
    print(f"shards            {len(content['shards'])} ({size:,} bytes)")
    print(f"tokens            {content['tokens']:,} ({content['dtype']})")
    print(f"documents         {counts['kept']:,} of {counts['read']:,} (dropped: {dropped})")
    print(f"vocabulary        {content['vocab_size']:,}, EOS {content['eos_id']}")
    print(f"unigram entropy   {content['unigram_entropy']:.3f} nats per token")
    print(f"fingerprint       {content['fingerprint']}")
    tokenizer = load_tokenizer(directory, content)
    for shard in content["shards"]:
        if documents <= 0:
            break
        table = pq.read_table(directory / shard["provenance"]["name"]).slice(0, documents)
        _show(open_stream(directory, content, shard), table, tokenizer, shard["name"])
        documents -= table.num_rows


def load_tokenizer(directory: Path, content: Mapping[str, Any]) -> Tokenizer:
    """The directory's tokenizer.

    Raises:
        UserError: it is missing or not the one that the data was prepared with.
    """
    tokenizer = Tokenizer(directory / manifest.TOKENIZER)
    if tokenizer.sha256 != content["tokenizer_sha256"]:
        raise UserError(
            "the tokenizer is not the one that the data was prepared with",
            where=str(tokenizer.path),
            fix=f"copy back the model with sha256 {content['tokenizer_sha256']}",
        )
    return tokenizer


def _show(stream: TarStream, table: pa.Table, tokenizer: Tokenizer, name: str) -> None:
    for row in table.to_pylist():
        print(f"\n--- {name} {row['offset']}: {row['id'] or 'no id'}, {row['tokens']} tokens")
        ids = stream.read(row["offset"], row["tokens"] - 1)
        sys.stdout.write(tokenizer.decode(ids.tolist()) + "\n")
