"""A tiny model exported once a session, for the folders of tests whose conftest takes it."""

from pathlib import Path

import pytest
from tiny_run import make_run

from titans_pretrain.export import huggingface

_MADE: dict[str, Path] = {}  # a fixture that two conftests import would be made twice


@pytest.fixture(scope="session")
def run(tmp_path_factory) -> Path:
    """A run of a tiny MAC with one checkpoint; not to be changed."""
    if "run" not in _MADE:
        _MADE["run"] = make_run(tmp_path_factory.mktemp("run") / "tiny")
    return _MADE["run"]


@pytest.fixture(scope="session")
def exported(run, tmp_path_factory) -> Path:
    """The run's model in Hugging Face's format; not to be changed."""
    if "exported" not in _MADE:
        out = tmp_path_factory.mktemp("export") / "model"
        huggingface.export(run, out)
        _MADE["exported"] = out
    return _MADE["exported"]
