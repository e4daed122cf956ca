"""What a layer does before it awaits a state, and after it has handed its own on."""

import pytest
import torch
from tiny_models import tiny_config

from titans_pretrain.model.boundary import Boundary
from titans_pretrain.model.modeling_titans import TitansForCausalLM


class Recording(Boundary):
    """Notes when the state enters and leaves."""

    def __init__(self, events):
        self.events = events

    def enter(self, start, like):
        entered = start()
        self.events.append("enter")
        assert [tuple(tensor.shape) for tensor in entered] == [one.shape for one in like]
        assert [tensor.dtype for tensor in entered] == [one.dtype for one in like]
        return entered

    def leave(self, tied, state):
        self.events.append("leave")
        return super().leave(tied, state)


def events_of_a_block(variant):
    """Projections, gates and convolutions of a mixer in the order in which they end."""
    torch.manual_seed(0)
    model = TitansForCausalLM(
        tiny_config(variant=variant, num_hidden_layers=1, num_persistent_tokens=0)
    )
    model.train()
    mixer, events = model.model.layers[0].mixer, []
    mixer.memory.boundary = Recording(events)
    for name, module in mixer.named_modules():
        if name.endswith(("_proj", "_gate", "_conv", "attention")):
            module.register_forward_hook(lambda *_, name=name: events.append(name))
    model(input_ids=torch.randint(model.config.vocab_size, (2, 32)), use_cache=False)
    return events


@pytest.mark.parametrize("variant", ["lmm", "mag", "mal"])
def test_whatever_does_not_need_the_state_runs_before_it_is_awaited(variant):
    events = events_of_a_block(variant)
    enter, leave = events.index("enter"), events.index("leave")
    inputs = {f"memory.{name}_{part}" for name in "qkv" for part in ("proj", "conv")}
    inputs |= {"memory.forget_gate", "memory.momentum_gate", "memory.step_gate"}
    inputs |= {"lmm": {"gate_proj"}, "mag": {"attention"}, "mal": {"gate_proj"}}[variant]
    assert inputs <= set(events[:enter])
    assert leave == enter + 1
    assert "o_proj" in events[leave:]


def test_the_segments_of_mac_project_their_tokens_before_the_state_is_awaited():
    events = events_of_a_block("mac")
    before = set(events[: events.index("enter")])
    assert {"memory.q_proj", "memory.q_conv"} <= before
    assert {f"attention.project.{name}_proj" for name in "qkv"} <= before
    assert events.index("o_proj") > events.index("leave")


@pytest.mark.parametrize("variant", ["lmm", "mac", "mag", "mal"])
def test_the_state_enters_and_leaves_once(variant):
    events = events_of_a_block(variant)
    assert (events.count("enter"), events.count("leave")) == (1, 1)
