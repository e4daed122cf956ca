"""The planner's FLOPs are those that torch counts in the models that are built."""

import collections

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from titans_pretrain import config
from titans_pretrain.errors import UserError
from titans_pretrain.model import fields
from titans_pretrain.model.configuration_titans import TitansConfig
from titans_pretrain.model.fields import VARIANTS, WITH_MEMORY
from titans_pretrain.model.memory_coefficients import BLOCK
from titans_pretrain.model.modeling_titans import TitansForCausalLM
from titans_pretrain.plan import flops, parameters

SMALL = {
    "vocab_size": 61,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 37,
    "chunk_size": 5,
    "segment_length": 10,
    "window_size": 7,
    "num_persistent_tokens": 3,
}
aten = torch.ops.aten
LINEAR = {aten.mm, aten.addmm}
BATCHED = {aten.bmm, aten.baddbmm, aten.baddbmm_}


def resolved(variant, **changes):
    given = {"variant": variant, **SMALL, **changes}
    for name in fields.unused(variant, given):
        del given[name]
    return config.resolve_model(given)


def attention_flops(query, key, value, *args, out_shape=None, **options):
    """Both products, masked or not."""
    batch, heads, queries, width = query
    return 2 * 2 * batch * heads * queries * key[2] * width


def added_flops(total, left, right, *args, out_shape=None, **options):
    batch, queries, inner = left
    return 2 * batch * queries * inner * right[2]


COUNTED_BESIDES = {
    aten._scaled_dot_product_flash_attention_for_cpu: attention_flops,
    aten.baddbmm_: added_flops,
}


