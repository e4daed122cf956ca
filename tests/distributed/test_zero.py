"""ZeRO-3 on gloo ranks against one process of plain PyTorch, on tiny models."""

import copy
import math
from unittest import mock

import pytest
import torch
from ranks import run_ranks
from zero_cases import (
    BATCH,
    batch,
    engine_for,
    engine_step,
    fields,
    passes,
    plain_loss,
    plain_losses,
    same_state,
    settings,
    sharded_losses,
)

from titans_pretrain.parallel import devices, zero, zero_settings
from titans_pretrain.parallel.construct import construct
from titans_pretrain.train import loss


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("count", "variant"),
    [
        (2, "lmm"),
        (2, "mac"),
        (4, "lmm"),
        (4, "mac"),
        slow(1, "mac"),
        *(slow(2, variant) for variant in ("mag", "mal", "transformer")),
    ],
)
def test_any_number_of_ranks_trains_like_one_process_with_accumulation_clipping_and_masks(
    count, variant
):
    train = settings(learning_rate=1e-3)
    losses, norms = plain_losses(train, variant=variant)
    for found in run_ranks(sharded_losses, count, train, {"variant": variant}):
        assert [pair[0] for pair in found] == pytest.approx(losses, abs=1e-6)
        assert [pair[1] for pair in found] == pytest.approx(norms, abs=1e-4)
    assert max(norms) > train.gradient_clip


@pytest.mark.parametrize(
    ("count", "variant", "mesh"),
    [
        (2, "lmm", {"sequence": 2}),
        slow(2, "mag", {"tensor": 2}),
        slow(4, "mac", {"sequence": 2}),
        slow(4, "transformer", {"tensor": 2, "sequence": 2}),
    ],
)
def test_any_mesh_trains_like_one_process_with_the_same_numbers_on_all_ranks(count, variant, mesh):
    train = settings(steps=8)
    losses, norms = plain_losses(train, variant=variant)
    results = run_ranks(sharded_losses, count, train, {"variant": variant}, mesh)
    assert results == [results[0]] * count
    assert [pair[0] for pair in results[0]] == pytest.approx(losses, abs=1e-5)
    assert [pair[1] for pair in results[0]] == pytest.approx(norms, rel=1e-3)


def first_gradients(train, mesh, interleaved):
    engine, parallel = engine_for(train, **mesh)
    passes(engine, parallel, train, 0, interleaved)
    norm = engine.gradient_norm()
    model = construct(fields(), 0)
    plain_loss(model, 0).backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    difference = 0.0
    for shard in engine.gradients():
        offsets, sizes = shard.window
        window = tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))
        expected = gradients[shard.name.removeprefix("gradients/")][window].flatten()
        assert shard.tensor.dtype == torch.float32
        if shard.tensor.numel():
            off = (shard.tensor - expected[shard.start : shard.stop]).abs().max()
            difference = max(difference, float(off))
    return difference, norm, math.hypot(*(float(g.norm()) for g in gradients.values()))


@pytest.mark.parametrize(
    ("count", "mesh", "interleaved"),
    [
        slow(1, {}, True),
        (2, {}, True),
        slow(2, {"sequence": 2}, True),
        (2, {"sequence": 2}, False),
        slow(4, {"tensor": 2, "sequence": 2}, True),
    ],
)
def test_the_reduced_gradients_are_those_of_one_process_in_any_order_of_passes(
    count, mesh, interleaved
):
    for difference, norm, expected in run_ranks(
        first_gradients, count, settings(), mesh, interleaved
    ):
        assert difference < 2e-6
        assert norm == pytest.approx(expected, rel=1e-5)


def several_forwards_before_the_first_backward(train):
    engine, parallel = engine_for(train)
    tokens, mask = batch(0)
    rows = BATCH // parallel.mesh.data
    first = parallel.groups.data_rank * rows
    losses = []
    for micro in range(rows):
        row = slice(first + micro, first + micro + 1)
        each = engine.losses(tokens[row, :-1], tokens[row, 1:], micro)
        summed = loss.token_loss_sum(each, mask[row])
        losses.append(loss.rank_loss(summed, int(mask.sum()), parallel.mesh.data))
    for micro, value in enumerate(losses):
        engine.backward(value, micro)
    return engine.gradient_norm()


