"""10,000 shards: seconds from nothing to the first batch, and memory that stays small."""

import json
import os
import subprocess
import sys

import pytest
from made_shards import documents_of, write_manifest, written

SHARDS = 10_000
FIRST_BATCH = """
import sys, time
import torch
begun = time.process_time(), time.perf_counter()
from titans_pretrain.data.loader import SequenceLoader
from titans_pretrain.data.mixture import Corpus
corpus = Corpus.open([(sys.argv[1], 1.0)])
loader = SequenceLoader(corpus, sequence_length=256, seed=0, validation_fraction=None)
batch = loader.batch(step=0, position=0, sequences=256, rank=0, ranks=1)
assert batch.tokens.shape == (256, 257)
print(time.process_time() - begun[0], time.perf_counter() - begun[1])
"""


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """A manifest of 10,000 shards, each a file of its own of 3000 tokens."""
    folder = tmp_path_factory.mktemp("many")
    content = json.loads(written(folder, [documents_of(3000)]).read_text())
    (shard,) = content["shards"]
    entries = []
    for number in range(SHARDS):
        name = f"00000-{number:05d}"
        files = {}
        for key, old in (("tar", shard), ("index", shard["index"])):
            new = old["name"].replace("00000-00000", name)
            if number:
                os.link(folder / old["name"], folder / new)
            files[key] = old | {"name": new}
        provenance = shard["provenance"] | {"name": f"{name}.documents.parquet"}
        entries.append(files["tar"] | {"index": files["index"], "provenance": provenance})
    del content["fingerprint"]
    return write_manifest(folder, content | {"shards": entries}, 500)


def test_the_first_batch_of_10_000_shards_comes_within_2_s(many):
    done = subprocess.run(
        [sys.executable, "-c", FIRST_BATCH, str(many)], capture_output=True, text=True, check=True
    )
    processor, wall = map(float, done.stdout.split())
    assert processor < 2, f"{processor} s of processor time, {wall} s in all"
