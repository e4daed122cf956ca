"""The proof of an export holds the weights of one block at a time, on either side."""

import json

import pytest
import torch
from tiny_run import VARIANTS, make_model, make_run

from titans_pretrain.baselines import foreign
from titans_pretrain.errors import TitansError
from titans_pretrain.export import huggingface, reload, verification, weights

UNITS = ["model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "lm_head"]
LLAMA = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
LLAMA |= {"hf": "llama", "vocab_size": 512, "num_attention_heads": 2, "num_key_value_heads": 2}


def weightless(model):
    with reload.weightless():
        return type(model)(model.config)


def alive(model):
    """Names of the parameters that have values."""
    named = model.named_parameters(remove_duplicate=False)
    return {name for name, parameter in named if not parameter.is_meta}


def watched(model, empty, asked):
    """``read`` out of a model; notes what is asked for, and that nothing else has values then."""
    held = dict(model.named_parameters())

    def read(names):
        assert alive(empty) == set()
        asked.append(list(names))
        for name in names:
            yield held[name].detach()

    return read


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
def test_one_part_at_a_time_gives_the_bits_of_the_whole_model(variant, tied):
    model = make_model(variant, tie_word_embeddings=tied)
    empty, asked, ids = weightless(model), [], torch.arange(42).view(2, 21)
    assert [name for name, _ in reload.parts(empty)] == UNITS
    with torch.no_grad():
        wanted = model(ids, use_cache=False).logits
    found = reload.logits(empty, ids, watched(model, empty, asked))
    assert torch.equal(found, wanted)
    assert alive(empty) == set()
    head = "model.embed_tokens.weight" if tied else "lm_head.weight"
    assert asked[0] == ["model.embed_tokens.weight"]
    assert asked[-1] == [head]
    for part, names in zip(UNITS[1:-1], asked[1:-1], strict=True):
        assert names == [name for name in dict(model.named_parameters()) if name.startswith(part)]


def test_buffers_of_other_libraries_models_are_real():
    model = foreign.build(LLAMA, seed=0).eval()
    empty, ids = weightless(model), torch.arange(42).view(2, 21)
    with torch.no_grad():
        wanted = model(ids, use_cache=False).logits
    assert torch.equal(reload.logits(empty, ids, watched(model, empty, [])), wanted)


@pytest.fixture
def large(monkeypatch, proven_here):
    """Any model is too large to be loaded whole; the clean process is this one."""
    monkeypatch.setattr(verification, "WHOLE_BYTES", 0)

    def whole(*_):
        pytest.fail("the model was loaded whole")

    monkeypatch.setattr(reload, "_whole", whole)


def test_a_large_model_is_never_loaded_whole_and_its_proof_finds_a_wrong_bit(
    run, tmp_path, monkeypatch, large
):
    options = {"dtype": "bfloat16", "max_shard_size": "30KB"}
    huggingface.export(run, tmp_path / "good", **options)

    def read(checkpoint, names, dtype):
        for name, tensor in zip(names, original(checkpoint, names, dtype), strict=True):
            yield tensor * 1.01 if name.endswith("layers.1.mixer.o_proj.weight") else tensor

    original = weights.read
    written = weights.write

    def write(*arguments):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(weights, "read", read)
            return written(*arguments)

    monkeypatch.setattr(weights, "write", write)
    with pytest.raises(TitansError, match=r"its logits differ .* loaded part by part"):
        huggingface.export(run, tmp_path / "bad", **options)
    assert not (tmp_path / "bad").exists()


def test_weights_of_another_type_are_no_proof(run, tmp_path, monkeypatch, large):
    original = weights.write
    float32 = [torch.float32]
    monkeypatch.setattr(
        weights, "write", lambda source, place, _, limit: original(source, place, *float32, limit)
    )
    with pytest.raises(TitansError, match="its weights are F32"):
        huggingface.export(run, tmp_path / "out", dtype="bfloat16")


def test_files_and_index_must_agree(tmp_path, unproven):
    run = make_run(tmp_path / "run")
    huggingface.export(run, tmp_path / "out", max_shard_size="30KB")
    model = weightless(make_model())
    none = {"missing": [], "unexpected": [], "mismatched": []}
    assert reload.WeightFiles(tmp_path / "out").differences(model) == none
    path = tmp_path / "out" / weights.INDEX
    index = json.loads(path.read_text())
    index["weight_map"]["model.norm.weight"] = index["weight_map"]["model.embed_tokens.weight"]
    index["weight_map"]["no.such.weight"] = index["weight_map"]["model.embed_tokens.weight"]
    path.write_text(json.dumps(index))
    found = reload.WeightFiles(tmp_path / "out").differences(model)
    assert found == none | {"unexpected": ["model.norm.weight", "no.such.weight"]}
