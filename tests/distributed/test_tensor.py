"""Layers split over tensor ranks: what they compute against one process, and what they tell."""

from unittest import mock

import pytest
import tensor_cases as cases
import torch
from ranks import run_ranks
from torch import nn

from titans_pretrain.errors import TitansError
from titans_pretrain.parallel import devices, linear_cross_entropy, tensor
from titans_pretrain.parallel.groups import Groups
from titans_pretrain.parallel.mesh import Mesh
from titans_pretrain.parallel.replay import Replay

MESHES = {
    "tensor 2": Mesh(tensor=2),
    "tensor 4": Mesh(tensor=4),
    "tensor 2, data 2": Mesh(tensor=2, data=2),
}
FORMS = {
    "tied": {"tie_word_embeddings": True},
    "untied": {"tie_word_embeddings": False},
    "gates per chunk, no momentum, depth 3": {
        "gate_per": "chunk",
        "use_momentum": False,
        "memory_depth": 3,
    },
    "no persistent tokens, no convolution": {"num_persistent_tokens": 0, "conv_width": 0},
}
# places whose partial sums a variant cannot do without
REDUCTIONS = {
    "memory.norm": "lmm",
    "attention_norm": "mag",
    "persistent": "mal",
    "mixer_norm": "mac",
    "feed_forward_norm": "transformer",
}


def name_of(variant, form, checkpointing=False):
    return f"{variant}, {form}" + ", checkpointing" * checkpointing


EXACT = {
    name_of(variant, form, checkpointing): {
        "fields": {"variant": variant} | fields,
        "checkpointing": checkpointing,
    }
    for variant in cases.VARIANTS
    for form, fields in FORMS.items()
    for checkpointing in (False, True)
}


TRIED = [(case, mesh) for mesh in MESHES for case in EXACT if mesh == "tensor 2" or "tied" in case]


@pytest.fixture(scope="module")
def results():
    """Of all cases in float64, by mesh; every mesh's ranks are started once."""
    found = {}

    def of(mesh):
        if mesh not in found:
            grid = MESHES[mesh]
            tried = {case: EXACT[case] for case, where in TRIED if where == mesh}
            found[mesh] = run_ranks(cases.on_ranks, grid.ranks, grid, tried, timeout=240)
        return found[mesh]

    return of


@pytest.fixture(scope="module")
def expected():
    """What one process computes, by the model's fields."""
    found = {}

    def of(fields):
        key = tuple(sorted(fields.items()))
        if key not in found:
            found[key] = cases.in_one_process(fields)
        return found[key]

    return of


@pytest.mark.parametrize(("case", "mesh"), TRIED)
def test_split_layers_give_the_logits_losses_and_gradients_of_whole_ones(
    case, mesh, results, expected
):
    logits, losses, gradients = expected(EXACT[case]["fields"])
    ranks = results(mesh)
    shares = torch.cat([rank[case]["logits"] for rank in ranks[: MESHES[mesh].tensor]], -1)
    torch.testing.assert_close(shares, logits, rtol=0, atol=1e-12)
    for rank in ranks:
        torch.testing.assert_close(rank[case]["losses"], losses, rtol=0, atol=1e-12)
    assert cases.wrong(ranks, case, gradients, 1e-11) == set()


@pytest.mark.parametrize(("case", "mesh"), TRIED)
def test_parameters_that_are_not_cut_get_the_same_gradient_bits_on_all_ranks(case, mesh, results):
    ranks = results(mesh)
    _, same = cases.joined(ranks, case)
    assert {"model.norm.weight", "model.layers.0.mixer_norm.weight"} <= same
    for parameter in same:
        first = ranks[0][case]["gradients"][parameter][0]
        assert all(torch.equal(rank[case]["gradients"][parameter][0], first) for rank in ranks)


@pytest.mark.parametrize("variant", cases.VARIANTS)
def test_what_is_cut_takes_an_equal_share_of_its_memory(variant, results):
    gradients = results("tensor 4")[3][name_of(variant, "untied")]["gradients"]
    whole = {name.rsplit(".", 2)[-2] for name, (_, w) in gradients.items() if w.shape == w.sizes}
    assert whole <= {"norm", "mixer_norm", "feed_forward_norm", "attention_norm", "persistent"}
    for gradient, window in gradients.values():
        assert tuple(gradient.shape) == window.sizes
        assert window.shape == window.sizes or window.offsets == tuple(
            3 * size if size < full else 0
            for size, full in zip(window.sizes, window.shape, strict=True)
        )


@pytest.mark.parametrize("variant", cases.VARIANTS)
def test_a_recomputed_block_does_not_communicate_again(variant, results):
    kept = results("tensor 2")[0][name_of(variant, "tied")]
    recomputed = results("tensor 2")[0][name_of(variant, "tied", checkpointing=True)]
    assert recomputed["forward"] == kept["forward"]
    assert recomputed["backward"] == kept["backward"]


