"""A tiny run trained to its end on a tiny corpus, and its model exported."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from tiny import MODEL, prepare
from tiny_model import make_tokenizer, write_model

from titans_pretrain.export import huggingface


@pytest.fixture(scope="session")
def manifest(tmp_path_factory) -> Path:
    """The data of ``trained``; not to be changed."""
    return prepare(tmp_path_factory.mktemp("corpus") / "own")


@pytest.fixture(scope="session")
def train(manifest, tmp_path_factory) -> Callable[[str, str], SimpleNamespace]:
    """``train(precision, dtype)``: a run that validated on 7 sequences, and its exported model."""

    def train(precision: str, dtype: str) -> SimpleNamespace:
        place = tmp_path_factory.mktemp("trained")
        config = {
            "model": MODEL | {"remember_across_documents": False},
            "data": {"manifest": str(manifest), "sequence_length": 32, "validation_fraction": 0.05},
            "train": {
                "steps": 3,
                "global_batch_size": 4,
                "micro_batch_size": 2,
                "learning_rate": 0.01,
                "precision": precision,
                "validation_sequences": 7,
            },
            "run": {"directory": str(place / "run")},
        }
        (place / "run.yaml").write_text(yaml.safe_dump(config))
        command = [sys.executable, "-m", "titans_pretrain.cli", "train", str(place / "run.yaml")]
        done = subprocess.run([*command, "--ranks", "1"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        lines = (place / "run/metrics.jsonl").read_text().splitlines()
        losses = [json.loads(line).get("validation_loss") for line in lines]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(huggingface.verification, "verify", lambda *_: None)
            huggingface.export(place / "run", place / "model", dtype=dtype)
        (loss,) = filter(None, losses)
        return SimpleNamespace(run=place / "run", model=place / "model", validation_loss=loss)

    return train


@pytest.fixture(scope="session")
def trained(train) -> SimpleNamespace:
    """A run in fp32; not to be changed."""
    return train("fp32", "float32")


@pytest.fixture(scope="session")
def tokenizer_model(tmp_path_factory) -> Path:
    """A sentencepiece model of 300 pieces."""
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def tiny_model(tokenizer_model, tmp_path_factory) -> Path:
    """An untrained LMM as exported, its training's sequences of 64 tokens; not to be changed."""
    return write_model(tmp_path_factory.mktemp("tiny") / "model", tokenizer_model.read_bytes())
