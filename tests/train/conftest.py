"""Prepared data of a few thousand tokens, and the ``titans train`` command on it."""

import json
import os
import random
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

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


@dataclass
class Run:
    """A run's file and directory, and the command that trains it."""

    file: Path
    directory: Path

    def start(self, *arguments, **environment):
        """The running command; its output is read by ``end``."""
        return subprocess.Popen(
            [sys.executable, "-m", "titans_pretrain.cli", "train", str(self.file), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        )

    def train(self, *arguments, timeout=120, **environment):
        """Run the command to its end: exit code, standard output, standard error."""
        return end(self.start(*arguments, **environment), timeout)

    def rows(self):
        """Whole rows of metrics.jsonl."""
        path = self.directory / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def timeless(self):
        """Its rows without what depends on the clock."""
        clock = ("seconds", "tokens_per_second")
        return [{k: v for k, v in row.items() if k not in clock} for row in self.rows()]

    def steps_saved(self):
        return sorted(
            int(path.name.removeprefix("step-"))
            for path in (self.directory / "checkpoints").glob("step-*")
        )

    def wait_for_step(self, step, process, timeout=90):
        deadline = time.monotonic() + timeout
        while not any(row["step"] >= step for row in self.rows()):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline, f"step {step} not reached"
            time.sleep(0.05)

    def processes(self):
        """The ranks' process numbers."""
        ranks = json.loads((self.directory / "ranks.json").read_text())
        return [ranks[str(rank)]["pid"] for rank in range(len(ranks))]


def end(process, timeout=120):
    try:
        out, complaints = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return process.returncode, out, complaints


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
            base[section] = base[section] | values
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump(base))
        return Run(file, tmp_path / name)

    return make
