"""The mixers of the project's own baselines against plain loops over tokens, and each other."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from titans_pretrain.baselines.configuration_baseline import KINDS, BaselineConfig
from titans_pretrain.baselines.modeling_baseline import BaselineForCausalLM, make_mixer
from titans_pretrain.baselines.recurrences import by_chunks

SIZE = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_heads": 2,
    "intermediate_size": 24,
    "window_size": 5,
    "chunk_size": 4,
    "mini_batch_size": 4,
    "state_size": 4,
    "initializer_range": 0.3,
}


def token_by_token(queries, keys, values, log_decay, write=None):
    state = torch.zeros(*keys.shape[:2], keys.shape[3], values.shape[3])
    outputs = []
    for t in range(keys.shape[2]):
        state = log_decay[:, :, t, :, None].exp() * state
        update = values[:, :, t]
        if write is not None:
            update = write[:, :, t] * (update - torch.einsum("bhkv,bhk->bhv", state, keys[:, :, t]))
        state = state + keys[:, :, t, :, None] * update[:, :, None]
        outputs.append(torch.einsum("bhkv,bhk->bhv", state, queries[:, :, t]))
    return torch.stack(outputs, 2)


@pytest.mark.parametrize(
    ("channels", "delta", "strength"), [(1, False, 1), (6, False, 1), (6, False, 40), (1, True, 1)]
)
def test_chunks_give_what_a_loop_over_tokens_gives_with_its_gradients(channels, delta, strength):
    torch.manual_seed(0)
    shape = (2, 3, 11)
    tensors = [
        torch.randn(*shape, 6),
        F.normalize(torch.randn(*shape, 6), dim=-1),
        torch.randn(*shape, 5),
        -strength * torch.rand(*shape, channels),
        *([torch.rand(*shape, 1)] if delta else []),
    ]
    gradients = []
    outputs = []
    for run in (token_by_token, lambda *parts: by_chunks(*parts, chunk=4)):
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        outputs.append(run(*leaves))
        outputs[-1].square().sum().backward()
        gradients.append([leaf.grad for leaf in leaves])
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-5, atol=1e-5)
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_against_flash_linear_attention_where_it_is_installed():
    naive = pytest.importorskip("fla.ops.gated_delta_rule.naive")
    gla = pytest.importorskip("fla.ops.gla.naive")
    torch.manual_seed(0)
    q, v = torch.randn(2, 9, 3, 6), torch.randn(2, 9, 3, 5)
    k = F.normalize(torch.randn(2, 9, 3, 6), dim=-1)
    decay, write = -torch.rand(2, 9, 3), torch.rand(2, 9, 3)
    ours = [part.transpose(1, 2) for part in (q, k, v, decay[..., None], write[..., None])]
    expected, _ = naive.naive_recurrent_gated_delta_rule(q, k, v, write, decay, scale=1.0)
    torch.testing.assert_close(by_chunks(*ours, chunk=4).transpose(1, 2), expected)
    channels = -torch.rand(2, 9, 3, 6)
    expected, _ = gla.naive_recurrent_gla(q * math.sqrt(6), k, v, channels)
    ours[3:] = [channels.transpose(1, 2)]
    torch.testing.assert_close(by_chunks(*ours, chunk=4).transpose(1, 2), expected)


def inner_loss(layer, weights, biases, key, value):
    """TTT's loss of one token (H, 1, h)."""
    hidden = key
    for index, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        hidden = hidden @ weight + bias
        if index < len(weights) - 1:
            hidden = F.gelu(hidden)
    normal = F.layer_norm(hidden, hidden.shape[-1:], eps=1e-6)
    out = normal * layer.inner_scale + layer.inner_shift
    return out, 0.5 * (out - (value - key)).square().sum()