def counter_of(model, length, rows, *, backward=False):
    """Torch's counts of a pass by module and operation, and the names of linear layers."""
    torch.manual_seed(0)
    network = TitansForCausalLM(TitansConfig(**model))
    ids = torch.randint(model["vocab_size"], (rows, length))
    # with gradients: torch's counter fails where a module returns a parameter without them
    with FlopCounterMode(display=False, custom_mapping=COUNTED_BESIDES) as counter:
        logits = network.train(backward)(ids, use_cache=False).logits
        if backward:
            logits.sum().backward()
    prefix = f"{type(network).__name__}."
    linear = {
        prefix + name
        for name, module in network.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    return counter.get_flop_counts(), linear


def counted(model, length, rows=1):
    """What torch counts, by part of the model."""
    by_module, linear = counter_of(model, length, rows)
    total = by_module["Global"]
    parts = collections.Counter()
    for name in linear & by_module.keys():
        part = "projections"
        if ".feed_forward." in name:
            part = "feed_forward"
        elif name.endswith(".lm_head"):
            part = "head"
        parts[part] += sum(by_module[name].values())
    assert sum(parts.values()) == sum(total.get(kind, 0) for kind in LINEAR)
    parts["memory"] = sum(total.get(kind, 0) for kind in BATCHED)
    parts["convolutions"] = total.get(aten.convolution, 0)
    parts["attention"] = total.get(aten._scaled_dot_product_flash_attention_for_cpu, 0)
    assert sum(parts.values()) == sum(total.values())
    return {part: parts[part] for part in flops.PARTS}


def performed(model, length, rows=1):
    return flops.forward(model, length, rows, performed=True)


@pytest.mark.parametrize(("length", "rows"), [(31, 1), (20, 3), (4, 2)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_part_is_what_torch_counts_at_any_length(variant, length, rows):
    model = resolved(variant)
    assert performed(model, length, rows) == counted(model, length, rows)


CASES = [
    ("lmm", {"memory_heads": 2, "memory_depth": 1, "chunk_size": 3}),
    ("lmm", {"memory_heads": 6, "memory_depth": 4, "memory_expansion": 3}),
    ("lmm", {"conv_width": 0, "num_persistent_tokens": 0, "tie_word_embeddings": False}),
    ("lmm", {"num_persistent_tokens": 13, "chunk_size": 64}),
    ("mac", {"use_forgetting": False, "use_momentum": False, "num_persistent_tokens": 0}),
    ("mac", {"segment_length": 40, "chunk_size": 20, "memory_heads": 3}),
    ("mag", {"window_size": 40, "num_attention_heads": 2, "use_momentum": False}),
    ("mag", {"window_size": 1, "num_persistent_tokens": 0, "gate_per": "chunk"}),
    ("mal", {"window_size": 23, "memory_residual": False, "surprise_clip": None}),
    ("transformer", {"attention_window": 7}),
]


@pytest.mark.parametrize(("variant", "changes"), CASES, ids=str)
def test_every_part_is_what_torch_counts_with_any_fields(variant, changes):
    model = resolved(variant, **changes)
    assert performed(model, 33, 2) == counted(model, 33, 2)


@pytest.mark.parametrize("chunk", [64, 80, 128, 200])
def test_a_chunk_of_any_size_is_read_and_written_by_blocks(chunk):
    model = resolved("lmm", chunk_size=chunk, num_hidden_layers=1)
    assert performed(model, 300) == counted(model, 300)


def test_the_blocks_are_those_of_the_scan():
    assert flops.MEMORY_BLOCK == BLOCK
    assert flops.memory_blocks(10, 4) == {4: 2, 2: 1}
    assert flops.memory_blocks(64 * 5, 64 * 2) == {64: 5}
    assert flops.memory_blocks(2 * 130 + 70, 130) == {64: 5, 2: 2, 6: 1}
    assert flops.memory_blocks(0, 4) == {}


def test_the_memory_s_products_by_hand():
    """One head, layers 24 -> 96 -> 24, one block of five tokens."""
    model = resolved("lmm", memory_heads=1)
    assert parameters.memory_layers(model) == [(96, 24), (24, 96)]
    layer = 2 * 96 * 24
    surprise = 2 * layer + layer  # both layers forward, the second back
    reads = writes = 2 * 2 * layer  # of weights and momentum
    inside = 2 * 5 * (24 + 96) + 2 * 5 * (96 + 24)  # scores, and their application
    coefficients = 2 * 5**3 + 2 * 5**2
    assert flops.memory(model, 5) == 5 * (surprise + reads + writes + inside) + coefficients


@pytest.mark.parametrize("variant", WITH_MEMORY)
def test_a_momentum_that_is_not_used_is_computed_but_not_needed(variant):
    model = resolved(variant, use_momentum=False, memory_heads=1)
    layer = 2 * 96 * 24
    assert flops.memory(model, 5, performed=True) - flops.memory(model, 5) == 5 * 2 * 2 * layer
    needed, all_of_it = (flops.forward(model, 20, performed=both)["memory"] for both in (0, 1))
    written = 20 + (0 if variant == "mac" else SMALL["num_persistent_tokens"])
    blocks = model["num_hidden_layers"]
    assert all_of_it - needed == blocks * written * 2 * 2 * layer


def test_convolutions_are_those_that_torch_counts():
    model = resolved("mal", num_persistent_tokens=0)
    layer = torch.nn.Conv1d(24, 24, 4, groups=24, bias=False)
    with FlopCounterMode(display=False) as counter:
        layer(torch.zeros(2, 24, 11 + 3))
    branches, blocks = 3, 2
    found = flops.forward(model, 11, rows=2)["convolutions"]
    assert found == branches * blocks * counter.get_total_flops()
    asked = flops.forward(resolved("mac"), 11, rows=2)["convolutions"]
    assert asked == (branches + 1) * blocks * counter.get_total_flops()


def seen(variant, length, window):
    """Pairs of a query and what it needs, one by one."""
    persistent, segment = SMALL["num_persistent_tokens"], SMALL["segment_length"]
    for token in range(length):
        if variant == "mac":
            yield persistent + 2 * (token % segment + 1)
        else:
            yield min(token + 1, window or length) + persistent * (variant == "mag")


@pytest.mark.parametrize("length", [1, 6, 7, 8, 31])
@pytest.mark.parametrize(
    ("variant", "window"),
    [("mac", None), ("mag", 7), ("mal", 7), ("transformer", None), ("transformer", 7)],
)
def test_attention_is_counted_over_the_keys_that_a_query_sees(variant, window, length):
    changes = {"attention_window": window} if variant == "transformer" else {}
    model = resolved(variant, **changes)
    pairs = sum(seen(variant, length, window))
    needed = flops.forward(model, length, rows=3)
    assert needed["attention"] == 3 * 2 * 4 * 24 * pairs
    rest = flops.forward(model, length, rows=3, performed=True)
    assert rest["attention"] >= needed["attention"]
    assert needed | {"attention": 0} == rest | {"attention": 0}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_token_takes_the_mean_of_its_sequence(variant):
    model = resolved(variant)
    whole = flops.forward(model, 31)
    assert flops.token(model, 31) == {part: count / 31 for part, count in whole.items()}
    assert (whole["memory"] > 0) == (variant in WITH_MEMORY)


def test_training_takes_three_forward_passes():
    model = resolved("transformer")
    with sdpa_kernel(SDPBackend.MATH):
        by_module, _ = counter_of(model, 13, 2, backward=True)
    forward = flops.forward(model, 13, 2, performed=True)
    assert sum(by_module["Global"].values()) == flops.TRAINING * sum(forward.values())
    needed = sum(flops.forward(model, 13, 2).values())
    assert flops.training(model, 13, 2) == flops.TRAINING * needed


def test_a_step_is_all_its_micro_batches_and_short_sequences_come_in_larger_ones():
    model = resolved("mag")
    run = config.resolve(
        {
            "model": {name: model[name] for name in (*SMALL, "variant")} | {"segment_length": 512},
            "data": {"manifest": "m", "sequence_length": 40},
            "train": {
                "steps": 1,
                "global_batch_size": 12,
                "micro_batch_size": 2,
                "learning_rate": 1.0,
            },
            "run": {"directory": "r"},
        },
        source="test",
    )
    assert flops.step(run) == 6 * flops.training(model, 40, 2)
    assert flops.step(run, 20) == 6 * flops.training(model, 20, 4)


def test_a_model_of_another_library_is_not_counted():
    model = {"hf": "llama", "vocab_size": 8}
    assert not flops.is_counted(model)
    with pytest.raises(UserError, match="the FLOPs of llama are not counted"):
        flops.forward(model, 8)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0.00 "),
        (999, "999 "),
        (1000, "1.00 k"),
        (999_600, "1.00 M"),
        (99_960, "100 k"),
        (41_230_000, "41.2 M"),
        (3.2e21, "3.20 Z"),
    ],
)
def test_counts_are_told_in_three_digits(count, text):
    assert flops.scaled(count) == text