def test_all_forwards_may_come_before_the_first_backward():
    model = construct(fields(), 0)
    plain_loss(model, 0).backward()
    expected = math.hypot(*(float(p.grad.norm()) for p in model.parameters()))
    for checkpointing in (False, True):
        train = settings(activation_checkpointing=checkpointing)
        found = run_ranks(several_forwards_before_the_first_backward, 2, train)
        assert found == pytest.approx([expected] * 2, rel=1e-5)


def test_untied_embeddings_and_activation_checkpointing_train_like_one_process():
    train = settings(steps=6, micro_batch_size=2, activation_checkpointing=True, gradient_clip=0.0)
    form = {"tie_word_embeddings": False}
    losses, norms = plain_losses(train, **form)
    for found in run_ranks(sharded_losses, 2, train, form):
        assert [pair[0] for pair in found] == pytest.approx(losses, abs=1e-6)
        assert [pair[1] for pair in found] == pytest.approx(norms, rel=1e-5)


def test_bf16_keeps_a_float32_master_and_follows_the_float32_run():
    losses, _ = plain_losses(settings(steps=8))
    for found in run_ranks(sharded_losses, 2, settings(steps=8, precision="bf16")):
        assert [pair[0] for pair in found] == pytest.approx(losses, abs=2e-2)


def resumed(train, half):
    """State and losses of a run never stopped, and of one restored from its state at ``half``."""
    engine, parallel = engine_for(train)
    for step in range(half):
        engine_step(engine, parallel, train, step)
    saved = copy.deepcopy(engine.shards())
    straight = [engine_step(engine, parallel, train, step) for step in range(half, train.steps)]
    straight_state = copy.deepcopy(engine.shards())
    engine, parallel = engine_for(train)
    for live, stored in zip(engine.shards(), saved, strict=True):
        live.tensor.copy_(stored.tensor)
    engine.restore(half)
    again = [engine_step(engine, parallel, train, step) for step in range(half, train.steps)]
    return straight, again, same_state(engine.shards(), straight_state)


FORMS = [
    {"precision": "fp32"},
    {"precision": "bf16"},
    {"precision": "fp32", "offload_optimizer": True},
    {"precision": "bf16", "offload_optimizer": True},
]
SOME_FORMS = [FORMS[0], slow(FORMS[1]), slow(FORMS[2]), FORMS[3]]


@pytest.mark.parametrize("form", SOME_FORMS)
def test_a_restored_engine_goes_on_bit_for_bit(form):
    for straight, again, same in run_ranks(resumed, 2, settings(steps=8, **form), 5):
        assert straight == again
        assert same


def gone_back(train, mesh, discards):
    """Losses after step 2, and again after going back to it in the middle of the fifth step."""
    engine, parallel = engine_for(train, **mesh)
    losses = []
    for step in range(4):
        if step == 2:
            saved = copy.deepcopy(engine.shards())
        losses.append(engine_step(engine, parallel, train, step))
    passes(engine, parallel, train, 4)
    engine.gradient_norm()
    if discards:
        engine.discard()
    for live, stored in zip(engine.shards(), saved, strict=True):
        live.tensor.copy_(stored.tensor)
    engine.restore(2)
    return losses[2:], [engine_step(engine, parallel, train, step) for step in (2, 3)]


@pytest.mark.parametrize(
    ("form", "mesh", "discards"),
    [
        (FORMS[0], {}, True),
        (FORMS[3], {"sequence": 2}, False),
    ],
)
def test_an_engine_goes_back_within_its_process_and_the_same_losses_follow(form, mesh, discards):
    for straight, again in run_ranks(gone_back, 2, settings(**form), mesh, discards):
        assert straight == again


def shard_ranges():
    engine, _ = engine_for(settings())
    named = dict(construct(fields(), 0).named_parameters())
    return [
        (shard.name, shard.shape, shard.start, shard.stop)
        for shard in engine.shards()
        if torch.equal(
            shard.tensor,
            named[shard.name.removeprefix("parameters/")]
            .detach()
            .flatten()[shard.start : shard.stop]
            if shard.name.startswith("parameters/")
            else torch.zeros(shard.stop - shard.start),
        )
    ]


