"""``model.hf``: classes are found, keys are checked, mistakes are told with their fix."""

import inspect
import sys
from types import ModuleType, SimpleNamespace

import mamba_ssm_weights
import pytest
import torch
import yaml
from torch import nn

from titans_pretrain import cli, config
from titans_pretrain.baselines import foreign, gpu_packages
from titans_pretrain.errors import UserError
from titans_pretrain.model.configuration_baseline import BaselineConfig
from titans_pretrain.plan import parameters
from titans_pretrain.train import optimizer

LLAMA = {
    "hf": "llama",
    "vocab_size": 300,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
}
MAMBA = {"hf": "mamba", "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}


def run(model, **sections):
    base = {
        "model": model,
        "data": {"manifest": "m.json", "sequence_length": 16},
        "train": {"steps": 2, "global_batch_size": 2, "learning_rate": 0.1},
        "run": {"directory": "out"},
    }
    return config.resolve(
        {name: values | sections.get(name, {}) for name, values in base.items()}
        | {name: values for name, values in sections.items() if name not in base},
        source="run.yaml",
    )


def test_a_model_of_transformers_is_named_by_its_type():
    resolved = run(LLAMA)
    assert resolved.model == LLAMA
    assert config.resolve(yaml.safe_load(config.dump(resolved)), source="again") == resolved
    assert type(foreign.skeleton(LLAMA)).__name__ == "LlamaForCausalLM"


def test_a_model_of_a_package_is_named_by_module_and_class():
    name = "transformers.models.llama.modeling_llama:LlamaForCausalLM"
    assert type(foreign.skeleton(LLAMA | {"hf": name})).__name__ == "LlamaForCausalLM"


def test_the_vocabulary_is_the_class_s_own_where_none_is_given():
    assert run(MAMBA).model["vocab_size"] == 50280


def test_the_defaults_of_our_own_classes_are_kept_with_the_run():
    given = {"hf": "titans_baseline", "mixers": ["gla"], "hidden_size": 96}
    resolved = run(given).model
    usual = inspect.signature(BaselineConfig.__init__).parameters
    ids = {"pad_token_id", "bos_token_id", "eos_token_id"}
    assert resolved.keys() == {"hf"} | usual.keys() - ids - {"self", "use_cache", "kwargs"}
    assert resolved["window_size"] == usual["window_size"].default
    assert run(resolved).model == resolved


@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_mamba_begins_with_the_weights_of_mamba_ssm(name):
    size = {"hf": name, "vocab_size": 80, "hidden_size": 32, "num_hidden_layers": 4}
    size |= {"num_heads": 8, "head_dim": 8, "n_groups": 1} if name == "mamba2" else {}
    network = foreign.build(size | {"tie_word_embeddings": False}, 0)
    for layer in network.backbone.layers:
        mamba_ssm_weights.check(layer.mixer, residuals=4)
    assert float(network.backbone.embeddings.weight.std()) == pytest.approx(0.02, rel=0.1)
    mamba_ssm_weights.uniform(network.lm_head.weight, 32**-0.5)
    asked = foreign.build(size | {"initializer_range": 0.5, "use_bias": True}, 0).backbone
    assert float(asked.embeddings.weight.std()) == pytest.approx(0.5, rel=0.1)
    assert not any(
        p.any() for n, p in asked.named_parameters() if n.endswith("_proj.bias") and "dt" not in n
    )


def test_a_key_that_makes_transformers_rescale_weights_as_it_loads_them_is_refused():
    with pytest.raises(UserError, match="again each time the model is loaded") as caught:
        run(MAMBA | {"rescale_prenorm_residual": True})
    assert "take it out" in caught.value.fix
    run(MAMBA | {"rescale_prenorm_residual": False})


@pytest.mark.parametrize(
    ("model", "why"),
    [
        ({"hf": "rwkv"}, "divides its own weights"),
        ({"hf": "recurrent_gemma"}, "reads otherwise with its cache"),
        (
            {"hf": "transformers.models.rwkv.modeling_rwkv:RwkvForCausalLM"},
            "divides its own weights",
        ),
    ],
)
def test_classes_that_do_not_give_the_same_twice_are_refused(model, why):
    with pytest.raises(UserError, match=why) as caught:
        run(model)
    assert "choose another" in caught.value.fix


@pytest.mark.parametrize(
    ("change", "what", "fix"),
    [
        ({"hidden_sise": 4}, "LlamaConfig has no such key", "did you mean 'hidden_size'?"),
        ({"hidden_size": "32"}, "'32' is no int", "give a int"),
        ({"hidden_size": True}, "True is no int", "give a int"),
        ({"rms_norm_eps": float("nan")}, "nan is no float", "give a float"),
        ({"num_attention_heads": 5}, "not a multiple of the number of attention heads", "change"),
        ({"attention_dropout": 0.1}, "0.1 would not repeat when a run is resumed", "use 0"),
        ({"pad_token_id": 3}, "not to be given: the tokenizer decides it", "take it out"),
        ({"use_cache": True}, "not to be given: it is set here", "take it out"),
        ({"rope_parameters": {"rope_thet": 5.0}}, "no such key", "did you mean 'rope_theta'?"),
        ({"hf": "lama"}, "knows no causal language model 'lama'", "did you mean 'llama'?"),
        ({"hf": 3}, "3 is no name", "give a model_type, or module:Class"),
        ({"hf": "torch.nn:Linear"}, "no causal language model of Hugging", "ends in ForCausalLM"),
        ({"hf": "t5"}, "knows no causal language model 't5'", "give a model_type"),
        (
            {"hf": "titans_pretrain.model.modeling_baseline:BaselineForCausalLM"},
            "this package's own class, under another name",
            "use hf: titans_baseline, or model.variant",
        ),
        (
            {"hf": "titans_pretrain.model.modeling_titans:TitansForCausalLM"},
            "this package's own class, under another name",
            "use hf: titans_baseline, or model.variant",
        ),
        ({"hf": "no_such_package:Model"}, "needs the package 'no_such_package'", "install no_such"),
    ],
)
def test_a_mistake_is_told_with_its_fix(change, what, fix):
    with pytest.raises(UserError) as caught:
        run(LLAMA | change)
    assert what in caught.value.what
    assert fix in caught.value.fix
    assert caught.value.where == "run.yaml"


def test_a_package_of_the_gpu_extra_that_is_missing_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "fla", None)
    nowhere = SimpleNamespace(find_spec=lambda _: None)
    monkeypatch.setattr(gpu_packages, "PathFinder", nowhere)
    with pytest.raises(UserError, match="needs the package 'fla'") as caught:
        run({"hf": "fla.models:GLAForCausalLM"})
    assert caught.value.fix == "pip install 'titans-pretrain[gpu]'"


