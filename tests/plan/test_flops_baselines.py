"""The planner's FLOPs of the baselines are those that torch counts in the models."""

import collections

import pytest
import torch
from tiny_baseline import SIZE
from torch.utils.flop_counter import FlopCounterMode

from titans_pretrain import config
from titans_pretrain.errors import UserError
from titans_pretrain.model.configuration_baseline import BaselineConfig
from titans_pretrain.model.modeling_baseline import BaselineForCausalLM
from titans_pretrain.plan import flops

aten = torch.ops.aten
SDPA = aten._scaled_dot_product_flash_attention_for_cpu
COUNTED = ("retnet", "gla", "deltanet", "gated_deltanet", "ttt_linear", "ttt_mlp", "window")


def attention_flops(query, key, value, *args, out_shape=None, **options):
    """Both products, masked or not."""
    batch, heads, queries, width = query
    return 2 * 2 * batch * heads * queries * key[2] * width


def solving_flops(matrix, right, *args, out_shape=None, **options):
    """Forward substitution with ones on the diagonal."""
    batch, heads, rows, columns = right
    return 2 * batch * heads * columns * rows * (rows - 1) // 2


def resolved(mixers, **changes):
    return config.resolve_model({"hf": "titans_baseline", "mixers": mixers, **SIZE, **changes})


def counted(model, length, rows):
    """What torch counts, by part of the model."""
    network = BaselineForCausalLM(BaselineConfig(**{k: v for k, v in model.items() if k != "hf"}))
    ids = torch.randint(model["vocab_size"], (rows, length))
    mapping = {SDPA: attention_flops, aten.linalg_solve_triangular: solving_flops}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        network(ids, use_cache=False)
    found = counter.get_flop_counts()
    total, parts = found["Global"], collections.Counter()
    for name, module in network.named_modules():
        if isinstance(module, torch.nn.Linear):
            part = "projections"
            if ".feed_forward." in name:
                part = "feed_forward"
            elif name == "lm_head":
                part = "head"
            parts[part] += sum(found.get(f"{type(network).__name__}.{name}", {}).values())
    parts["convolutions"] = total.get(aten.convolution, 0)
    parts["attention"] = total.get(SDPA, 0)
    parts["memory"] = total.get(aten.bmm, 0) + total.get(aten.linalg_solve_triangular, 0)
    assert sum(parts.values()) == sum(total.values())
    return {part: parts[part] for part in flops.PARTS}


@pytest.mark.parametrize(("length", "rows"), [(11, 2), (3, 1)])
@pytest.mark.parametrize("kind", COUNTED)
def test_every_part_is_what_torch_counts(kind, length, rows):
    model = resolved([kind])
    assert flops.forward(model, length, rows, performed=True) == counted(model, length, rows)


def test_mixers_in_turn_are_counted_in_turn():
    model = resolved(["window", "deltanet", "ttt_mlp"], num_hidden_layers=5)
    assert flops.forward(model, 9, 1, performed=True) == counted(model, 9, 1)


@pytest.mark.parametrize("length", [8, 11, 2])
def test_a_segment_is_as_long_as_its_tokens_and_both_memories(length):
    model = resolved(["window"], memory_embeddings=2, segment_length=4, window_size=9)
    assert flops.forward(model, length, 2, performed=True) == counted(model, length, 2)


@pytest.mark.parametrize("kind", COUNTED)
def test_masked_and_padded_products_are_not_needed(kind):
    needed, performed = (flops.forward(resolved([kind]), 11, performed=p) for p in (False, True))
    assert all(needed[part] <= performed[part] for part in flops.PARTS)
    masked = "attention" if kind == "window" else "memory"
    assert (needed[masked] < performed[masked]) == (not kind.startswith("ttt"))


def test_a_recurrence_by_hand():
    """RetNet, one chunk of three tokens; each head has keys 16 wide and values 32."""
    state = 3 * 16 * 32
    pairs = 1 + 2 + 3
    heads, blocks = 2, 2
    each = 2 * (2 * state + pairs * (16 + 32))
    assert flops.forward(resolved(["retnet"]), 3)["memory"] == blocks * heads * each


@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
def test_mixers_of_another_library_are_not_counted(kind):
    model = resolved(["window", kind])
    assert not flops.is_counted(model)
    with pytest.raises(UserError, match=rf"the FLOPs of window \+ {kind} are not counted"):
        flops.forward(model, 8)
