"""Runs of other libraries' models, and of the project's own baselines, exported."""

import json
from types import SimpleNamespace

import pytest
import torch
import yaml
from tokenizer_models import train
from transformers import AutoModelForCausalLM

from titans_pretrain import config as run_config
from titans_pretrain.checkpoint.save import save
from titans_pretrain.errors import TitansError, UserError
from titans_pretrain.export import huggingface, verification
from titans_pretrain.inference import generate
from titans_pretrain.inference.streamer import Streamer
from titans_pretrain.parallel.construct import construct
from titans_pretrain.parallel.shards import FlatShard

SPAN = verification.SPAN  # as users have it
SIZE = {"vocab_size": 512, "hidden_size": 32, "initializer_range": 0.3}
OWN = {**SIZE, "hf": "titans_baseline", "num_heads": 2, "intermediate_size": 32}
MODELS = {
    "llama": {
        **SIZE,
        "hf": "llama",
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "tie_word_embeddings": True,
    },
    # its matrix products round otherwise where gradients may be wanted
    "mamba": {**SIZE, "hf": "mamba", "num_hidden_layers": 2, "state_size": 4},
    "mamba2": {
        **SIZE,
        "hf": "mamba2",
        "num_hidden_layers": 2,
        "num_heads": 4,
        "head_dim": 16,
        "state_size": 8,
        "n_groups": 1,
        "chunk_size": 8,
    },
    "linear": {
        **OWN,
        "num_hidden_layers": 4,
        "mixers": ["retnet", "gla", "deltanet", "gated_deltanet"],
    },
    "h2": {
        **OWN,
        "num_hidden_layers": 4,
        "mixers": ["mamba2", "gated_deltanet", "window", "ttt_mlp"],
    },
    "rmt": {
        **OWN,
        "num_hidden_layers": 2,
        "mixers": ["window"],
        "memory_embeddings": 2,
        "segment_length": 8,
    },
}


def make_run(directory, name):
    """A run's directory with one checkpoint, and the model in it."""
    sections = {
        "model": MODELS[name],
        "data": {"manifest": "/secret/place/manifest.json", "sequence_length": 16},
        "train": {"steps": 4, "global_batch_size": 2, "learning_rate": 0.001},
        "run": {"directory": str(directory), "name": f"tiny-{name}"},
    }
    config = run_config.resolve(sections, source="test")
    model = construct(config.model, 0).eval()
    shards = [
        FlatShard(f"parameters/{key}", tuple(p.shape), 0, p.numel(), p.detach().reshape(-1))
        for key, p in model.named_parameters()
    ]
    files = {"config.yaml": run_config.dump(config).encode(), "tokenizer.model": train()}
    save(directory / "checkpoints", 4, shards, state={"step": 4}, files=files, keep=3)
    return model


@pytest.fixture(
    params=[
        *("llama", "mamba", "h2"),
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("mamba2", "rmt")),
    ]
)
def exported(request, tmp_path, proven_here):
    model = make_run(tmp_path / "run", request.param)
    huggingface.export(tmp_path / "run", tmp_path / "model")
    return SimpleNamespace(name=request.param, model=model, directory=tmp_path / "model")


def test_the_export_is_the_trained_model_and_says_what_it_is(exported):
    own = MODELS[exported.name]["hf"] == "titans_baseline"
    network, tokenizer = generate.load(exported.directory)
    ids = torch.randint(512, (2, 21))
    with torch.no_grad():
        wanted = exported.model(ids, use_cache=False).logits
        assert torch.equal(network(ids, use_cache=False).logits, wanted)
    settings = json.loads((exported.directory / "config.json").read_text())
    assert ("auto_map" in settings) == own
    assert bool(list(exported.directory.glob("*.py"))) == own
    assert settings["eos_token_id"] == tokenizer.eos_token_id
    assert settings["pad_token_id"] == tokenizer.pad_token_id
    card = (exported.directory / "README.md").read_text()
    facts = yaml.safe_load(card.split("---")[1])
    assert facts["library_name"] == "transformers"
    assert "secret" not in card
    assert ("trust_remote_code" in card) == own
    assert ("Python" in card) == own
    assert "AutoModelForCausalLM.from_pretrained(PATH" in card


def test_text_is_generated_from_it(exported, capsys):
    sampling = generate.Sampling(max_new_tokens=4, temperature=0)
    told = generate.generate(exported.directory, "river", sampling, device="cpu")
    network, tokenizer = generate.load(exported.directory)
    row = tokenizer("river", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        for _ in range(4):
            last = network(row, use_cache=False).logits[:, -1:].argmax(-1)
            row = torch.cat([row, last], 1)
    begin, new = row[0, :-4], row[0, -4:]
    streamer = Streamer(tokenizer, begin.tolist())
    streamer.add(new.tolist())
    streamer.end()
    assert told == streamer.text
    assert capsys.readouterr().out == f"{told}\n" * 2


def test_changed_bytes_of_a_baseline_of_ours_are_refused(tmp_path, proven_here):
    make_run(tmp_path / "run", "rmt")
    huggingface.export(tmp_path / "run", tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(UserError, match="the model is damaged"):
        generate.load(tmp_path / "model")


@pytest.mark.parametrize(("key", "value"), [("window_size", 500), ("chunk_size", 256)])
def test_a_length_that_only_long_texts_show_is_proven_too(
    key, value, tmp_path, monkeypatch, proven_here
):
    def write(model, directory):
        original(model, directory)
        path = directory / "config.json"
        settings = json.loads(path.read_text())
        assert settings[key] != value
        path.write_text(json.dumps(settings | {key: value}))

    original = huggingface._write_model_files
    monkeypatch.setattr(huggingface, "_write_model_files", write)
    monkeypatch.setattr(verification, "SPAN", SPAN)
    mixers = {"num_hidden_layers": 2, "mixers": ["gated_deltanet", "window"]}
    monkeypatch.setitem(MODELS, "hybrid", OWN | mixers)
    make_run(tmp_path / "run", "hybrid")
    with pytest.raises(TitansError, match="its logits differ"):
        huggingface.export(tmp_path / "run", tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "h2"])
def test_a_clean_process_needs_nothing_of_the_project(tmp_path, name):
    make_run(tmp_path / "run", name)
    huggingface.export(tmp_path / "run", tmp_path / "model")
    names = {path.name for path in (tmp_path / "model").glob("*.py")}
    assert names == (
        set()
        if name == "llama"
        else {
            "attention_blocks.py",
            "attention_flex.py",
            "baseline_layers.py",
            "cache.py",
            "causal_lm.py",
            "configuration_baseline.py",
            "layers.py",
            "layout.py",
            "linear_mixers.py",
            "mamba_mixers.py",
            "modeling_baseline.py",
            "recurrences.py",
            "ttt.py",
        }
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", trust_remote_code=True)
    assert model.config.vocab_size == 512
