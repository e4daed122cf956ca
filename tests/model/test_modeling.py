"""What every variant of the model promises: causality, independence, gradients, loss, files."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_models import FORMS, logits, tiny_config, tiny_model, tokens
from torch import Tensor

from titans_pretrain.model import memory, neural_memory
from titans_pretrain.model.configuration_titans import TitansConfig
from titans_pretrain.model.fields import VARIANTS, WITH_MEMORY
from titans_pretrain.model.memory_reference import memory_scan as reference_scan
from titans_pretrain.model.modeling_titans import TitansForCausalLM

TIME = 27
EVERY_FORM = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
EVERY_VARIANT = pytest.mark.parametrize("variant", VARIANTS)


def next_token_loss(scores: Tensor, ids: Tensor) -> Tensor:
    return F.cross_entropy(scores[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


@EVERY_FORM
def test_no_token_moves_an_output_before_it(form: dict[str, Any]) -> None:
    model, ids = tiny_model(**form), tokens(1, TIME)
    before = logits(model, ids)
    for j in (1, 3, 4, 6, 7, 8, 13, 16, 26):
        changed = ids.clone()
        changed[:, j] = (ids[:, j] + 17) % 60 + 1
        after = logits(model, changed)
        assert torch.equal(after[:, :j], before[:, :j]), f"token {j} reaches back"
        assert not torch.equal(after[:, j], before[:, j])


@EVERY_VARIANT
def test_no_token_moves_an_output_before_it_on_the_decoding_path(variant: str) -> None:
    model, ids = tiny_model(variant=variant), tokens(1, TIME)
    before = logits(model, ids, use_cache=True)
    for j in (1, 3, 4, 7, 8, 16, 26):
        changed = ids.clone()
        changed[:, j:] = tokens(1, TIME, seed=1)[:, j:]
        after = logits(model, changed, use_cache=True)
        assert torch.equal(after[:, :j], before[:, :j]), f"token {j} reaches back"


@EVERY_FORM
def test_rows_of_a_batch_do_not_see_each_other(form: dict[str, Any]) -> None:
    model, ids = tiny_model(**form), tokens(2, TIME)
    changed = torch.cat([ids[:1], tokens(1, TIME, seed=1)])
    before, after = logits(model, ids), logits(model, changed)
    assert torch.equal(after[0], before[0])
    assert not torch.equal(after[1], before[1])
    torch.testing.assert_close(before[0], logits(model, ids[:1])[0], rtol=1e-9, atol=1e-9)


@EVERY_VARIANT
def test_two_calls_give_the_same_bits(variant: str) -> None:
    model, ids = tiny_model(variant=variant, dtype=torch.float32), tokens(2, TIME)
    assert torch.equal(logits(model, ids), logits(model, ids))
    losses = [model(input_ids=ids, labels=ids).loss for _ in range(2)]
    assert torch.equal(*losses)
    assert torch.equal(
        *(torch.autograd.grad(loss, model.model.embed_tokens.weight)[0] for loss in losses)
    )


@EVERY_FORM
def test_every_parameter_is_trained(form: dict[str, Any]) -> None:
    """No parameter is left out, and (embeddings of absent tokens aside) hardly an entry of one."""
    model, ids = tiny_model(**form).train(), tokens(2, TIME)
    model(input_ids=ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{name} is not used"
        assert parameter.grad.isfinite().all(), name
        share = (parameter.grad != 0).double().mean().item()
        assert share > (0 if "embed_tokens" in name else 0.99), f"{name}: {share:.2f}"


@pytest.mark.parametrize("variant", ["lmm", "mac", "mag", "mal"])
def test_a_token_is_remembered_beyond_window_and_segment(variant: str) -> None:
    model, ids = tiny_model(variant=variant), tokens(1, TIME)
    changed = ids.clone()
    changed[:, 1] = (ids[:, 1] + 17) % 60 + 1
    assert not torch.equal(logits(model, changed)[:, -1], logits(model, ids)[:, -1])


@pytest.mark.parametrize("name", [name for name in FORMS if not name.startswith("transformer")])
def test_the_model_on_the_reference_memory_gives_the_same(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = tiny_model(**FORMS[name]), tokens(2, TIME)
    assert neural_memory.memory_scan is memory.memory_scan
    fast = logits(model, ids)
    monkeypatch.setattr(neural_memory, "memory_scan", reference_scan)
    torch.testing.assert_close(fast, logits(model, ids), rtol=1e-9, atol=1e-9)


@EVERY_VARIANT
def test_length_and_padding_free_masks_do_not_matter(variant: str) -> None:
    """A shorter input gives the first outputs of a longer one; a mask of ones gives the same."""
    model, ids = tiny_model(variant=variant), tokens(2, TIME)
    whole = logits(model, ids)
    for length in (1, 2, 4, 5, 8, 9, 26):
        torch.testing.assert_close(logits(model, ids[:, :length]), whole[:, :length])
    torch.testing.assert_close(logits(model, ids, attention_mask=torch.ones_like(ids)), whole)


@EVERY_VARIANT
def test_the_loss_is_the_mean_cross_entropy_of_the_next_tokens(variant: str) -> None:
    model, ids = tiny_model(variant=variant, dtype=torch.float32), tokens(2, TIME)
    out = model(input_ids=ids, labels=ids)
    torch.testing.assert_close(out.loss, next_token_loss(out.logits, ids))
    some = ids.clone()
    some[0, :20] = -100
    kept = (some[:, 1:] != -100).flatten()
    wanted = F.cross_entropy(out.logits[:, :-1].flatten(0, 1)[kept], ids[:, 1:].flatten()[kept])
    torch.testing.assert_close(model(input_ids=ids, labels=some).loss, wanted)


@EVERY_VARIANT
def test_the_last_logits_alone_are_the_same(variant: str) -> None:
    model, ids = tiny_model(variant=variant), tokens(2, TIME)
    last = logits(model, ids, logits_to_keep=1)
    assert last.shape == (2, 1, 61)
    torch.testing.assert_close(last, logits(model, ids)[:, -1:])


@EVERY_VARIANT
def test_embeddings_serve_as_input(variant: str) -> None:
    model, ids = tiny_model(variant=variant), tokens(2, TIME)
    with torch.no_grad():
        embedded = model.get_input_embeddings()(ids)
        found = model(inputs_embeds=embedded, use_cache=False).logits
    assert torch.equal(found, logits(model, ids))


@EVERY_VARIANT
def test_the_model_runs_in_float64_throughout(variant: str) -> None:
    """Double precision is kept to the end, and float32 is close to it."""
    model, ids = tiny_model(variant=variant), tokens(2, TIME)
    out = model(input_ids=ids, labels=ids)
    assert {out.loss.dtype, out.logits.dtype} == {torch.float64}
    torch.testing.assert_close(out.loss, next_token_loss(out.logits, ids), rtol=1e-12, atol=0)
    single = logits(model.float(), ids)
    assert single.dtype == torch.float32
    error = (single - out.logits).abs().max()
    assert 1e-9 < error < 1e-3


@EVERY_VARIANT
def test_gradients_in_float64_are_those_of_finite_differences(variant: str) -> None:
    model, ids = tiny_model(variant=variant), tokens(1, 11)
    direction = [torch.randn_like(p) for p in model.parameters()]
    slopes = torch.autograd.grad(model(input_ids=ids, labels=ids).loss, list(model.parameters()))
    wanted = sum((s * d).sum() for s, d in zip(slopes, direction, strict=True))
    losses = []
    for shift in (1e-6, -2e-6):
        with torch.no_grad():
            for parameter, d in zip(model.parameters(), direction, strict=True):
                parameter.add_(shift * d)
            losses.append(model(input_ids=ids, labels=ids).loss)
    torch.testing.assert_close((losses[0] - losses[1]) / 2e-6, wanted, rtol=1e-5, atol=1e-8)


@EVERY_VARIANT
def test_the_model_trains_in_bfloat16(variant: str) -> None:
    model, ids = tiny_model(variant=variant, dtype=torch.float32), tokens(2, TIME)
    wanted = model(input_ids=ids, labels=ids).loss
    out = model.bfloat16()(input_ids=ids, labels=ids)
    assert out.logits.dtype == torch.bfloat16
    torch.testing.assert_close(out.loss.float(), wanted, rtol=0.05, atol=0.05)
    out.loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.dtype == torch.bfloat16
        assert parameter.grad.isfinite().all(), name


@EVERY_VARIANT
def test_gradient_checkpointing_changes_no_gradient(variant: str) -> None:
    model, ids = tiny_model(variant=variant, dtype=torch.float32).train(), tokens(2, TIME)
    model(input_ids=ids, labels=ids).loss.backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    calls = []
    model.model.layers[0].feed_forward.register_forward_pre_hook(lambda *_: calls.append(1))
    model(input_ids=ids, labels=ids).loss.backward()
    assert len(calls) == 2, "the block was not recomputed"
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, wanted[name]), name


@EVERY_VARIANT
@pytest.mark.parametrize("tied", [True, False])
def test_a_saved_model_comes_back_bit_for_bit(variant: str, tied: bool, tmp_path: Path) -> None:
    model = tiny_model(variant=variant, dtype=torch.float32, tie_word_embeddings=tied)
    ids = tokens(2, TIME)
    model.save_pretrained(tmp_path)
    loaded = TitansForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, parameter in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], parameter), name
    torch.testing.assert_close(logits(loaded, ids), logits(model, ids), rtol=1e-4, atol=1e-4)
    # weights mapped from a file are aligned otherwise, which may change a product's last bit
    rebuilt = TitansForCausalLM(loaded.config).eval()
    rebuilt.load_state_dict(loaded.state_dict())
    assert torch.equal(logits(rebuilt, ids), logits(model, ids))
    saved, fresh = loaded.config.to_dict(), model.config.to_dict()
    for volatile in ("dtype", "torch_dtype", "_name_or_path"):
        saved.pop(volatile, None)
        fresh.pop(volatile, None)
    assert saved == fresh
    head, embedding = loaded.lm_head.weight, loaded.model.embed_tokens.weight
    assert (head is embedding) == tied


@EVERY_VARIANT
def test_tied_embeddings_are_one_parameter(variant: str) -> None:
    tied, untied = (tiny_model(variant=variant, tie_word_embeddings=t) for t in (True, False))
    more = untied.num_parameters() - tied.num_parameters()
    assert more == 61 * 32
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert not torch.equal(untied.lm_head.weight, untied.model.embed_tokens.weight)


@EVERY_VARIANT
def test_the_same_seed_builds_the_same_weights(variant: str) -> None:
    built = []
    for _ in range(2):
        torch.manual_seed(3)
        built.append(TitansForCausalLM(tiny_config(variant=variant)).state_dict())
    assert all(torch.equal(built[0][name], built[1][name]) for name in built[0])
    assert all(x.isfinite().all() for x in built[0].values())


@pytest.mark.parametrize("variant", WITH_MEMORY)
def test_a_fresh_memory_forgets_little_and_steps_boundedly(
    variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1 - alpha is about 0.98 or more at the start, and theta stays below max_step (1 - eta)."""
    seen = []

    def watched(q: Tensor, k: Tensor, v: Tensor, *gates_and_state: Any, **options: Any) -> Any:
        seen.append(gates_and_state[:3])
        return memory.memory_scan(q, k, v, *gates_and_state, **options)

    monkeypatch.setattr(neural_memory, "memory_scan", watched)
    torch.manual_seed(0)
    logits(TitansForCausalLM(tiny_config(variant=variant, max_step=0.5)), tokens(2, TIME))
    assert seen
    for alpha, eta, theta in seen:
        assert 0.005 < alpha.mean() < 0.025
        assert (theta > 0).all()
        assert (theta <= 0.5 * (1 - eta)).all()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"variant": "titan"}, "variant"),
        ({"memory_depth": 5}, "memory_depth"),
        ({"memory_depth": 0}, "memory_depth"),
        ({"memory_activation": "relu"}, "memory_activation"),
        ({"gate_per": "segment"}, "gate_per"),
        ({"surprise_clip": 0.0}, "surprise_clip"),
        ({"max_step": -1.0}, "max_step"),
        ({"chunk_size": "64"}, "chunk_size"),
        ({"hidden_size": 30, "num_attention_heads": 4}, "num_attention_heads"),
        ({"memory_heads": 5}, "memory_heads"),
        ({"variant": "mac", "chunk_size": 16}, "chunk_size"),
        ({"variant": "mac", "chunk_size": 3}, "segment_length"),
        ({"variant": "mag", "partial_rotary_factor": 1.0}, "partial_rotary_factor"),
    ],
)
def test_a_configuration_the_model_cannot_have_is_refused(
    changes: dict[str, Any], named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        tiny_config(**changes)


def test_the_configuration_holds_every_field_and_survives_its_own_dictionary() -> None:
    config = tiny_config(variant="mag", memory_heads=4, surprise_clip=None)
    again = TitansConfig.from_dict(config.to_dict())
    assert again.to_dict() == config.to_dict()
    assert (again.variant, again.memory_heads, again.surprise_clip) == ("mag", 4, None)


def test_memory_heads_follow_the_attention_heads_unless_given() -> None:
    assert tiny_config(num_attention_heads=8).memory_heads == 8
    assert tiny_config(num_attention_heads=8, memory_heads=2).memory_heads == 2
