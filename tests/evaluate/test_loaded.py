"""What is known of a model before and after it is loaded."""

import json
import shutil

import pytest

from titans_pretrain.checkpoint import manifest
from titans_pretrain.errors import TitansError, UserError
from titans_pretrain.evaluate import loaded


@pytest.fixture
def copy(tiny_model, tmp_path):
    return shutil.copytree(tiny_model, tmp_path / "model")


@pytest.fixture
def foreign(copy):
    """A model that ``titans export`` did not write."""
    (copy / manifest.NAME).unlink()
    return copy


def test_a_model_comes_with_what_its_export_tells(tiny_model):
    model = loaded.load(tiny_model, device="cpu")
    assert not model.network.training
    assert (model.dtype, model.longest, model.facts["step"]) == ("float32", None, 7)
    assert model.fingerprint == loaded.fingerprint(tiny_model)
    assert loaded.trained_length(tiny_model) == 64
    numbers = sum(parameter.numel() for parameter in model.network.parameters())
    assert loaded.parameters(tiny_model) == numbers


def test_another_dtype_can_be_asked_for(tiny_model):
    assert loaded.load(tiny_model, device="cpu", dtype="bfloat16").dtype == "bfloat16"
    with pytest.raises(UserError, match="'int8' is unknown"):
        loaded.load(tiny_model, device="cpu", dtype="int8")


def test_another_manifest_is_another_model(copy):
    before = loaded.fingerprint(copy)
    told = manifest.read(copy)
    records = [manifest.FileRecord(**entry) for entry in told.pop("files")]
    manifest.write(copy, records, told | {"step": 8})
    assert loaded.fingerprint(copy) != before


def test_without_a_manifest_settings_and_sizes_tell_models_apart(foreign):
    assert (loaded.facts(foreign), loaded.trained_length(foreign)) == ({}, None)
    prints = [loaded.fingerprint(foreign)]
    settings = json.loads((foreign / "config.json").read_text())
    (foreign / "config.json").write_text(json.dumps(settings | {"chunk_size": 8}))
    prints.append(loaded.fingerprint(foreign))
    with open(foreign / "model.safetensors", "ab") as handle:
        handle.write(b"\0")
    prints.append(loaded.fingerprint(foreign))
    assert len(set(prints)) == 3


@pytest.mark.parametrize("contents", [b"", b"\x04\0\0\0\0\0\0\0[1]]", b"\x02\0\0\0\0\0\0\0{}"])
def test_weights_without_a_header_are_a_failure_and_an_empty_one_counts_nothing(foreign, contents):
    (foreign / "model.safetensors").write_bytes(contents)
    if contents.endswith(b"{}"):
        assert loaded.parameters(foreign) == 0
        return
    with pytest.raises(TitansError, match=r"model\.safetensors cannot be read"):
        loaded.parameters(foreign)
