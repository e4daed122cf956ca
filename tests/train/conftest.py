"""Prepared data of a few thousand tokens, and the ``titans train`` command on it."""

import pytest
import yaml
from run_command import Run
from tiny import MODEL, prepare


@pytest.fixture(scope="session")
def manifest(tmp_path_factory):
    """The manifest of a prepared corpus."""
    return prepare(tmp_path_factory.mktemp("corpus"))


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
