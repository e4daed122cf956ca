"""A memory on disk is whole, the right model's, or refused."""

import dataclasses
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_run import make_model

from titans_pretrain.errors import UserError
from titans_pretrain.inference.memory_file import Memory, Owner, Reading, fingerprint, load, save
from titans_pretrain.inference.prefill import new_cache, prefill

OWNER = Owner("exported/demo", "f" * 64, "float32")


@pytest.fixture(scope="module")
def model():
    return make_model("mac")


@pytest.fixture(scope="module")
def memory(model):
    cache = new_cache(model)
    with torch.inference_mode():
        prefill(model, torch.arange(3, 30)[None], cache)
    return Memory(cache, 27, "o", " bo\n漢", Reading(7, "a" * 64, "b"))


@pytest.fixture
def path(memory, tmp_path):
    save(tmp_path / "memory", memory, OWNER)
    return tmp_path / "memory"


def test_what_is_loaded_is_what_was_saved(model, memory, path):
    found = load(path, model, OWNER)
    for ours, theirs in zip(found.cache.layers, memory.cache.layers, strict=True):
        assert ours.state.keys() == theirs.state.keys()
        for name, tensor in theirs.state.items():
            assert torch.equal(ours.state[name], tensor)
            assert ours.state[name].dtype == tensor.dtype
    facts = (memory.tokens, memory.context, memory.pending, memory.reading)
    assert (found.tokens, found.context, found.pending, found.reading) == facts


def test_it_counts_columns_anew(model, memory, path):
    assert memory.cache.get_seq_length() == 27
    assert load(path, model, OWNER).cache.get_seq_length() == 0
    assert int(load(path, model, OWNER).cache.position(1, torch.device("cpu"))) == 27


def test_tensors_are_named_by_layer_and_state(memory, path):
    wanted = {f"layer.1.{name}" for name in memory.cache.layers[1].state}
    assert {name for name in load_file(path) if name.startswith("layer.1.")} == wanted


def test_a_memory_of_nothing_is_kept_too(model, tmp_path):
    save(tmp_path / "memory", Memory(new_cache(model), pending="M"), OWNER)
    found = load(tmp_path / "memory", model, OWNER)
    assert not found.cache.is_initialized
    assert found.pending == "M"


def test_a_changed_byte_is_told_about(model, path):
    whole = path.read_bytes()
    for at in (3, 20, whole.index(b"pending") + 12, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(UserError, match=r"cannot be read|is no memory"):
            load(path, model, OWNER)


@pytest.mark.parametrize("size", [0, 5, 300, -1])
def test_a_file_cut_short_is_told_about(size, model, path):
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(UserError, match="the memory cannot be read"):
        load(path, model, OWNER)


def test_a_file_of_another_kind_is_refused(model, path):
    save_file({"weight": torch.ones(2)}, path)
    with pytest.raises(UserError, match="the file is no memory"):
        load(path, model, OWNER)
    with pytest.raises(UserError, match="there is no such memory"):
        load(path.with_name("missing"), model, OWNER)


def test_a_memory_of_another_model_or_dtype_is_refused_by_name(model, path):
    other = Owner("exported/other", "e" * 64, "bfloat16")
    told = r"exported/demo \(float32\), not exported/other \(bfloat16\)"
    with pytest.raises(UserError, match=told):
        load(path, model, other)
    moved = dataclasses.replace(OWNER, model="elsewhere")
    load(path, model, moved)


def test_the_fingerprint_is_of_configuration_tokenizer_and_weights(exported, tmp_path):
    copy = shutil.copytree(exported, tmp_path / "copy")
    assert fingerprint(copy) == fingerprint(exported)
    (copy / "manifest.json").unlink()
    assert fingerprint(copy) == fingerprint(exported)
    (copy / "README.md").write_text("another card")
    assert fingerprint(copy) == fingerprint(exported)
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        before = (copy / name).read_bytes()
        (copy / name).write_bytes(before + b" ")
        assert fingerprint(copy) != fingerprint(exported)
        (copy / name).write_bytes(before)


def test_what_is_not_whole_leaves_the_older_file(memory, path, monkeypatch):
    before = path.read_bytes()
    monkeypatch.setattr("titans_pretrain.files.os.fsync", _full)
    with pytest.raises(OSError, match="full"):
        save(path, memory, OWNER)
    assert path.read_bytes() == before
    assert [one.name for one in path.parent.iterdir()] == [path.name]


def _full(_):
    raise OSError("the disk is full")
