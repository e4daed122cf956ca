import pytest

from titans_pretrain import config
from titans_pretrain.export import model_card


@pytest.mark.parametrize(
    ("name", "trusts"),
    [
        (None, True),
        ("titans_baseline", True),
        ("titans_pretrain.model.modeling_baseline:BaselineForCausalLM", True),
        ("mamba", False),
        ("transformers.models.mistral.modeling_mistral:MistralForCausalLM", False),
    ],
)
def test_the_card_speaks_of_python_files_where_there_are_some(name, trusts):
    told = model_card._use(name)
    assert told["model_class"] == "AutoModelForCausalLM"
    assert ("trust_remote_code" in told["trust"]) == trusts
    assert ("Python" in told["needed"]) == trusts


OWN = {"hidden_size": 32, "num_heads": 2}
MISTRAL = "transformers.models.mistral.modeling_mistral:MistralForCausalLM"


@pytest.mark.parametrize(
    ("model", "tags"),
    [
        ({}, ["titans", "neural-memory", "custom_code", "mac"]),
        (
            {**OWN, "hf": "titans_baseline", "mixers": ["mamba2", "window", "mamba2", "ttt_mlp"]},
            ["mamba2", "window", "ttt_mlp", "custom_code"],
        ),
        (
            {**OWN, "hf": "titans_baseline", "mixers": ["window"], "memory_embeddings": 2},
            ["window", "memory-embeddings", "custom_code"],
        ),
        ({"hf": "llama", "hidden_size": 32}, ["llama"]),
        ({"hf": MISTRAL, "hidden_size": 32}, ["mistral"]),
    ],
)
def test_the_tags_are_single_kinds_and_tell_of_python_files(model, tags):
    data = {"manifest": "/nowhere", "sequence_length": 16}
    train = {"steps": 1, "global_batch_size": 1, "learning_rate": 0.1}
    run = config.resolve(
        {"model": model, "data": data, "train": train, "run": {"directory": "/nowhere"}},
        source="test",
    )
    assert model_card._tags(run) == tags


def test_the_card_tells_nothing_of_the_machine_and_of_accounts():
    parts = [{"manifest": f"/secret/{n}/manifest.json", "weight": n} for n in (3, 1)]
    run = config.resolve(
        {
            "model": {},
            "data": {"mixture": parts, "sequence_length": 16, "cache": "/secret/cache"},
            "train": {
                "steps": 1,
                "global_batch_size": 1,
                "learning_rate": 0.1,
                "init_from": "/secret/model",
            },
            "run": {"directory": "/secret/run", "wandb_project": "secret"},
            "job": {
                "account": "secret",
                "environment": {"WANDB_API_KEY": "secret"},
                "python": "/secret/python",
                "local_directory": "/secret/scratch",
            },
            "pipeline": {
                "export": {"directory": "/secret/model"},
                "eval": {"tasks": ["position"], "options": ["--text=/secret/text"]},
            },
        },
        source="test",
    )
    told = model_card._public(run)
    assert list(told) == ["model", "data", "mesh", "train", "guard"]
    assert "secret" not in str(told)
    assert "/" not in str(told)
    assert told["data"]["mixture"] == [{"weight": 3.0}, {"weight": 1.0}]
    assert run.data.parts[0][0] == "/secret/3/manifest.json"
