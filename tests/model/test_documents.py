"""Documents in one row, told apart by the attention, by the memory, or by both."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from document_cases import starts_of
from document_oracles import Row, oracle
from tiny_models import logits, tiny_config, tiny_model, tokens
from torch import Tensor

from titans_pretrain.model import documents, fields
from titans_pretrain.model.boundary import WHOLE
from titans_pretrain.model.documents import Documents
from titans_pretrain.model.fields import VARIANTS, WITH_ATTENTION, WITH_MEMORY
from titans_pretrain.model.layers import ShortConvolution

TIME = 27
ROWS = ([3, 4, 8, 17], [1, 13, 16, 22, 26])
ATTENTION, MEMORY = {"attend_across_documents": False}, {"remember_across_documents": False}
KINDS: dict[str, dict[str, bool]] = {
    "attention": ATTENTION,
    "memory": MEMORY,
    "both": ATTENTION | MEMORY,
}
SWITCHES: dict[str, dict[str, Any]] = {
    "gates per chunk": {"gate_per": "chunk"},
    "depth 1, no residual": {"memory_depth": 1, "memory_residual": False},
    "depth 3, silu": {"memory_depth": 3, "memory_activation": "silu"},
    "no convolution": {"conv_width": 0},
    "a wide convolution": {"conv_width": 9},
    "no persistent tokens": {"num_persistent_tokens": 0},
    "chunks of one": {"chunk_size": 1},
    "one chunk": {"chunk_size": 64, "segment_length": 64},
    "no momentum": {"use_momentum": False, "use_forgetting": False},
    "no clamp": {"surprise_clip": None, "max_step": 0.1},
}


def fitting(variant: str, changes: dict[str, Any]) -> dict[str, Any]:
    """Those of the fields that the variant has."""
    return {name: x for name, x in changes.items() if not fields.unused(variant, [name])}


# by variant, what tells documents apart fully
APART = {variant: {"variant": variant} | fitting(variant, KINDS["both"]) for variant in VARIANTS}
FORMS = {
    f"{variant}, {kind}": {"variant": variant} | changes
    for variant in VARIANTS
    for kind, changes in KINDS.items()
    if changes == fitting(variant, changes)
} | {
    f"{variant}, {name}": APART[variant] | changes
    for index, (name, changes) in enumerate(SWITCHES.items())
    for variant in ("mac", ("lmm", "mag", "mal")[index % 3])
}
EVERY_VARIANT = pytest.mark.parametrize("variant", VARIANTS)


def hidden(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(ROWS), TIME, 32, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("form", FORMS)
def test_a_mixer_is_its_definition_in_loops(form: str) -> None:
    model, starts = tiny_model(**FORMS[form]), starts_of(ROWS, TIME)
    mixer, config, x = model.model.layers[0].mixer, model.config, hidden().requires_grad_()
    found, _ = mixer(x, documents=Documents(starts))
    rows = [Row(row, config) for row in starts.tolist()]
    loops = [oracle(mixer, config.variant, x[n : n + 1], row) for n, row in enumerate(rows)]
    wanted = torch.cat(loops)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)
    leaves = [x, *mixer.parameters()]
    pulled, right = (
        torch.autograd.grad((hidden(1) * out).sum(), leaves, materialize_grads=True)
        for out in (found, wanted)
    )
    for mine, gradient in zip(pulled, right, strict=True):
        bound = 1e-10 * max(1.0, float(gradient.abs().max()))
        torch.testing.assert_close(mine, gradient, rtol=0, atol=bound)


@EVERY_VARIANT
def test_the_first_document_of_a_row_and_one_that_begins_on_the_grid_are_their_own_rows(
    variant: str,
) -> None:
    model, ids = tiny_model(**APART[variant]), tokens(1, 40)
    found = logits(model, ids, document_starts=starts_of([[13, 16, 31]], 40))
    for first, last in [(0, 13), (16, 31)]:
        alone = logits(model, ids[:, first:last])
        torch.testing.assert_close(found[:, first:last], alone, rtol=0, atol=1e-10)


@EVERY_VARIANT
@pytest.mark.parametrize("place", range(4))
def test_another_document_s_tokens_change_no_bit(variant: str, place: int) -> None:
    model, bounds = tiny_model(**APART[variant], gate_per="chunk"), [0, 3, 8, 17, 27]
    starts, ids = starts_of([bounds[1:-1]], TIME), tokens(1, TIME)
    own = torch.arange(TIME).ge(bounds[place]) & torch.arange(TIME).lt(bounds[place + 1])
    changed = torch.where(own, ids, tokens(1, TIME, seed=1))
    assert (changed != ids).sum() > TIME // 3
    before, after = (logits(model, x, document_starts=starts) for x in (ids, changed))
    assert torch.equal(before[:, own], after[:, own])
    assert not torch.equal(before[:, ~own], after[:, ~own])


@EVERY_VARIANT
@pytest.mark.parametrize("kind", ["attention", "memory"])
def test_one_field_alone_lets_the_other_part_look_across(variant: str, kind: str) -> None:
    both = {"lmm": "memory", "transformer": "attention"}
    model, ids = tiny_model(variant=variant, **KINDS[kind]), tokens(1, TIME)
    changed = torch.cat([tokens(1, 9, seed=1), ids[:, 9:]], 1)
    starts = starts_of([[9]], TIME)
    before, after = (logits(model, x, document_starts=starts)[:, 9:] for x in (ids, changed))
    assert torch.equal(before, after) == (both.get(variant) == kind)


@EVERY_VARIANT
def test_without_starts_each_row_is_one_document(variant: str) -> None:
    ids = tokens(2, TIME)
    wanted = logits(tiny_model(variant=variant), ids)
    separate = tiny_model(**APART[variant])
    assert torch.equal(logits(separate, ids), wanted)
    one = logits(separate, ids, document_starts=torch.zeros(2, TIME, dtype=torch.long))
    torch.testing.assert_close(one, wanted, rtol=0, atol=1e-12)


@EVERY_VARIANT
def test_a_model_that_does_not_separate_documents_gives_the_same_bits_with_starts(
    variant: str,
) -> None:
    model, ids = tiny_model(variant=variant), tokens(2, TIME)
    assert torch.equal(
        logits(model, ids, document_starts=starts_of(ROWS, TIME)), logits(model, ids)
    )


@EVERY_VARIANT
def test_decoding_goes_on_with_one_document(variant: str) -> None:
    ids, options = tokens(2, 9), {"max_new_tokens": 12, "do_sample": False}
    wanted = tiny_model(variant=variant).generate(ids, **options)
    assert torch.equal(tiny_model(**APART[variant]).generate(ids, **options), wanted)


@EVERY_VARIANT
def test_recomputed_blocks_have_the_same_gradient_bits(variant: str) -> None:
    found = []
    for checkpointing in (False, True):
        model = tiny_model(**APART[variant]).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        ids = tokens(2, TIME)
        model(input_ids=ids, labels=ids, document_starts=starts_of(ROWS, TIME)).loss.backward()
        found.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True) if a is not None)


@pytest.mark.parametrize("size", [1, 5, 9])
def test_full_attention_by_stretches_is_that_of_all_at_once(size: int, monkeypatch: Any) -> None:
    model, ids = tiny_model(**APART["transformer"]), tokens(2, TIME)
    starts = starts_of(ROWS, TIME)
    whole = logits(model, ids, document_starts=starts)
    monkeypatch.setattr(documents, "STRETCH", size)
    stretches = logits(model, ids, document_starts=starts)
    torch.testing.assert_close(stretches, whole, rtol=0, atol=1e-12)


def saved_bytes(compute: Callable[[], object]) -> int:
    """Of all storages that autograd keeps for backward."""
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        compute()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("every", [1, 64, 1500, 4096])
def test_full_attention_keeps_memory_linear_in_the_tokens(every: int) -> None:
    plain, apart = (
        tiny_model(dtype=torch.bfloat16, num_hidden_layers=1, variant="transformer", **changes)
        for changes in ({}, ATTENTION)
    )
    ids, starts = tokens(1, 2048), starts_of([range(every, 2048, every)], 2048)
    wanted = saved_bytes(lambda: plain(ids, use_cache=False))
    found = saved_bytes(lambda: apart(ids, use_cache=False, document_starts=starts))
    assert found < 1.5 * wanted


def test_a_convolution_that_looks_across_no_start_keeps_no_copy_of_its_inputs() -> None:
    convolution, x = ShortConvolution(32, 4), torch.randn(1, 512, 32, requires_grad=True)
    reach = torch.arange(512)[None] % 100
    wanted = saved_bytes(lambda: convolution(x))
    assert saved_bytes(lambda: convolution(x, reach=reach)) < wanted + x.nbytes // 2


def test_starts_give_no_cache_of_their_own_accord() -> None:
    model, ids = tiny_model(**APART["lmm"]), tokens(1, TIME)
    assert model(ids).past_key_values is not None
    assert model(ids, document_starts=starts_of([[3]], TIME)).past_key_values is None


def test_a_model_that_does_not_separate_documents_keeps_its_cache() -> None:
    model, ids = tiny_model(variant="lmm"), tokens(1, TIME)
    starts = starts_of([[3]], TIME)
    cache = model(ids, document_starts=starts).past_key_values
    assert cache is not None
    assert model(ids, document_starts=starts, past_key_values=cache).past_key_values is cache


@EVERY_VARIANT
def test_a_model_separates_what_it_was_built_to_separate(variant: str) -> None:
    model, ids = tiny_model(**APART[variant]), tokens(2, TIME)
    wanted = logits(model, ids, document_starts=starts_of(ROWS, TIME))
    for name in ATTENTION | MEMORY:
        setattr(model.config, name, True)
    assert torch.equal(logits(model, ids, document_starts=starts_of(ROWS, TIME)), wanted)


@pytest.mark.parametrize("use", ["use_cache", "past_key_values"])
def test_starts_with_a_cache_are_refused(use: str) -> None:
    model, ids = tiny_model(**APART["lmm"]), tokens(1, TIME)
    given = True if use == "use_cache" else model(ids).past_key_values
    with pytest.raises(ValueError, match="document_starts cannot be given with a cache"):
        model(ids, document_starts=starts_of([[3]], TIME), **{use: given})


def test_starts_of_rows_with_pads_are_refused() -> None:
    model, ids = tiny_model(**APART["lmm"]), tokens(1, TIME)
    mask = torch.ones_like(ids)
    starts = starts_of([[3]], TIME)
    wanted = logits(model, ids, document_starts=starts)
    assert torch.equal(logits(model, ids, document_starts=starts, attention_mask=mask), wanted)
    mask[0, 0] = 0
    with pytest.raises(ValueError, match="document_starts cannot be given for rows with pads"):
        logits(model, ids, document_starts=starts, attention_mask=mask)


@pytest.mark.parametrize("changes", [{}, MEMORY])
@pytest.mark.parametrize(
    ("starts", "told"),
    [
        (torch.zeros(1, 26, dtype=torch.long), r"torch.int64 \(1, 26\), expected integers"),
        (torch.zeros(1, 27), r"torch.float32 \(1, 27\), expected integers \(1, 27\)"),
        (torch.zeros(1, 27, dtype=torch.bool), r"torch.bool \(1, 27\), expected integers"),
    ],
)
def test_starts_of_another_shape_or_kind_are_refused(
    starts: Tensor, told: str, changes: dict[str, bool]
) -> None:
    model = tiny_model(variant="lmm", **changes)
    with pytest.raises(ValueError, match=told):
        logits(model, tokens(1, TIME), document_starts=starts)


@pytest.mark.parametrize(
    ("starts", "told"),
    [
        ([0, 0, 3, 3], r"document_starts\[0, 2\] is 3: expected 2, the column itself, or 0"),
        ([0, 1, 0, 3], r"document_starts\[0, 2\] is 0: expected 2, the column itself, or 1"),
        ([0, 0, 1, 1], r"document_starts\[0, 2\] is 1: expected 2, the column itself, or 0"),
        ([1, 1, 1, 1], r"document_starts\[0, 0\] is 1: expected 0"),
        ([-1, -1, 2, 2], r"document_starts\[0, 0\] is -1: expected 0"),
    ],
)
@pytest.mark.parametrize("ask", [Documents.bounds, Documents.stretches])
def test_starts_that_no_documents_have_are_refused(
    starts: list[int], told: str, ask: Callable[..., object]
) -> None:
    with pytest.raises(ValueError, match=told):
        ask(Documents(torch.tensor([starts])), WHOLE, torch.device("cpu"))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", [*ATTENTION, *MEMORY])
def test_documents_are_separated_by_the_fields_a_variant_uses(name: str, variant: str) -> None:
    used = WITH_ATTENTION if name in ATTENTION else WITH_MEMORY
    assert not tiny_config(variant=variant).separates_documents
    assert tiny_config(variant=variant, **{name: False}).separates_documents == (variant in used)
    assert fields.unused(variant, [name]) == ([] if variant in used else [name])
