"""The mixers of the project's own baselines against plain loops over tokens, and each other."""

import copy
import inspect
import math

import mamba_ssm_weights
import pytest
import torch
import torch.nn.functional as F
from tiny_baseline import SIZE

from titans_pretrain.model.configuration_baseline import KINDS, BaselineConfig
from titans_pretrain.model.modeling_baseline import (
    BaselineBlock,
    BaselineForCausalLM,
    BaselinePreTrainedModel,
    make_mixer,
)
from titans_pretrain.model.recurrences import by_chunks


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
    for run in (token_by_token, lambda *parts: by_chunks(*parts, chunk=4)[0]):
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
    torch.testing.assert_close(by_chunks(*ours, chunk=4)[0].transpose(1, 2), expected)
    channels = -torch.rand(2, 9, 3, 6)
    expected, _ = gla.naive_recurrent_gla(q * math.sqrt(6), k, v, channels)
    ours[3:] = [channels.transpose(1, 2)]
    torch.testing.assert_close(by_chunks(*ours, chunk=4)[0].transpose(1, 2), expected)


def plain_convolution(part, x):
    """A causal depthwise convolution of (B, T, C), tap by tap."""
    weight, bias = part.weight, part.bias
    taps = weight.shape[-1]
    total = 0 if bias is None else bias
    for tap in range(taps):
        shifted = F.pad(x, (0, 0, taps - 1 - tap, 0))[:, : x.shape[1]]
        total = total + weight[:, 0, tap] * shifted
    return total


def plain_rotation(x, positions):
    """Rotary embedding of (B, H, T, h) as a product of complex numbers."""
    half = x.shape[-1] // 2
    steps = 10000.0 ** -(torch.arange(half) / half)
    turned = torch.polar(torch.ones(len(positions), half), positions[:, None] * steps)
    out = torch.complex(x[..., :half], x[..., half:]) * turned
    return torch.cat([out.real, out.imag], -1)


def split(x, heads):
    """(B, T, H h) to (B, H, T, h)."""
    return x.reshape(*x.shape[:2], heads, -1).transpose(1, 2)


def plain_linear_mixer(layer, kind, x):
    """A whole layer of the recurrences, token by token."""
    q, k, v = layer.q_proj(x), layer.k_proj(x), layer.v_proj(x)
    write = None
    if "delta" in kind:
        q, k, v = (
            F.silu(plain_convolution(conv, part))
            for conv, part in ((layer.q_conv, q), (layer.k_conv, k), (layer.v_conv, v))
        )
        write = split(torch.sigmoid(layer.write_proj(x)), 2)
    q, k, v = (split(part, 2) for part in (q, k, v))
    decay = torch.zeros(*q.shape[:3], 1)
    if kind == "retnet":
        q, k = (plain_rotation(part, torch.arange(x.shape[1])) for part in (q, k))
        decay = torch.log(1 - 2.0 ** -torch.tensor([5.0, 6.0]))[:, None, None].expand_as(decay)
    elif kind == "gla":
        logits = split(layer.decay.up_proj(layer.decay.down_proj(x)), 2)
        decay = torch.log(torch.sigmoid(logits) ** (1 / 16))
    if "delta" in kind:
        q, k = (part / part.norm(dim=-1, keepdim=True) for part in (q, k))
    if kind == "gated_deltanet":
        rates = F.softplus(layer.decay.proj(x) + layer.decay.dt_bias)
        decay = split(-layer.decay.A_log.exp() * rates, 2)
    read = token_by_token(q / q.shape[-1] ** 0.5, k, v, decay, write)
    read = F.rms_norm(read, read.shape[-1:], layer.norm.weight, 1e-6).transpose(1, 2).flatten(2)
    if kind != "deltanet":
        read = read * F.silu(layer.gate_proj(x))
    return layer.o_proj(read)


@pytest.mark.parametrize("kind", ["retnet", "gla", "deltanet", "gated_deltanet"])
def test_a_whole_layer_gives_what_its_published_steps_give_token_by_token(kind):
    torch.manual_seed(0)
    layer = make_mixer(BaselineConfig(**SIZE), kind)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    x = torch.randn(2, 11, 32)
    with torch.no_grad():
        wanted = plain_linear_mixer(layer, kind, x)
        torch.testing.assert_close(layer(x)[0], wanted, rtol=1e-4, atol=1e-5)


