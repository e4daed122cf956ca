"""A tiny model and a small prepared corpus."""

import json
import random
from pathlib import Path

from titans_pretrain import cli

WORDS = ("river", "learns", "at", "test", "time", "small", "waves", "of", "surprise", "pass")
MODEL = {
    "variant": "lmm",
    "vocab_size": 300,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "intermediate_size": 16,
    "memory_depth": 1,
    "chunk_size": 16,
    "num_persistent_tokens": 2,
}


def write_text(file: Path, count: int, dice: random.Random, prefix: str = "") -> None:
    """Documents of 20 to 120 words; their ids are numbers behind ``prefix``."""
    with open(file, "w") as handle:
        for number in range(count):
            text = " ".join(dice.choice(WORDS) for _ in range(dice.randint(20, 120)))
            handle.write(json.dumps({"id": f"{prefix}{number}", "text": text}) + "\n")


def prepare(directory: Path, *options: str, vocabulary: int = 300) -> Path:
    """The manifest of 120 documents, 20,000 tokens, prepared with a tokenizer of their own."""
    directory.mkdir(parents=True, exist_ok=True)
    text, model, data = (directory / name for name in ("text.jsonl", "tokenizer.model", "data"))
    write_text(text, 120, random.Random(0))
    size = ["--vocab-size", str(vocabulary)]
    assert not cli.main(["data", "tokenizer", "--input", str(text), *size, "--output", str(model)])
    source = ["--input", str(text), "--tokenizer", str(model), "--output", str(data)]
    assert not cli.main(["data", "prepare", *source, *options])
    return data / "manifest.json"
