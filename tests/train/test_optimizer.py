import pytest
import torch

from titans_pretrain.config import TrainSection
from titans_pretrain.model.configuration_titans import TitansConfig
from titans_pretrain.model.modeling_titans import TitansForCausalLM
from titans_pretrain.train import optimizer


def model(**changes):
    fields = {
        "variant": "mac",
        "vocab_size": 32,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "chunk_size": 4,
        "segment_length": 8,
    }
    return TitansForCausalLM(TitansConfig(**(fields | changes)))


@pytest.mark.parametrize("variant", ["lmm", "mac", "mag", "mal", "transformer"])
def test_only_projections_decay(variant):
    built = model(variant=variant)
    decayed = optimizer.decayed(built)
    assert decayed
    assert all(name.endswith("proj.weight") for name in decayed)
    projections = {name for name, _ in built.named_parameters() if name.endswith("proj.weight")}
    assert decayed == projections


def test_a_head_of_its_own_decays_and_a_tied_one_does_not():
    assert "lm_head.weight" in optimizer.decayed(model(tie_word_embeddings=False))
    assert "model.embed_tokens.weight" not in optimizer.decayed(model())


def test_the_experts_of_another_library_s_mixture_decay_like_other_projections():
    network = torch.nn.Module()
    network.gate = torch.nn.Linear(4, 2)
    network.convolution = torch.nn.Conv1d(4, 4, 3)
    network.experts = torch.nn.Module()
    network.experts.down_proj = torch.nn.Parameter(torch.ones(2, 4, 4))
    network.experts.down_proj_bias = torch.nn.Parameter(torch.ones(2, 4))
    assert optimizer.matrices(network) == {"gate.weight", "experts.down_proj"}


def test_every_parameter_is_in_one_group_with_the_run_s_settings():
    built = model()
    train = TrainSection(
        steps=1, global_batch_size=1, learning_rate=0.5, weight_decay=0.3, beta1=0.8, beta2=0.9
    )
    adam = optimizer.build(built, train, optimizer.decayed(built))
    assert [group["weight_decay"] for group in adam.param_groups] == [0.3, 0.0]
    assert all(group["betas"] == (0.8, 0.9) and group["lr"] == 0.5 for group in adam.param_groups)
    assert isinstance(adam, torch.optim.AdamW)
    inside = [id(parameter) for group in adam.param_groups for parameter in group["params"]]
    assert sorted(inside) == sorted(id(parameter) for parameter in built.parameters())


def test_what_decays_is_known_of_a_model_without_weights():
    with torch.device("meta"):
        empty = model(tie_word_embeddings=False)
    assert optimizer.decayed(empty) == optimizer.decayed(model(tie_word_embeddings=False))


def test_a_name_of_no_parameter_is_refused():
    train = TrainSection(steps=1, global_batch_size=1, learning_rate=0.5)
    with pytest.raises(ValueError, match=r"no parameters: model\.nothing"):
        optimizer.build(model(), train, {"model.nothing"})
