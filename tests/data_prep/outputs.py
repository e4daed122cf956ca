"""Looking into prepared directories."""

import numpy as np

from data_prep import manifest
from data_prep.tar import TarStream


def content(directory):
    """Every final file's bytes."""
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir()) if path.is_file()}


def stream(output, done, shard):
    return TarStream.open(
        output / shard["name"], dtype=done["dtype"], member_tokens=done["settings"]["member_tokens"]
    )


def documents(output, kind="shards"):
    """The ids of all documents, EOS included, in the stream's order."""
    done = manifest.load(output / manifest.MANIFEST)
    found = []
    for shard in done[kind]:
        tokens = stream(output, done, shard)
        ids = tokens.read(0, tokens.tokens)
        ends = np.flatnonzero(ids == done["eos_id"]) + 1
        found += [part.tolist() for part in np.split(ids, ends)[:-1]]
    return found


def texts(output, model, kind="shards"):
    """All documents, decoded, in the stream's order."""
    return [model.decode(ids[:-1]) for ids in documents(output, kind)]