def test_dropout_that_a_class_has_by_default_is_refused():
    with pytest.raises(UserError, match=r"pdrop: 0.1 by default would not repeat") as caught:
        run({"hf": "gpt2"})
    assert "pdrop: 0" in caught.value.fix


def test_a_class_that_would_look_ahead_is_refused():
    off = {"hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0}
    with pytest.raises(UserError, match="would look ahead"):
        run({"hf": "bert", **off})
    assert run({"hf": "bert", "is_decoder": True, **off}).model["is_decoder"]


def test_a_class_that_looks_back_whatever_the_key_says_is_taken_as_it_is():
    size = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
    model = {"hf": "gpt_neox", "vocab_size": 80, **size}
    assert run(model).model == model  # its classifier's dropout is no part of it
    network = foreign.build(model, 0).eval()
    ids = torch.arange(12)[None]
    changed = torch.cat([ids[:, :-1], ids[:, :1]], 1)
    with torch.no_grad():
        before, after = network(ids).logits, network(changed).logits
    torch.testing.assert_close(before[:, :-1], after[:, :-1])
    assert not torch.equal(before[:, -1], after[:, -1])


@pytest.mark.parametrize("axis", ["tensor", "sequence"])
def test_layers_of_other_libraries_are_not_divided(axis):
    with pytest.raises(UserError, match=r"2 ranks cannot share the layers of model.hf 'llama'"):
        run(LLAMA, mesh={axis: 2})


def test_sequences_beyond_the_model_s_positions_are_refused():
    with pytest.raises(UserError, match=r"4096 exceeds model.max_position_embeddings 2048"):
        run(LLAMA, data={"sequence_length": 4096})
    run(LLAMA | {"max_position_embeddings": 4096}, data={"sequence_length": 4096})
    run(MAMBA, data={"sequence_length": 1 << 20})


def test_a_class_that_cannot_recompute_its_blocks_is_not_asked_to(monkeypatch):
    model_class, _ = foreign.classes("llama")
    run(LLAMA, train={"activation_checkpointing": True})
    monkeypatch.setattr(model_class, "supports_gradient_checkpointing", False)
    with pytest.raises(UserError, match=r"the class of model.hf 'llama' does not support it"):
        run(LLAMA, train={"activation_checkpointing": True})


def test_a_preset_and_another_model_are_not_mixed():
    with pytest.raises(UserError, match="'mamba' is not the model of preset 'llama-170m'"):
        run({"preset": "llama-170m", "hf": "mamba"})
    with pytest.raises(UserError, match="'llama' is not the model of preset 'titans-mac-170m'"):
        run({"preset": "titans-mac-170m", "hf": "llama"})


def test_state_that_checkpoints_do_not_hold_is_refused():
    network = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    with pytest.raises(UserError, match=r"keeps state that is no parameter: 1.running_mean"):
        foreign.check_state(network, "Net")
    network = nn.Linear(2, 2)
    network.bias.requires_grad_(False)
    with pytest.raises(UserError, match="freezes parameters: bias"):
        foreign.check_state(network, "Net")


def test_a_configuration_that_changes_what_it_is_given_is_refused(monkeypatch):
    from transformers import LlamaConfig, LlamaForCausalLM

    class Stubborn(LlamaConfig):
        def __init__(self, **keys):
            super().__init__(**keys)
            self.hidden_size = 64

    class StubbornForCausalLM(LlamaForCausalLM):
        config_class = Stubborn

    module = ModuleType("stubborn")
    module.StubbornForCausalLM = StubbornForCausalLM
    monkeypatch.setitem(sys.modules, "stubborn", module)
    with pytest.raises(UserError, match="32 was given, Stubborn made it 64"):
        run(LLAMA | {"hf": "stubborn:StubbornForCausalLM"})


def test_matrices_decay_and_nothing_else_does():
    names = optimizer.matrices(foreign.skeleton(LLAMA | {"tie_word_embeddings": True}))
    assert "model.layers.0.self_attn.q_proj.weight" in names
    assert "lm_head.weight" not in names
    assert not any("norm" in name or "embed" in name for name in names)
    assert "lm_head.weight" in optimizer.matrices(foreign.skeleton(LLAMA))
    mamba = optimizer.matrices(foreign.skeleton(MAMBA))
    assert {name.rpartition("mixer.")[2] for name in mamba if "layers.0" in name} == {
        "in_proj.weight",
        "x_proj.weight",
        "dt_proj.weight",
        "out_proj.weight",
    }


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_counted_once(tied):
    model = LLAMA | {"tie_word_embeddings": tied}
    found = parameters.parts(model)
    total = sum(p.numel() for p in foreign.build(model, 0).parameters())
    assert parameters.count(model) == total
    assert found["embedding"] == 300 * 32
    assert found["head"] == (0 if tied else 300 * 32)


def test_plan_prints_the_size(tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text(config.dump(run(LLAMA)))
    assert not cli.main(["plan", str(file)])
    told = capsys.readouterr().out
    assert "llama, 36,768 parameters" in told
    assert "embedding 9,600, head 9,600" in told
    assert "2 blocks and norms of 17,568 together" in told


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (LLAMA, "llama"),
        ({"hf": "transformers.models.llama.modeling_llama:LlamaForCausalLM"}, "Llama"),
        ({"hf": "titans_baseline", "mixers": ["mamba", "window"]}, "mamba + window"),
        (
            {"hf": "titans_baseline", "mixers": ["window"], "memory_embeddings": 4},
            "window + memory embeddings",
        ),
    ],
)
def test_reports_call_a_model_by_what_it_is_made_of(model, name):
    assert foreign.name_of(model) == name


def test_making_a_skeleton_takes_no_memory_for_weights():
    assert all(p.device == torch.device("meta") for p in foreign.skeleton(LLAMA).parameters())
