"""Heads that answer with losses: which models get one, and whose answers come out unchanged."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from titans_pretrain.baselines import foreign
from titans_pretrain.model.configuration_titans import TitansConfig
from titans_pretrain.model.modeling_titans import TitansForCausalLM
from titans_pretrain.parallel import loss_head

SIZE = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}
KEYS_AND_VALUES = {"num_key_value_heads": 2, "head_dim": 8}
AS_THEY_ARE = {
    "llama": SIZE,
    "qwen3": SIZE | KEYS_AND_VALUES,
    "gpt_neox": SIZE,
    "mamba": {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4},
    "titans_baseline": {
        "vocab_size": 40,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_heads": 2,
        "intermediate_size": 16,
        "mixers": ["window"],
    },
}
CHANGED = {
    "gemma2": SIZE | KEYS_AND_VALUES,  # bounded
    "cohere": SIZE | {"num_key_value_heads": 2},  # scaled
    "granite": SIZE | {"num_key_value_heads": 2, "logits_scaling": 2.0},
}
NO_MATRIX_ALONE = {"phi": SIZE}  # a bias


def build(keys, name):
    model = foreign.build({"hf": name} | keys, 0).train()
    loss_head.place(model, "")
    return model


def passed_on(model):
    head = loss_head.find(model)
    return loss_head.is_passed_on(model, head, lambda ids: model(input_ids=ids).logits)


def titans():
    sizes = SIZE | {"variant": "lmm", "memory_heads": 2, "chunk_size": 4}
    return TitansForCausalLM(TitansConfig(**sizes))


@pytest.mark.parametrize("name", AS_THEY_ARE)
def test_losses_of_a_model_that_leaves_its_heads_output_alone_are_the_heads(name):
    model = build(AS_THEY_ARE[name], name)
    assert passed_on(model)
    ids, targets = torch.arange(24).view(2, 12), torch.arange(10, 34).view(2, 12)
    logits = model(input_ids=ids).logits.flatten(0, 1)
    expected = functional.cross_entropy(logits, targets.flatten(), reduction="none")
    with loss_head.find(model).answering(targets):
        losses = model(input_ids=ids).logits
    assert losses.shape == (2, 12, 1)
    torch.testing.assert_close(losses.flatten(), expected, rtol=0, atol=1e-6)
    found = torch.autograd.grad(losses.sum(), list(model.parameters()))
    for one, other in zip(
        found, torch.autograd.grad(expected.sum(), list(model.parameters())), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CHANGED)
def test_a_model_that_changes_its_logits_is_found_out(name):
    assert not passed_on(build(CHANGED[name], name))


@pytest.mark.parametrize("name", NO_MATRIX_ALONE)
def test_a_head_that_is_more_than_a_matrix_stays(name):
    assert loss_head.find(build(NO_MATRIX_ALONE[name], name)) is None


def after_the_head(change, calls=1):
    """A model that takes its head's output through ``change``."""

    class Changed(nn.Module):
        def __init__(self):
            super().__init__()
            self.lm_head = nn.Linear(4, 6, bias=False)
            loss_head.place(self.lm_head, "lm_head")

        def forward(self, ids):
            hidden = functional.one_hot(ids % 4, 4).float()
            return change([self.lm_head(hidden) for _ in range(calls)][-1])

    return Changed()


@pytest.mark.parametrize(
    ("change", "calls"),
    [
        (lambda logits: logits.clamp(-100, 100), 1),
        (lambda logits: logits.bfloat16(), 1),
        (lambda logits: logits[:, 1:], 1),
        (lambda logits: logits.view(1, -1, 6), 1),
        (lambda logits: logits[..., 5], 1),
        (lambda logits: logits, 2),
    ],
)
def test_whatever_is_done_to_logits_is_found_out(change, calls):
    model = after_the_head(change, calls)
    assert not loss_head.is_passed_on(model, model.lm_head, model)
    untouched = after_the_head(lambda logits: logits)
    assert loss_head.is_passed_on(untouched, untouched.lm_head, untouched)


def test_a_probe_leaves_no_trace():
    model = after_the_head(lambda logits: logits.view(1, -1, 6))
    ids = torch.arange(8)[None]
    before = model(ids)
    loss_head.is_passed_on(model, model.lm_head, model)
    assert torch.equal(model(ids), before)


def test_models_of_this_package_are_known_to_pass_answers_on():
    model = titans()
    loss_head.place(model, "")

    def run(ids):
        raise AssertionError("it is not run")

    assert loss_head.is_passed_on(model, loss_head.find(model), run)


def test_a_head_keeps_its_tie_and_its_name():
    model = titans()
    names = list(model.state_dict())
    loss_head.place(model.lm_head, "lm_head")
    assert isinstance(model.lm_head, loss_head.LossHead)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert list(model.state_dict()) == names


def test_after_an_error_a_head_gives_logits_again():
    head = nn.Linear(4, 6, bias=False)
    loss_head.place(head, "lm_head")
    with (
        pytest.raises(RuntimeError, match="token ids outside"),
        head.answering(torch.full((1, 2), 9)),
    ):
        head(torch.zeros(1, 2, 4))
    assert head(torch.zeros(1, 2, 4)).shape == (1, 2, 6)


def test_other_linear_layers_stay():
    layer = nn.Linear(4, 6, bias=False)
    loss_head.place(layer, "model.layers.0.mixer.q_proj")
    assert type(layer) is nn.Linear