@pytest.mark.parametrize("kind", ["ttt_linear", "ttt_mlp"])
def test_ttt_reads_what_gradients_of_its_inner_loss_by_autograd_would_have_taught(kind):
    torch.manual_seed(0)
    layer = make_mixer(BaselineConfig(**SIZE), kind)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    queries, keys, values = torch.randn(3, 1, 2, 4, 16)
    rates = torch.rand(1, 2, 4, 1)
    weights, biases = list(layer.inner_weights), list(layer.inner_biases)
    pairs = list(zip(weights, biases, strict=True))
    read, after = layer._mini_batch(pairs, queries, keys, values, rates)
    leaves = [part.detach().clone().requires_grad_() for part in (*weights, *biases)]
    half = len(weights)
    taught = []
    for t in range(4):
        _, loss = inner_loss(
            layer, leaves[:half], leaves[half:], keys[0, :, t : t + 1], values[0, :, t : t + 1]
        )
        taught.append(torch.autograd.grad(loss, leaves))
    for t in range(4):
        share = (1 / (t + 1) + layer.step_sizes[t]).clamp(min=0)
        moved = [
            leaf - share * sum(rates[0, :, s, :, None] * taught[s][i] for s in range(t + 1))
            for i, leaf in enumerate(leaves)
        ]
        out, _ = inner_loss(
            layer, moved[:half], moved[half:], queries[0, :, t : t + 1], queries[0, :, t : t + 1]
        )
        mine = F.layer_norm(read[0, :, t : t + 1], (16,), eps=1e-6)
        mine = mine * layer.inner_scale + layer.inner_shift
        torch.testing.assert_close(mine, out, rtol=1e-4, atol=1e-4)
    for (weight, bias), new, shift in zip(after, moved[:half], moved[half:], strict=True):
        torch.testing.assert_close(weight[0], new, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(bias[0], shift, rtol=1e-4, atol=1e-4)


def test_mixers_of_transformers_begin_with_the_weights_of_their_class():
    fields = SIZE | {"mixers": ["mamba", "mamba2"]}
    first, second = (b.mixer for b in BaselineForCausalLM(BaselineConfig(**fields)).model.layers)
    torch.testing.assert_close(first.A_log[0].exp(), torch.arange(1.0, 5.0))
    steps = F.softplus(first.dt_proj.bias)
    assert steps.min() >= 0.0009
    assert steps.max() <= 0.11
    assert F.softplus(second.dt_bias).max() <= 0.11
    assert second.A_log.exp().std() > 0


def test_a_window_sees_exactly_its_tokens():
    torch.manual_seed(0)
    mixer = make_mixer(BaselineConfig(**SIZE), "window")
    x = torch.randn(1, 14, 32)
    changed = x.clone()
    changed[:, 3] += 1
    moved = (mixer(x) - mixer(changed)).abs().amax(-1)[0] > 1e-6
    assert moved.nonzero().flatten().tolist() == [3, 4, 5, 6, 7]


MODELS = {kind: {"mixers": [kind]} for kind in KINDS} | {
    "samba": {"mixers": ["mamba", "window"]},
    "gated-deltanet-h2": {"mixers": ["mamba2", "gated_deltanet", "window"], "num_hidden_layers": 3},
    "rmt": {"mixers": ["window"], "window_size": 32, "memory_embeddings": 2, "segment_length": 6},
}


QUICK = {"retnet", "gla", "gated_deltanet", "ttt_mlp", "samba", "rmt"}  # every part once


@pytest.fixture(
    scope="module",
    params=[m if m in QUICK else pytest.param(m, marks=pytest.mark.slow) for m in MODELS],
)
def model(request):
    torch.manual_seed(0)
    return BaselineForCausalLM(BaselineConfig(**(SIZE | MODELS[request.param]))).eval()


def test_every_parameter_learns(model):
    network = copy.deepcopy(model).train()
    ids = torch.randint(50, (2, 13))
    network(ids, labels=ids).loss.backward()
    still = [n for n, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert still == []


def test_no_token_sees_a_later_one(model):
    ids = torch.randint(50, (1, 15), generator=torch.Generator().manual_seed(0))
    changed = ids.clone()
    changed[:, 9] = (changed[:, 9] + 1) % 50
    with torch.no_grad():
        before, after = model(ids).logits, model(changed).logits
    torch.testing.assert_close(before[:, :9], after[:, :9], rtol=1e-5, atol=1e-5)
    assert (before[:, 9] - after[:, 9]).abs().max() > 1e-4


def test_pads_on_the_left_change_nothing(model):
    ids = torch.randint(50, (2, 15), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    with torch.no_grad():
        padded = model(ids, attention_mask=mask).logits
        alone = model(ids[:1, 6:]).logits
    torch.testing.assert_close(padded[:1, 6:], alone, rtol=1e-5, atol=1e-5)


def test_bfloat16_gives_about_the_same(model):
    ids = torch.randint(50, (2, 15), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = model(ids).logits
        found = copy.deepcopy(model).bfloat16()(ids).logits
    assert found.dtype == torch.bfloat16
    assert (found - wanted).std() < 0.15 * wanted.std()


def test_greedy_text_is_that_of_whole_rows(model):
    ids = torch.randint(50, (1, 7), generator=torch.Generator().manual_seed(0))
    made = model.generate(ids, max_new_tokens=5, do_sample=False, use_cache=True)
    row = ids
    with torch.no_grad():
        for _ in range(5):
            row = torch.cat([row, model(row).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(made, row)


def test_a_cache_is_refused(model):
    with pytest.raises(ValueError, match="keeps no cache"):
        model(torch.zeros(1, 3, dtype=torch.long), use_cache=True)
    with pytest.raises(TypeError, match="does not take past_key_values"):
        model(torch.zeros(1, 3, dtype=torch.long), past_key_values=object())


def test_rmt_carries_its_memory_over_segments():
    torch.manual_seed(0)
    fields = SIZE | MODELS["rmt"]
    network = BaselineForCausalLM(BaselineConfig(**fields)).eval()
    ids = torch.randint(50, (1, 18))
    changed = ids.clone()
    changed[:, 0] = (changed[:, 0] + 1) % 50
    with torch.no_grad():
        moved = (network(ids).logits - network(changed).logits).abs().amax(-1)[0]
    assert (moved[12:] > 1e-6).all()  # two segments later


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"mixers": ["gated_deltnet"]}, "use names out of retnet"),
        ({"num_heads": 5}, "no multiple of 8"),
        ({"chunk_size": 0}, "chunk_size 0 is less than 1"),
        ({"memory_embeddings": -1}, "memory_embeddings -1 is less than 0"),
        ({"memory_embeddings": 2}, "memory_embeddings need mixers"),
    ],
)
def test_a_value_the_model_cannot_have_is_refused(fields, told):
    with pytest.raises(ValueError, match=told):
        BaselineConfig(**(SIZE | fields))
