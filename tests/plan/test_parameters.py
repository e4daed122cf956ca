"""The planner's parameter counts are those of the models that are built."""

import pytest
import torch

from titans_pretrain import config
from titans_pretrain.model.configuration_titans import TitansConfig
from titans_pretrain.model.fields import VARIANTS, WITH_MEMORY
from titans_pretrain.model.modeling_titans import TitansForCausalLM
from titans_pretrain.plan import parameters

SMALL = {
    "vocab_size": 96,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 40,
}


def built(model):
    """Parameters by the name of the model's part."""
    with torch.device("meta"):
        made = TitansForCausalLM(TitansConfig(**model))
    named = dict(made.named_parameters())
    return {
        part: sum(tensor.numel() for name, tensor in named.items() if name.startswith(prefix))
        for part, prefix in (
            ("embedding", "model.embed_tokens."),
            ("blocks", "model.layers."),
            ("final_norm", "model.norm."),
            ("head", "lm_head."),
        )
    }


@pytest.mark.parametrize("size", ["170m", "760m", "7b"])
@pytest.mark.parametrize(
    "kind", ["titans-lmm", "titans-mac", "titans-mag", "titans-mal", "transformer"]
)
def test_a_preset_has_the_parameters_of_the_model(kind, size):
    model = config.resolve_model({"preset": f"{kind}-{size}"})
    assert parameters.parts(model) == built(model)


CHANGES = [
    {},
    {"tie_word_embeddings": False},
    {"conv_width": 0},
    {"conv_width": 1},
    {"num_persistent_tokens": 0},
    {"use_forgetting": False},
    {"use_momentum": False, "use_forgetting": False},
    {"memory_heads": 2, "memory_depth": 1},
    {"memory_heads": 6, "memory_depth": 4, "memory_expansion": 3},
]
CASES = [
    (variant, changes)
    for variant in VARIANTS
    for changes in CHANGES
    if variant in WITH_MEMORY or not changes.keys() - {"tie_word_embeddings"}
]


@pytest.mark.parametrize(("variant", "changes"), CASES, ids=str)
def test_each_field_is_counted_as_the_model_has_it(variant, changes):
    model = config.resolve_model({"variant": variant, **SMALL, **changes})
    assert parameters.parts(model) == built(model)
    assert parameters.count(model) == sum(built(model).values())
