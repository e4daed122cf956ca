"""Prepared data of a few thousand tokens, and the ``titans train`` command on it."""

import json
import random

import pytest
import yaml
from run_command import Run

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


@pytest.fixture(scope="session")
def manifest(tmp_path_factory):
    """The manifest of a prepared corpus."""
    directory = tmp_path_factory.mktemp("corpus")
    dice = random.Random(0)
    with open(directory / "text.jsonl", "w") as handle:
        for number in range(120):
            text = " ".join(dice.choice(WORDS) for _ in range(dice.randint(20, 120)))
            handle.write(json.dumps({"id": str(number), "text": text}) + "\n")
    text, model, data = (directory / name for name in ("text.jsonl", "tokenizer.model", "data"))
    assert not cli.main(
        ["data", "tokenizer", "--input", str(text), "--vocab-size", "300", "--output", str(model)]
    )
    assert not cli.main(
        ["data", "prepare", "--input", str(text), "--tokenizer", str(model), "--output", str(data)]
    )
    return data / "manifest.json"


@pytest.fixture
def make_run(manifest, tmp_path):
    """``make_run(name, train={…}, …)``: a tiny run with changed sections."""

    def make(name="run", **sections):
        base = {
            "model": dict(MODEL),
            "data": {
                "manifest": str(manifest),
                "sequence_length": 32,
                "validation_fraction": 0.05,
            },
            "train": {
                "steps": 6,
                "global_batch_size": 4,
                "learning_rate": 0.01,
                "warmup_steps": 2,
                "precision": "fp32",
                "validation_every": 3,
                "validation_sequences": 3,
            },
            "checkpoint": {"every": 2},
            "run": {"directory": str(tmp_path / name)},
        }
        for section, values in sections.items():
            base[section] = base.get(section, {}) | values
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump(base))
        return Run(file, tmp_path / name)

    return make
