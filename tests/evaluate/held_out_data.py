"""Small prepared corpora."""

import json
import random
from pathlib import Path

from titans_pretrain import cli

WORDS = ("river", "learns", "at", "test", "time", "small", "waves", "of", "surprise", "pass")


def prepare(directory: Path, *options: str, vocabulary: int = 300, seed: int = 0) -> Path:
    """The manifest of a corpus prepared with a tokenizer of its own."""
    directory.mkdir(parents=True)
    dice = random.Random(seed)
    with open(directory / "text.jsonl", "w") as handle:
        for number in range(120):
            text = " ".join(dice.choice(WORDS) for _ in range(dice.randint(20, 120)))
            handle.write(json.dumps({"id": str(number), "text": text}) + "\n")
    text, model, data = (directory / name for name in ("text.jsonl", "tokenizer.model", "data"))
    size = str(vocabulary)
    tokenizer = ["--input", str(text), "--vocab-size", size, "--output", str(model)]
    assert not cli.main(["data", "tokenizer", *tokenizer])
    source = ["--input", str(text), "--tokenizer", str(model), "--output", str(data)]
    assert not cli.main(["data", "prepare", *source, *options])
    return data / "manifest.json"
