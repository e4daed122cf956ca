"""Inputs at the edge: half precision with pads, autocast, no token, refused arguments."""

import pytest
import torch
from tiny_models import VARIANTS

from titans_pretrain.model.cache import TitansCache
from titans_pretrain.model.configuration_titans import TitansConfig
from titans_pretrain.model.memory import MemoryState, memory_scan
from titans_pretrain.model.modeling_titans import TitansForCausalLM

MEMORIES = [variant for variant in VARIANTS if variant != "transformer"]


def build(variant: str, **changes: object) -> TitansForCausalLM:
    torch.manual_seed(0)
    fields = {
        "variant": variant,
        "vocab_size": 61,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "chunk_size": 4,
        "segment_length": 8,
        "window_size": 6,
        "num_persistent_tokens": 0,
    }
    return TitansForCausalLM(TitansConfig(**(fields | changes))).eval()


def padded() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(0, 61, (2, 13), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    return ids, mask


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_pads_poison_nothing_in_half_precision(variant: str, dtype: torch.dtype) -> None:
    model = build(variant).to(dtype)
    ids, mask = padded()
    out = model(ids, attention_mask=mask)
    assert out.logits[mask.bool()].isfinite().all()
    for layer in out.past_key_values.layers:
        assert all(tensor.isfinite().all() for tensor in layer.state.values())


@pytest.mark.parametrize("variant", VARIANTS)
def test_autocast_continues_a_cache(variant: str) -> None:
    model = build(variant)
    ids, _ = padded()
    expected = model(ids).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        first = model(ids[:, :6])
        rest = model(ids[:, 6:], past_key_values=first.past_key_values)
    got = torch.cat([first.logits, rest.logits], 1)
    assert (got.float() - expected).abs().max() < 0.05


def test_autocast_leaves_the_memory_as_exact_as_it_is() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.randn(1, 2, 32, 8, generator=generator) for _ in range(3)]
    gates = [torch.rand(1, 2, 32, generator=generator) for _ in range(3)]
    weights = torch.randn(1, 2, 8, 8, generator=generator).requires_grad_()
    state = MemoryState((weights,), (torch.zeros_like(weights),))

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        reads, final = memory_scan(*tokens, *gates, state, chunk_size=8, surprise_clip=1.0)
        return final.weights[0], torch.autograd.grad(reads.sum(), weights)[0]

    plain = run()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = run()
    assert all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_token_at_all_is_refused(variant: str) -> None:
    model = build(variant)
    empty = torch.zeros(1, 0, dtype=torch.long)
    for arguments in ({"use_cache": False}, {}, {"past_key_values": TitansCache(model.config)}):
        with pytest.raises(ValueError, match="no tokens"):
            model(empty, **arguments)


def test_a_cache_while_checkpointing_gradients_is_refused() -> None:
    model = build("lmm").train()
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="cannot continue a cache"):
        model(torch.zeros(1, 4, dtype=torch.long), past_key_values=TitansCache(model.config))


@pytest.mark.parametrize("mask", [torch.zeros(1, 4) - 1, torch.full((1, 4), 5)])
def test_a_mask_of_other_values_than_zero_and_one_is_refused(mask: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="other than 0"):
        build("lmm")(torch.zeros(1, 4, dtype=torch.long), attention_mask=mask)


def test_a_mask_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="expected"):
        build("lmm")(torch.zeros(1, 4, dtype=torch.long), attention_mask=torch.ones(1, 3))


@pytest.mark.parametrize("argument", ["position_ids", "token_type_ids", "output_attentions"])
def test_an_argument_that_would_be_ignored_is_refused(argument: str) -> None:
    ids = torch.zeros(1, 4, dtype=torch.long)
    with pytest.raises(TypeError, match=argument):
        build("lmm")(ids, **{argument: ids if argument != "output_attentions" else True})


def test_a_misspelt_field_is_refused() -> None:
    with pytest.raises(ValueError, match="segment_length"):
        TitansConfig(segment_lenght=8)


@pytest.mark.parametrize("variant", VARIANTS)
def test_hidden_states_are_the_embeddings_each_blocks_output_and_the_final_norm(
    variant: str,
) -> None:
    model = build(variant)
    ids, mask = padded()
    out = model(ids, attention_mask=mask, output_hidden_states=True)
    assert len(out.hidden_states) == 3
    real = mask.bool()
    assert torch.equal(out.hidden_states[0][real], model.model.embed_tokens(ids)[real])
    assert torch.equal(model.lm_head(out.hidden_states[-1]), out.logits)
    assert model(ids).hidden_states is None


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_sequence_shorter_than_its_chunk_is_learned_from(variant: str) -> None:
    model = build(variant, chunk_size=64, segment_length=64)
    ids = torch.randint(0, 61, (1, 5), generator=torch.Generator().manual_seed(0))
    steps = TitansCache(model.config)
    one_by_one = torch.cat(
        [model(ids[:, t : t + 1], past_key_values=steps).logits for t in range(5)], 1
    )
    assert (model(ids).logits - one_by_one).abs().max() < 1e-5