@pytest.mark.parametrize(
    ("variant", "forward", "backward"),
    [("transformer", 2, 2), ("lmm", 2, 4)],
)
def test_a_block_sums_few_times(variant, forward, backward, results):
    counts = results("tensor 2")[0][name_of(variant, "tied")]
    layers, embedding_and_loss, head = 2, 3, 1
    assert counts["forward"]["all_reduce"] == layers * forward + embedding_and_loss
    assert counts["backward"]["all_reduce"] == layers * backward + head


@pytest.mark.parametrize(("place", "variant"), REDUCTIONS.items())
def test_a_missing_reduction_is_found(place, variant, expected):
    fields = {"variant": variant}
    broken = {"broken": {"fields": fields, "broken": (place,)}}
    ranks = run_ranks(cases.on_ranks, 2, MESHES["tensor 2"], broken)
    wrong = cases.wrong(ranks, "broken", expected(fields)[2], 1e-4)
    assert any(place in parameter for parameter in wrong)


SEEDS = range(3)
ROUNDED = {
    f"{variant}, new": {"fields": {"variant": variant}, "dtype": torch.float32, "lively": False}
    for variant in cases.VARIANTS
} | {
    f"{variant}, {name}, {seed}": {"fields": {"variant": variant}, "dtype": dtype, "seed": seed}
    for variant in cases.VARIANTS
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16))
    for seed in SEEDS
}


@pytest.fixture(scope="module")
def rounded():
    return run_ranks(cases.on_ranks, 2, MESHES["tensor 2"], ROUNDED, timeout=240)


@pytest.mark.parametrize("variant", cases.VARIANTS)
def test_a_new_model_in_float32_is_off_by_rounding_only(variant, rounded):
    case = f"{variant}, new"
    logits, losses, gradients = cases.in_one_process(**ROUNDED[case])
    shares = torch.cat([rank[case]["logits"] for rank in rounded], -1)
    torch.testing.assert_close(shares, logits, rtol=0, atol=1e-6)
    for rank in rounded:
        torch.testing.assert_close(rank[case]["losses"], losses, rtol=0, atol=1e-6)
    # one process is itself up to 3e-6 off the gradients in float64
    assert cases.wrong(rounded, case, gradients, 1e-5) == set()


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("variant", cases.VARIANTS)
def test_rounding_errors_are_those_of_one_process(variant, precision, rounded):
    """Summed over models, since chance doubles the error of one."""
    off = []
    for seed in SEEDS:
        case = f"{variant}, {precision}, {seed}"
        options = ROUNDED[case]
        _, exact_losses, exact = cases.in_one_process(options["fields"], seed=seed)
        _, losses, gradients = cases.in_one_process(**options)
        found, same = cases.joined(rounded, case)
        for parameter in same:
            one, other = (rank[case]["gradients"][parameter][0] for rank in rounded)
            assert torch.equal(one, other)
        found_losses = rounded[0][case]["losses"]
        assert found_losses.dtype == torch.float32
        off.append(
            [
                distance(found, exact),
                distance(gradients, exact),
                (found_losses - exact_losses).norm(),
                (losses - exact_losses).norm(),
            ]
        )
    found, gradients, found_losses, losses = torch.tensor(off).sum(0)
    assert found <= 2 * gradients
    assert found_losses <= 2 * losses


def distance(gradients, exact):
    return torch.stack([(gradients[name] - exact[name]).norm() for name in exact]).norm()


def split_alone(mesh):
    """What is said of parts that cannot be split."""
    groups, replay = Groups(mesh, devices.rank()), Replay(False)
    messages = []
    block = cases.build_model({"variant": "lmm"}, torch.float32).model.layers[0]
    block.mixer.surprise = nn.Linear(16, 16)
    uneven = nn.Linear(16, 17, bias=False)
    biased = nn.Linear(16, 16)
    untold = nn.ModuleDict({"q_proj": nn.Bilinear(4, 4, 4)})
    for unit, name in (
        (block, "model.layers.0"),
        (uneven, "lm_head"),
        (nn.Linear(16, 16), "lm_head"),
        (biased, "model.layers.0.mixer.o_proj"),
        (untold, "model.layers.0.mixer.attention.project"),
    ):
        with pytest.raises(TitansError) as refused:
            tensor.split(unit, name, groups, replay)
        messages.append(str(refused.value))
    return messages


def test_a_layer_it_does_not_know_or_cannot_divide_is_refused_by_name():
    unknown, uneven, biased_head, biased, kind = run_ranks(split_alone, 2, MESHES["tensor 2"])[0]
    assert "model.layers.0.mixer.surprise (Linear) is not known" in unknown
    assert "lm_head.weight (17, 16) does not divide into 2 equal parts along axis 0" in uneven
    assert "lm_head has a bias, which losses would leave out" in biased_head
    assert "model.layers.0.mixer.o_proj has a bias" in biased
    assert "project.q_proj (Bilinear) is not known" in kind