def test_shards_cover_every_parameter_and_moment_once_with_the_initial_values():
    named = dict(construct(fields(), 0).named_parameters())
    per_rank = run_ranks(shard_ranges, 4)
    assert "lm_head.weight" not in named  # tied
    for prefix in ("parameters", "exp_avg", "exp_avg_sq"):
        for name, parameter in named.items():
            ranges = [
                (start, stop)
                for rank in per_rank
                for found, shape, start, stop in rank
                if found == f"{prefix}/{name}" and shape == tuple(parameter.shape)
            ]
            assert len(ranges) == 4
            assert [start for start, _ in ranges] == [0, *(stop for _, stop in ranges[:-1])]
            assert ranges[-1][1] == parameter.numel()
    assert sum(len(rank) for rank in per_rank) == 4 * 3 * len(named)


def train_on_one_infinite_gradient(train):
    engine, parallel = engine_for(train)
    engine_step(engine, parallel, train, 0)
    before = copy.deepcopy(engine.shards())
    for row in range(4):
        summed = engine.forward(batch(1)[0][row : row + 1, :-1], row).sum()
        engine.backward(summed * (float("inf") if devices.rank() == 1 else 1.0), row)
    norm = engine.step(1e-3)
    return norm, same_state(before, engine.shards()), engine.own_gradient_finite()


@pytest.mark.parametrize("form", SOME_FORMS)
def test_a_gradient_that_is_not_finite_shows_on_all_ranks_and_changes_nothing(form):
    found = run_ranks(train_on_one_infinite_gradient, 2, settings(**form))
    assert found == [(float("inf"), True, True), (float("inf"), True, False)]


def discarding(train, mesh):
    """Steps with a discarded one in between, and without."""
    engine, parallel = engine_for(train, **mesh)
    engine_step(engine, parallel, train, 0)
    before = copy.deepcopy(engine.shards())
    passes(engine, parallel, train, 5)
    engine.gradient_norm()
    engine.discard()
    unchanged = same_state(before, engine.shards())
    counts = {float(state["step"]) for state in engine._zero.optimizer.state.values()}
    again = [engine_step(engine, parallel, train, step) for step in (1, 2)]
    state = copy.deepcopy(engine.shards())
    engine, parallel = engine_for(train, **mesh)
    straight = [engine_step(engine, parallel, train, step) for step in (0, 1, 2)][1:]
    return unchanged, counts, again == straight, same_state(state, engine.shards())


@pytest.mark.parametrize(
    ("form", "mesh"),
    [
        (FORMS[0], {}),
        (FORMS[1], {"sequence": 2}),
        (FORMS[3], {}),
        slow(FORMS[1], {}),
        slow(FORMS[2], {}),
    ],
)
def test_a_discarded_step_leaves_everything_as_it_was(form, mesh):
    found = run_ranks(discarding, 2, settings(**form), mesh)
    assert found == [(True, {1.0}, True, True)] * 2


def losses_with_gradients_summed_in_parts_elsewhere(train, mesh):
    """As if the device were not the host."""
    zero.SUM_ELEMENTS = 1000
    reduce = zero.ZeroEngine._sum_over_sequence

    def sum_of_copies(engine):
        with mock.patch.object(torch.Tensor, "to", lambda tensor, device: tensor.clone()):
            reduce(engine)

    zero.ZeroEngine._sum_over_sequence = sum_of_copies
    return sharded_losses(train, None, mesh)


@pytest.mark.parametrize(
    ("precision", "mesh"),
    [
        ("fp32", {}),
        ("bf16", {"sequence": 2}),
        slow("bf16", {}),
        slow("fp32", {"sequence": 2}),
    ],
)
def test_an_offloaded_optimizer_trains_bit_for_bit_like_one_on_the_device(precision, mesh):
    plain = settings(steps=6, precision=precision)
    offloaded = settings(steps=6, precision=precision, offload_optimizer=True)
    expected = run_ranks(sharded_losses, 2, plain, None, mesh)
    found = run_ranks(losses_with_gradients_summed_in_parts_elsewhere, 2, offloaded, mesh)
    assert found == expected


