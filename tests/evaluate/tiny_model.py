"""A tiny untrained model in the format of ``titans export``, made without a run."""

import random
from pathlib import Path

import torch
from tiny import MODEL, write_text

from titans_pretrain import cli
from titans_pretrain.checkpoint import manifest
from titans_pretrain.export import huggingface, tokenizer
from titans_pretrain.model.configuration_titans import TitansConfig
from titans_pretrain.model.modeling_titans import TitansForCausalLM


def make_tokenizer(directory: Path, vocabulary: int = 300) -> Path:
    """A sentencepiece model."""
    directory.mkdir(parents=True, exist_ok=True)
    text, out = directory / "text.jsonl", directory / "tokenizer.model"
    write_text(text, 40, random.Random(0))
    words = ["--input", str(text), "--vocab-size", str(vocabulary), "--output", str(out)]
    assert not cli.main(["data", "tokenizer", *words])
    return out


def write_model(directory: Path, pieces: bytes, *, sequence_length: int = 64, **model) -> Path:
    """The directory, made with random weights large enough that its answers differ."""
    torch.manual_seed(0)
    settings = MODEL | {"initializer_range": 0.3} | model | tokenizer.special_ids(pieces)
    config = TitansConfig(**settings)
    config.architectures = ["TitansForCausalLM"]
    network = TitansForCausalLM(config)
    directory.mkdir(parents=True)
    network.save_pretrained(directory)
    huggingface._write_model_files(network, directory)
    tokenizer.write(pieces, directory)
    names = sorted(path.name for path in directory.iterdir())
    records = [manifest.record_file(directory, name) for name in names]
    training = {"sequence_length": sequence_length, "fingerprint": None}
    manifest.write(
        directory, records, {"format": "titans-export/1", "step": 7, "training": training}
    )
    return directory
