"""Decoding is the same function as one long call: caches, pads, pieces, beams."""

from dataclasses import fields
from typing import Any

import pytest
import torch
from tiny_models import FORMS, logits, tiny_config, tiny_model, tokens
from torch import Tensor

from titans_pretrain.model.cache import TitansCache
from titans_pretrain.model.fields import VARIANTS
from titans_pretrain.model.layout import Layout
from titans_pretrain.model.modeling_titans import TitansForCausalLM

TIME = 27
EVERY_FORM = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
EVERY_VARIANT = pytest.mark.parametrize("variant", VARIANTS)
PIECES = {
    "token by token": [1] * TIME,
    "prefill and tokens": [14] + [1] * 13,
    "chunks": [4] * 6 + [3],
    "segments": [8, 8, 8, 3],
    "uneven": [3, 1, 7, 2, 9, 5],
    "almost all, then the rest": [26, 1],
}
# pads left and right of each row; they end inside chunks, segments and windows, and between them
PADS = [(0, 0), (1, 0), (5, 0), (8, 0), (26, 0), (0, 7), (0, 22), (4, 3), (9, 9), (13, 13)]
ROWS = len(PADS)


def in_pieces(model: TitansForCausalLM, ids: Tensor, sizes: list[int]) -> Tensor:
    cache, outputs = TitansCache(model.config), []
    for piece in ids.split(sizes, dim=1):
        with torch.no_grad():
            out = model(input_ids=piece, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        outputs.append(out.logits)
    return torch.cat(outputs, dim=1)


def size(cache: TitansCache) -> int:
    return sum(x.numel() * x.element_size() for layer in cache.layers for x in layer.state.values())


@EVERY_FORM
def test_one_call_with_a_cache_equals_the_training_path(form: dict[str, Any]) -> None:
    model, ids = tiny_model(**form), tokens(2, TIME)
    torch.testing.assert_close(
        logits(model, ids, use_cache=True), logits(model, ids), rtol=1e-9, atol=1e-9
    )


@EVERY_FORM
@pytest.mark.parametrize("sizes", [PIECES["token by token"], PIECES["uneven"]], ids=["1", "n"])
def test_decoding_equals_one_long_call(form: dict[str, Any], sizes: list[int]) -> None:
    model, ids = tiny_model(**form), tokens(2, TIME)
    torch.testing.assert_close(
        in_pieces(model, ids, sizes), logits(model, ids), rtol=1e-9, atol=1e-9
    )


@EVERY_VARIANT
@pytest.mark.parametrize("sizes", PIECES.values(), ids=PIECES.keys())
def test_any_split_into_calls_equals_one_long_call_in_float32(
    variant: str, sizes: list[int]
) -> None:
    model, ids = tiny_model(variant=variant, dtype=torch.float32), tokens(2, TIME)
    wanted = logits(model, ids)
    error = (in_pieces(model, ids, sizes) - wanted).abs().max() / wanted.abs().max()
    assert error < 1e-5


@pytest.mark.parametrize("variant", ["lmm", "mac", "mag", "mal"])
def test_the_cache_stops_growing(variant: str) -> None:
    """After any number of tokens it is as large as after as many plus 24, by the byte."""
    model, ids = tiny_model(variant=variant, dtype=torch.float32), tokens(2, 56)
    cache, sizes = TitansCache(model.config), []
    for token in ids.split(1, dim=1):
        with torch.no_grad():
            cache = model(input_ids=token, past_key_values=cache, use_cache=True).past_key_values
        sizes.append(size(cache))
    assert sizes[23:32] == sizes[47:56]
    assert max(sizes[24:]) == max(sizes[47:])
    with torch.no_grad():
        at_once = model(input_ids=ids, use_cache=True).past_key_values
    assert size(at_once) == sizes[-1]


def test_the_baseline_s_cache_grows_by_one_key_and_value_a_token() -> None:
    model, ids = tiny_model(variant="transformer", dtype=torch.float32), tokens(1, 20)
    with torch.no_grad():
        ten, twenty = (
            size(model(input_ids=ids[:, :n], use_cache=True).past_key_values) for n in (10, 20)
        )
    assert twenty - ten == 10 * 2 * 32 * 4 * 2


@EVERY_VARIANT
def test_the_cache_is_a_flat_dict_with_the_batch_first(variant: str) -> None:
    model = tiny_model(variant=variant)
    with torch.no_grad():
        cache = model(input_ids=tokens(3, TIME), use_cache=True).past_key_values
    assert isinstance(cache, TitansCache)
    assert cache.get_seq_length() == TIME
    assert len(cache.layers) == 2
    for layer in cache.layers:
        assert layer.state
        assert all(x.shape[0] == 3 for x in layer.state.values())


@EVERY_VARIANT
def test_a_cache_is_told_apart_by_row(variant: str) -> None:
    """Reordered rows continue as the rows they came from: what beam search relies on."""
    model, ids = tiny_model(variant=variant), tokens(3, TIME)
    order = torch.tensor([2, 0, 0])
    with torch.no_grad():
        cache = model(input_ids=ids[:, :14], use_cache=True).past_key_values
        cache.reorder_cache(order)
        found = model(input_ids=ids[order, 14:], past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(found, logits(model, ids)[order, 14:], rtol=1e-9, atol=1e-9)


@EVERY_VARIANT
def test_a_cache_of_another_batch_is_refused(variant: str) -> None:
    model = tiny_model(variant=variant)
    with torch.no_grad():
        cache = model(input_ids=tokens(3, TIME), use_cache=True).past_key_values
        with pytest.raises(ValueError, match="3 rows"):
            model(input_ids=tokens(2, 1), past_key_values=cache, use_cache=True)


def padded(ids: Tensor, pads: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """Rows of one width whose first and last columns are pads, and the mask."""
    ids, mask = ids.clone(), torch.ones_like(ids)
    for row, (left, right) in enumerate(pads):
        mask[row, :left] = 0
        mask[row, ids.shape[1] - right :] = 0
    return ids.masked_fill(mask == 0, 5), mask


@EVERY_FORM
def test_a_padded_batch_equals_one_row_at_a_time(form: dict[str, Any]) -> None:
    model = tiny_model(**form)
    ids, mask = padded(tokens(ROWS, TIME), PADS)
    found = logits(model, ids, attention_mask=mask)
    cached = logits(model, ids, attention_mask=mask, use_cache=True)
    for row, (left, right) in enumerate(PADS):
        real = slice(left, TIME - right)
        wanted = logits(model, ids[row : row + 1, real])[0]
        torch.testing.assert_close(found[row, real], wanted, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(cached[row, real], wanted, rtol=1e-9, atol=1e-9)


@EVERY_VARIANT
def test_a_padded_batch_equals_one_row_at_a_time_in_float32(variant: str) -> None:
    model = tiny_model(variant=variant, dtype=torch.float32)
    ids, mask = padded(tokens(ROWS, TIME), PADS)
    found = logits(model, ids, attention_mask=mask)
    for row, (left, right) in enumerate(PADS):
        real = slice(left, TIME - right)
        wanted = logits(model, ids[row : row + 1, real])[0]
        assert (found[row, real] - wanted).abs().max() < 1e-5 * wanted.abs().max()


@EVERY_VARIANT
def test_what_a_pad_holds_changes_nothing(variant: str) -> None:
    model = tiny_model(variant=variant)
    ids, mask = padded(tokens(ROWS, TIME), PADS)
    other = torch.where(mask == 0, 44, ids)
    found, wanted = (logits(model, x, attention_mask=mask) for x in (other, ids))
    assert torch.equal(found[mask == 1], wanted[mask == 1])


@EVERY_FORM
def test_a_padded_batch_goes_on_as_its_rows_would(form: dict[str, Any]) -> None:
    """Rows that stand at different places of chunk, segment and window continue side by side."""
    model, more = tiny_model(**form), tokens(ROWS, 11, seed=1)
    ids, mask = padded(tokens(ROWS, TIME), PADS)
    cache, outputs, seen = TitansCache(model.config), [], mask[:, :0]
    for piece in (ids, *more.split([1, 1, 1, 5, 1, 2], dim=1)):
        new = mask if piece is ids else torch.ones_like(piece)
        seen = torch.cat([seen, new], dim=1)
        with torch.no_grad():
            out = model(input_ids=piece, attention_mask=seen, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        outputs.append(out.logits)
    found = torch.cat(outputs[1:], dim=1)
    for row, (left, right) in enumerate(PADS):
        alone = torch.cat([ids[row, left : TIME - right], more[row]])[None]
        wanted = logits(model, alone)[0, -11:]
        torch.testing.assert_close(found[row], wanted, rtol=1e-9, atol=1e-9)


@EVERY_VARIANT
def test_pads_between_two_calls_change_nothing(variant: str) -> None:
    """A second padded call, even one that is all pads for a row, continues every row."""
    model, ids = tiny_model(variant=variant), tokens(2, TIME)
    mask = torch.ones_like(ids)
    mask[1, 10:20] = 0
    cache, outputs = TitansCache(model.config), []
    for first, last in ((0, 7), (7, 12), (12, 16), (16, TIME)):
        with torch.no_grad():
            out = model(
                input_ids=ids[:, first:last],
                attention_mask=mask[:, :last],
                past_key_values=cache,
                use_cache=True,
            )
        cache = out.past_key_values
        outputs.append(out.logits)
    found = torch.cat(outputs, dim=1)
    for row in range(2):
        real = mask[row] == 1
        wanted = logits(model, ids[row, real][None])[0]
        torch.testing.assert_close(found[row, real], wanted, rtol=1e-9, atol=1e-9)


@EVERY_VARIANT
def test_a_row_of_pads_alone_is_finite_and_disturbs_no_other(variant: str) -> None:
    model, ids = tiny_model(variant=variant), tokens(2, TIME)
    mask = torch.ones_like(ids)
    mask[1] = 0
    found = logits(model, ids, attention_mask=mask)
    assert found.isfinite().all()
    torch.testing.assert_close(found[0], logits(model, ids[:1])[0], rtol=1e-9, atol=1e-9)


@EVERY_VARIANT
def test_padded_training_equals_one_row_at_a_time(variant: str) -> None:
    model = tiny_model(variant=variant).train()
    ids, mask = padded(tokens(3, TIME), [(0, 0), (5, 0), (0, 9)])
    labels = ids.masked_fill(mask == 0, -100)
    out = model(input_ids=ids, attention_mask=mask, labels=labels)
    out.logits[mask == 1].square().sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    for row, (left, right) in enumerate([(0, 0), (5, 0), (0, 9)]):
        model(input_ids=ids[row : row + 1, left : TIME - right]).logits.square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-7, atol=1e-8, msg=name)


def generated(model: TitansForCausalLM, ids: Tensor, **options: Any) -> Tensor:
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0} | options
    return model.generate(ids, **{"attention_mask": torch.ones_like(ids)} | settings)


@EVERY_VARIANT
def test_greedy_generation_is_the_same_with_and_without_a_cache(variant: str) -> None:
    model, ids = tiny_model(variant=variant), tokens(2, 13)
    cached = generated(model, ids, use_cache=True)
    assert cached.shape == (2, 25)
    assert torch.equal(cached, generated(model, ids, use_cache=False))
    by_hand = ids
    for _ in range(12):
        by_hand = torch.cat([by_hand, logits(model, by_hand)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(cached, by_hand)


@EVERY_VARIANT
@pytest.mark.parametrize("use_cache", [True, False])
def test_a_left_padded_batch_generates_what_its_rows_would(variant: str, use_cache: bool) -> None:
    model, pads = tiny_model(variant=variant), [(0, 0), (3, 0), (10, 0)]
    ids, mask = padded(tokens(3, 13), pads)
    found = generated(model, ids, attention_mask=mask, use_cache=use_cache)
    for row, (left, _) in enumerate(pads):
        assert torch.equal(found[row, left:], generated(model, ids[row : row + 1, left:])[0])


@EVERY_VARIANT
def test_beam_search_is_the_same_with_and_without_a_cache(variant: str) -> None:
    model, ids = tiny_model(variant=variant), tokens(2, 13)
    beams = [generated(model, ids, num_beams=3, use_cache=use) for use in (True, False)]
    assert torch.equal(*beams)


@EVERY_VARIANT
def test_several_samples_of_one_prompt_are_drawn_side_by_side(variant: str) -> None:
    model, ids = tiny_model(variant=variant), tokens(1, 13)
    drawn = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        drawn.append(
            generated(model, ids, do_sample=True, num_return_sequences=3, use_cache=use_cache)
        )
    assert torch.equal(*drawn)
    assert len({tuple(row.tolist()) for row in drawn[0]}) == 3


@EVERY_VARIANT
def test_a_prompt_fed_in_parts_generates_the_same(variant: str) -> None:
    model, ids = tiny_model(variant=variant), tokens(2, TIME)
    assert torch.equal(generated(model, ids, prefill_chunk_size=5), generated(model, ids))


@EVERY_VARIANT
def test_generation_goes_on_from_a_returned_cache(variant: str) -> None:
    model, ids = tiny_model(variant=variant), tokens(2, 13)
    first = generated(model, ids, return_dict_in_generate=True, max_new_tokens=5)
    second = generated(
        model, first.sequences, past_key_values=first.past_key_values, max_new_tokens=7
    )
    assert torch.equal(second, generated(model, ids))


def test_positions_that_transformers_counts_over_pads_are_left_out() -> None:
    """Version 4 adds them to a prompt in pieces; from others the model refuses them."""
    model, ids = tiny_model(variant="mac"), tokens(1, 3)
    inputs = model.prepare_inputs_for_generation(ids, position_ids=torch.arange(3)[None])
    assert "position_ids" not in inputs
    with pytest.raises(TypeError, match="position_ids"):
        model(input_ids=ids, position_ids=torch.arange(3)[None])


def test_a_layout_moves_to_the_device_of_what_it_lays_out() -> None:
    """As accelerate has it where layers lie on several devices."""
    mask = torch.ones(2, 5, dtype=torch.bool)
    layout = Layout.build(mask, torch.zeros(2, dtype=torch.long), 4)
    assert layout.to("cpu") is layout
    moved = layout.to("meta", non_blocking=True)
    assert all(getattr(moved, field.name).is_meta for field in fields(Layout))
    slots = layout.enter(torch.ones(2, 5, 3))
    assert layout.leave(slots.to("meta")).is_meta


@EVERY_VARIANT
def test_room_for_more_slots_than_tokens_changes_nothing(
    variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A compiled graph lays tokens out so: it cannot ask a tensor how many slots it needs."""
    model = tiny_model(variant=variant)
    (ids, mask), more = padded(tokens(ROWS, TIME), PADS), tokens(ROWS, 3, seed=1)
    found = []
    for compiling in (False, True):
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda asked=compiling: asked)
        cache = TitansCache(model.config)
        with torch.no_grad():
            first = model(input_ids=ids, attention_mask=mask, past_key_values=cache)
            second = model(input_ids=more, past_key_values=cache)
        found.append(torch.cat([first.logits * mask[..., None], second.logits], 1))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


def test_another_kind_of_cache_is_refused() -> None:
    from transformers import DynamicCache

    model = tiny_model(variant="mac")
    with pytest.raises(TypeError, match="DynamicCache"):
        model(input_ids=tokens(1, 3), past_key_values=DynamicCache(), use_cache=True)
    with pytest.raises(ValueError, match="static"):
        generated(model, tokens(1, 3), cache_implementation="static")


def test_a_memory_is_not_rolled_back() -> None:
    model = tiny_model(variant="mac")
    with torch.no_grad():
        cache = model(input_ids=tokens(1, 9), use_cache=True).past_key_values
    with pytest.raises(NotImplementedError):
        cache.crop(4)
    cache.reset()
    assert size(cache) == 0
    assert tiny_config().num_hidden_layers == len(cache.layers)