def gradients_of_a_step_that_reaches_the_head_only(train):
    engine, parallel = engine_for(train, {"tie_word_embeddings": False})
    engine_step(engine, parallel, train, 0)
    head = engine._engine.module.lm_head
    losses = type(head).forward
    head.register_forward_hook(lambda module, inputs, _: losses(module, inputs[0].detach()))
    passes(engine, parallel, train, 1)
    engine.gradient_norm()
    reached = {shard.name for shard in engine.gradients() if bool(shard.tensor.any())}
    engine.step(1e-3)
    return reached


def test_a_parameter_without_a_gradient_has_none_left_from_the_step_before():
    reached = run_ranks(gradients_of_a_step_that_reaches_the_head_only, 2, settings())
    assert reached == [{"gradients/lm_head.weight"}] * 2


def own_gradients_of_the_initial_memory(train):
    engine, parallel = engine_for(train, sequence=2)
    found = []
    for step in range(2):
        passes(engine, parallel, train, step)
        part = engine.part("gradients", "model.layers.1.mixer.memory.initial.layer_0").tensor
        own = part.clone()
        engine.gradient_norm()
        found.append((bool(own.any()), bool(part.any())))
        engine.step(1e-3)
    return found


def test_later_spans_add_nothing_to_the_gradient_of_the_initial_memory():
    found = run_ranks(own_gradients_of_the_initial_memory, 2, settings())
    assert found == [[(True, True)] * 2, [(False, True)] * 2]


def own_gradients_over_steps(train):
    engine, _ = engine_for(train)
    known = []
    for factor in (1.0, float("nan"), 1.0):
        for row in range(BATCH // 2):
            summed = engine.forward(batch(0)[0][row : row + 1, :-1], row).sum()
            engine.backward(summed * (factor if devices.rank() else 1.0), row)
        engine.gradient_norm()
        engine.discard()
        known.append(engine.own_gradient_finite())
    return known


def test_only_the_rank_whose_own_gradient_is_not_finite_says_so_and_only_for_that_step():
    found = run_ranks(own_gradients_over_steps, 2, settings())
    assert found == [[True, True, True], [True, False, True]]


def reading_gradients_too_early(train):
    engine, _ = engine_for(train)
    with pytest.raises(ValueError, match="not reduced yet"):
        engine.gradients()


def test_gradients_can_be_read_only_once_they_are_reduced():
    run_ranks(reading_gradients_too_early, 1, settings())


def losses_with_gathered_and_released_weights(train, form, mesh):
    """Losses with validations in between; whether gathers were foreseen; weights left gathered."""
    zero_settings.PERSISTENT_ELEMENTS = 0  # the tiny model's weights would all stay
    zero_settings.BUCKET_ELEMENTS = 3000  # less than a block
    engine, parallel = engine_for(train, form, **mesh)
    losses = []
    for step in range(train.steps):
        losses.append(engine_step(engine, parallel, train, step)[0])
        if step == 3:
            engine.train(False)
            with torch.no_grad():
                for _ in range(2):
                    engine.forward(parallel.span(batch(9)[0][:1, :-1]))
            engine.train()
    left = [n for n, p in engine._parameters.items() if p.ds_status.name == "AVAILABLE"]
    return losses, engine._coordinator.is_complete_trace(), left


@pytest.mark.parametrize(
    ("count", "mesh", "checkpointing"),
    [slow(2, {}, True), slow(4, {"sequence": 2}, False), (4, {"sequence": 2}, True)],
)
def test_weights_gathered_block_by_block_train_like_one_process(count, mesh, checkpointing):
    train = settings(steps=6, activation_checkpointing=checkpointing)
    expected, _ = plain_losses(train, variant="mag")
    results = run_ranks(
        losses_with_gathered_and_released_weights, count, train, {"variant": "mag"}, mesh
    )
    for losses, foreseen, left in results:
        assert losses == pytest.approx(expected, abs=1e-5)
        assert foreseen
        assert left == []
