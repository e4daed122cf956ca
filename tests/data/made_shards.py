"""Small shards of a made-up corpus."""

import json
import random

from data_prep import inputs, shard
from data_prep.manifest import Settings

TEXT = "a memory that learns what surprises it and forgets what it does not need"
WORDS = TEXT.split()


def corpus(count):
    draw = random.Random(count)
    return [" ".join(draw.choices(WORDS, k=draw.randint(3, 15))) for _ in range(count)]


def prepared(folder, model, rows, **settings):
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"shard_bytes": 20_000, "member_tokens": 500} | settings
    items = inputs.find([str(folder / "a.jsonl")])
    command = ["--input", str(folder / "a.jsonl")]
    shard.prepare(items, model, folder / "out", Settings(**settings), command=command)
    return folder / "out/manifest.json"