def plain_gelu(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def inner_loss(layer, weights, biases, key, value):
    """TTT's loss of one token (H, 1, h)."""
    hidden = key
    for index, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        hidden = hidden @ weight + bias
        if index < len(weights) - 1:
            hidden = plain_gelu(hidden)
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
    pairs = layer.inner()
    weights, biases = zip(*pairs, strict=True)
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


def plain_ttt(block, x):
    """A whole TTT block but its feed-forward, by autograd and token by token; (1, T, D)."""
    x = x + plain_convolution(
        block.before.convolution, F.rms_norm(x, (32,), block.before.norm.weight, 1e-6)
    )
    layer, normed = block.mixer, F.rms_norm(x, (32,), block.mixer_norm.weight, 1e-6)
    shared = layer.q_proj(normed)
    q, k = (split(plain_convolution(c, shared), 2) for c in (layer.q_conv, layer.k_conv))
    positions = torch.arange(x.shape[1]) % 4
    q, k = (plain_rotation(part, positions)[0] for part in (q, k))
    v = split(layer.v_proj(normed), 2)[0]
    rates = 0.7 / 16 * torch.sigmoid(layer.rate_proj(normed))[0].T[:, :, None]
    weights, biases = zip(*layer.inner(), strict=True)
    half, start = len(weights), [part.detach() for part in (*weights, *biases)]
    outputs, moved = [], start
    for t in range(x.shape[1]):
        place = int(positions[t])
        if place == 0:
            base, summed = moved, [torch.zeros_like(part) for part in start]
        leaves = [part.detach().requires_grad_() for part in base]
        _, loss = inner_loss(layer, leaves[:half], leaves[half:], k[:, t : t + 1], v[:, t : t + 1])
        taught = torch.autograd.grad(loss, leaves)
        summed = [
            total + rates[:, t, :, None] * part for total, part in zip(summed, taught, strict=True)
        ]
        share = (1 / (place + 1) + layer.step_sizes[place]).clamp(min=0)
        moved = [part - share * total for part, total in zip(base, summed, strict=True)]
        own = q[:, t : t + 1]
        outputs.append(own + inner_loss(layer, moved[:half], moved[half:], own, own)[0])
    read = torch.cat(outputs, 1).transpose(0, 1).flatten(1)[None]
    read = F.layer_norm(read, (32,), layer.norm.weight, layer.norm.bias, 1e-6)
    return x + layer.o_proj(plain_gelu(layer.gate_proj(normed)) * read)


@pytest.mark.parametrize("kind", ["ttt_linear", "ttt_mlp"])
def test_a_whole_ttt_block_gives_what_its_published_steps_give_token_by_token(kind):
    torch.manual_seed(0)
    block = BaselineBlock(BaselineConfig(**(SIZE | {"inner_learning_rate": 0.7})), kind)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    torch.nn.init.zeros_(block.feed_forward.down_proj.weight)
    x = torch.randn(1, 11, 32)
    torch.testing.assert_close(block(x), plain_ttt(block, x), rtol=1e-4, atol=1e-4)


def test_mixers_of_transformers_begin_with_the_weights_of_mamba_ssm():
    torch.manual_seed(0)
    fields = SIZE | {"mixers": ["mamba", "mamba2"], "num_hidden_layers": 8}
    first, second = (
        b.mixer for b in BaselineForCausalLM(BaselineConfig(**fields)).model.layers[:2]
    )
    for mixer in (first, second):
        mamba_ssm_weights.check(mixer, residuals=16)


def test_ttt_begins_with_convolutions_without_bias_cut_at_two_deviations():
    torch.manual_seed(0)
    fields = SIZE | {"mixers": ["ttt_linear"], "num_hidden_layers": 1}
    (block,) = BaselineForCausalLM(BaselineConfig(**fields)).model.layers
    for convolution in (block.before.convolution, block.mixer.q_conv, block.mixer.k_conv):
        assert not convolution.bias.any()
        assert 0.5 < float(convolution.weight.abs().max()) < 1.14  # torch's own end at 0.5


@pytest.mark.parametrize("kind", ["ttt_linear", "ttt_mlp"])
def test_the_inner_model_of_ttt_begins_as_a_layer_does(kind):
    torch.manual_seed(0)
    fields = SIZE | {"mixers": [kind], "num_hidden_layers": 1}
    (block,) = BaselineForCausalLM(BaselineConfig(**fields)).model.layers
    for weight, bias in block.mixer.inner():
        assert float(weight.std()) == pytest.approx(SIZE["initializer_range"], rel=0.15)
        assert not bias.any()


def test_gated_deltanet_begins_with_scales_uniform_to_sixteen():
    torch.manual_seed(0)
    fields = {"hidden_size": 512, "num_heads": 64, "num_hidden_layers": 1}
    fields |= {"vocab_size": 8, "intermediate_size": 8}
    decay = BaselineForCausalLM(BaselineConfig(**fields)).model.layers[0].mixer.decay
    scales = decay.A_log.detach().exp()
    assert scales.max() <= 16
    assert float(scales.mean()) == pytest.approx(8, abs=1.5)  # 5.4 where A_log is uniform


def test_scales_that_a_file_holds_stay_where_others_of_their_part_are_missing(tmp_path):
    network = BaselineForCausalLM(BaselineConfig(**(SIZE | {"mixers": ["gated_deltanet"]})))
    kept = {n: t for n, t in network.state_dict().items() if not n.endswith("dt_bias")}
    network.save_pretrained(tmp_path, state_dict=kept)
    loaded = BaselineForCausalLM.from_pretrained(tmp_path)
    for ours, theirs in zip(network.model.layers, loaded.model.layers, strict=True):
        assert torch.equal(ours.mixer.decay.A_log, theirs.mixer.decay.A_log)


def test_a_window_sees_exactly_its_tokens():
    torch.manual_seed(0)
    mixer = make_mixer(BaselineConfig(**SIZE), "window")
    x = torch.randn(1, 14, 32)
    changed = x.clone()
    changed[:, 3] += 1
    moved = (mixer(x)[0] - mixer(changed)[0]).abs().amax(-1)[0] > 1e-6
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


@pytest.mark.parametrize("fields", [{"mixers": [*KINDS], "num_hidden_layers": 9}, MODELS["rmt"]])
def test_no_part_that_has_a_beginning_of_its_own_is_passed_over(fields, monkeypatch):
    begun, begin = set(), BaselinePreTrainedModel._init_weights
    monkeypatch.setattr(
        BaselinePreTrainedModel,
        "_init_weights",
        lambda model, module: begun.add(module) or begin(model, module),
    )
    network = BaselineForCausalLM(BaselineConfig(**(SIZE | fields)))
    known = inspect.getsource(begin)
    parts = {m for m in network.modules() if type(m).__module__.startswith("titans_pretrain")}
    assert {m for m in parts if type(m).__name__ in known} <= begun


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


def test_positions_that_are_not_the_tokens_own_are_refused():
    torch.manual_seed(0)
    network = BaselineForCausalLM(BaselineConfig(**(SIZE | {"mixers": ["window"]}))).eval()
    ids = torch.randint(50, (2, 6))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    rows = torch.arange(6)[None].expand(2, -1)
    own = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        assert torch.equal(network(ids, position_ids=rows).logits, network(ids).logits)
        wanted = network(ids, attention_mask=mask).logits
        assert torch.equal(network(ids, attention_mask=mask, position_ids=own).logits, wanted)
    for given in ({"attention_mask": None}, {"attention_mask": mask}):
        with pytest.raises(TypeError, match="takes no position_ids but"):
            network(ids, **given, position_ids=rows % 3)
    with pytest.raises(TypeError, match="takes no position_ids but"):
        network(ids, position_ids=own)


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
        ({"mixers": None}, "use names out of retnet"),
        ({"num_heads": 0}, "num_heads 0 is less than 1"),
        ({"hidden_size": 0}, "hidden_size 0 is less than 1"),
        ({"intermediate_size": 0}, "intermediate_size 0 is less than 1"),
        ({"vocab_size": 0}, "vocab_size 0 is less than 1"),
        ({"chunk_size": 0}, "chunk_size 0 is less than 1"),
        ({"window_size": None}, "window_size None is no whole number"),
        ({"rope_theta": 0.0}, "rope_theta 0.0 is no finite number above 0"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps -1.0 is no finite number above 0"),
        ({"inner_learning_rate": None}, "inner_learning_rate None is no finite number"),
        ({"initializer_range": math.inf}, "initializer_range inf is no finite number"),
        (
            {"mixers": ["mamba2"], "hidden_size": 72, "num_heads": 1, "expand": 1},
            r"hidden_size 72 \* expand 1 is no multiple of mamba2's head width 64",
        ),
        ({"memory_embeddings": -1}, "memory_embeddings -1 is less than 0"),
        ({"memory_embeddings": 2}, "memory_embeddings need mixers"),
        (MODELS["rmt"] | {"window_size": 9}, "9 does not reach .* 10 is the smallest"),
    ],
)
def test_a_value_the_model_cannot_have_is_refused(fields, told):
    with pytest.raises(ValueError, match=told):
        BaselineConfig(**(SIZE | fields))