def split_by_parts(mesh):
    """A model split unit by unit: its logits, and whether names, ties and state hold."""
    groups, replay = Groups(mesh, devices.rank()), Replay(False)
    model = cases.build_model({"variant": "mac"}, torch.float64)
    names = list(model.state_dict())
    objects = list(model.parameters())
    tensor.split(model.model.embed_tokens, "model.embed_tokens", groups, replay)
    for index, block in enumerate(model.model.layers):
        tensor.split(block, f"model.layers.{index}", groups, replay)
    tensor.split(model.model.norm, "model.norm", groups, replay)
    tensor.split(model.lm_head, "lm_head", groups, replay)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    model.load_state_dict(state)
    ids, _, _ = cases.batch()
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits
    gate = model.model.layers[0].mixer.memory.step_gate
    return {
        "logits": logits,
        "names": list(state) == names,
        "same objects": all(a is b for a, b in zip(model.parameters(), objects, strict=True)),
        "tied": model.lm_head.weight is model.model.embed_tokens.weight,
        "bias": gate.initial_bias,
    }


def test_parts_split_one_by_one_keep_names_ties_and_state(expected):
    ranks = run_ranks(split_by_parts, 2, MESHES["tensor 2"])
    whole = torch.cat([rank["logits"] for rank in ranks], -1)
    torch.testing.assert_close(whole, expected({"variant": "mac"})[0], rtol=0, atol=1e-12)
    assert all(rank[fact] for rank in ranks for fact in ("names", "same objects", "tied"))
    assert ranks[0]["bias"] < 0


def given_states(dtype, scale):
    """Hidden states, a head's weight, targets and the derivatives by their losses."""
    generator = torch.Generator().manual_seed(3)
    shape = (cases.ROWS, cases.LENGTH)
    hidden = torch.randn(*shape, 16, generator=generator)
    weight = scale * torch.randn(cases.VOCABULARY, 16, generator=generator)
    targets = torch.randint(cases.VOCABULARY, shape, generator=generator)
    weights = torch.rand(shape, generator=generator)
    return hidden.to(dtype), weight.to(dtype), targets, weights


def losses_of_given_states(mesh, dtype, scale):
    """Losses and gradients from this rank's share of a head, five tokens at a time."""
    groups = Groups(mesh, devices.rank())
    hidden, weight, targets, weights = given_states(dtype, scale)
    hidden.requires_grad_()
    share = weight.chunk(mesh.tensor)[groups.tensor_rank].clone().requires_grad_()
    with mock.patch.object(linear_cross_entropy, "chunk_tokens", return_value=5):
        losses = linear_cross_entropy.linear_cross_entropy(hidden, share, targets, groups.tensor)
        (losses * weights).sum().backward()
    for column in (-100, cases.VOCABULARY):
        wrong = torch.full_like(targets, column)
        with pytest.raises(RuntimeError, match=r"token ids outside of \[0, 40\)"):
            linear_cross_entropy.linear_cross_entropy(hidden, share, wrong, groups.tensor)
    return losses.detach(), hidden.grad, share.grad


@pytest.mark.parametrize(
    ("dtype", "scale", "tolerance"),
    [
        (torch.float64, 1.0, 1e-13),
        (torch.float32, 1.0, 1e-6),
        (torch.float32, 1e4, 1e-6),
        (torch.bfloat16, 1.0, 8e-3),
    ],
)
def test_losses_by_a_split_head_are_those_by_a_whole_one(dtype, scale, tolerance):
    ranks = run_ranks(losses_of_given_states, 2, MESHES["tensor 2"], dtype, scale)
    hidden, weight, targets, weights = given_states(dtype, scale)
    whole = [hidden.requires_grad_(), weight.requires_grad_()]
    losses = linear_cross_entropy.linear_cross_entropy(*whole, targets, None)
    (losses * weights).sum().backward()
    for found, by_hidden, _ in ranks:
        torch.testing.assert_close(found, losses.detach(), rtol=1e-6, atol=1e-6)
        assert largest_error(by_hidden, hidden.grad) < tolerance
        assert torch.equal(by_hidden, ranks[0][1])
    assert largest_error(torch.cat([share for *_, share in ranks]), weight.grad) < tolerance


def largest_error(found, expected):
    """Over the largest value."""
    assert found.dtype == expected.dtype
    return float((found.double() - expected.double()).abs().max() / expected.abs().max())


def embed(mesh):
    groups = Groups(mesh, devices.rank())
    model = cases.build_model({"variant": "lmm"}, torch.float32)
    tensor.split(model, "", groups, Replay(False))
    with pytest.raises(RuntimeError, match=r"token ids outside of \[0, 40\)"):
        model(input_ids=torch.tensor([[0, cases.VOCABULARY]]), use_cache=False)


def test_a_token_outside_of_the_vocabulary_is_refused():
    run_ranks(embed, 2, MESHES["tensor 2"])
