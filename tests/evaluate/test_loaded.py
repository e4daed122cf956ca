"""What is known of a model before and after it is loaded."""

import importlib
import json
import shutil
import sys

import pytest
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

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
    assert (model.dtype, model.longest) == ("float32", None)
    assert loaded.facts(tiny_model)["step"] == 7
    assert loaded.trained_length(tiny_model) == 64
    numbers = sum(parameter.numel() for parameter in model.network.parameters())
    assert loaded.parameters(tiny_model) == numbers


def test_another_manifest_is_another_model(copy):
    before = loaded.fingerprint(copy)
    told = manifest.read(copy)
    records = [manifest.FileRecord(**entry) for entry in told.pop("files")]
    manifest.write(copy, records, told | {"step": 8})
    assert loaded.fingerprint(copy) != before


def _changed(path):
    """Another byte at a file's end, its size as it was."""
    contents = path.read_bytes()
    path.write_bytes(contents[:-1] + bytes([contents[-1] ^ 1]))


def test_without_a_manifest_the_bytes_of_what_decides_results_tell_models_apart(foreign):
    assert (loaded.facts(foreign), loaded.trained_length(foreign)) == ({}, None)
    prints = [loaded.fingerprint(foreign)]
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        _changed(foreign / name)
        prints.append(loaded.fingerprint(foreign))
    _changed(next(iter(foreign.glob("*.py"))))
    prints.append(loaded.fingerprint(foreign))
    assert len(set(prints)) == 6
    (foreign / "README.md").write_text("of no importance")
    assert loaded.fingerprint(foreign) == prints[-1]


def test_the_code_that_runs_a_model_is_told_apart(foreign, tmp_path, monkeypatch):
    assert loaded.code(foreign) == loaded.code_of("titans_baseline")
    installed = tmp_path / "own_code"
    installed.mkdir()
    (installed / "memory.py").write_text("a = 1")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(loaded, "_OWN_CODE", "own_code")
    before = loaded.code(foreign)
    (installed / "notes.txt").write_text("of no importance")
    assert loaded.code(foreign) == before
    _changed(installed / "memory.py")
    assert loaded.code(foreign) != before
    written_out = "titans_pretrain.model.modeling_baseline:BaselineForCausalLM"
    assert loaded.code_of(written_out) == loaded.code(foreign)
    (foreign / "config.json").write_text('{"model_type": "llama"}')
    assert loaded.code(foreign) == f"transformers {transformers.__version__}"


@pytest.mark.parametrize("name", ["lstm/__init__.py", "lstm/parts/cell.py", "lstm.py"])
def test_the_code_of_an_installed_package_is_that_of_its_modules(name, copy, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    named = {"format": "titans-export/1", "training": {"hf": "lstm.parts:Class"}}
    manifest.write(copy, [], named)
    assert loaded.code(copy) == "not installed"
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("a = 1")
    importlib.invalidate_caches()
    before = loaded.code(copy)
    _changed(path)
    assert loaded.code(copy) != before
    assert "lstm" not in sys.modules


def test_a_model_of_another_kind_is_compared_with_its_manifest(foreign):
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}
    network = LlamaForCausalLM(LlamaConfig(vocab_size=300, num_hidden_layers=1, **sizes))
    network.save_pretrained(foreign)
    names = [path.name for path in foreign.iterdir()]
    records = [manifest.record_file(foreign, name) for name in names]
    manifest.write(foreign, records, {"format": "titans-export/1"})
    assert loaded.load(foreign, device="cpu").longest == 2048
    _changed(foreign / "model.safetensors")
    with pytest.raises(UserError, match=r"damaged: model\.safetensors differs"):
        loaded.load(foreign, device="cpu")


def test_positions_are_those_of_the_configuration(foreign):
    assert loaded.positions(foreign) is None
    for name in ("max_position_embeddings", "n_positions"):
        (foreign / "config.json").write_text(json.dumps({name: 77}))
        assert loaded.positions(foreign) == 77


@pytest.mark.parametrize("contents", [b"", b"\x04\0\0\0\0\0\0\0[1]]", b"\x02\0\0\0\0\0\0\0{}"])
def test_weights_without_a_header_are_a_failure_and_an_empty_one_counts_nothing(foreign, contents):
    (foreign / "model.safetensors").write_bytes(contents)
    if contents.endswith(b"{}"):
        assert loaded.parameters(foreign) == 0
        return
    with pytest.raises(TitansError, match=r"model\.safetensors cannot be read"):
        loaded.parameters(foreign)
