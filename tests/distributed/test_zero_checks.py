"""What DeepSpeed would do wrong without a word is found before anything is trained or saved."""

import copy
import math

import pytest
import torch
from mesh_training_cases import configuration
from ranks import run_ranks
from zero_cases import batch, engine_for, engine_step, same_state, settings

from titans_pretrain.errors import TitansError
from titans_pretrain.parallel import devices, sequence, tensor_comm, zero_settings
from titans_pretrain.parallel.mesh import Mesh
from titans_pretrain.parallel.parallelize import Parallel
from titans_pretrain.train import passes
from titans_pretrain.train.self_check import check_mesh


def train_with_gradients_scaled_by_two(train):
    engine, parallel = engine_for(train)
    reduce = engine._zero.partition_grads
    engine._zero.partition_grads = lambda parameters, parts: reduce(
        parameters, [part * 2 for part in parts]
    )
    before = copy.deepcopy(engine.shards())
    with pytest.raises(TitansError, match="not the mean over the data ranks"):
        engine_step(engine, parallel, train, 0)
    return same_state(before, engine.shards())


def test_a_wrong_gradient_scale_is_found_before_anything_changes():
    assert run_ranks(train_with_gradients_scaled_by_two, 2, settings()) == [True, True]


def train_with_a_step_that_does_nothing(train):
    engine, parallel = engine_for(train)
    engine._zero._optimizer_step = lambda group: None
    with pytest.raises(TitansError, match="did not change"):
        engine_step(engine, parallel, train, 0)


def test_a_step_without_effect_is_found():
    run_ranks(train_with_a_step_that_does_nothing, 2, settings())


def train_with_a_step_that_does_nothing_where_a_rank_has_no_gradient(train):
    engine, parallel = engine_for(train, tensor=2)
    engine._zero._optimizer_step = lambda group: None
    check = engine._probe.check_update

    def without_a_gradient(learning_rate):
        if devices.rank() == 1:
            for followed in engine._probe._followed:
                followed.moved = 0.0
        check(learning_rate)

    engine._probe.check_update = without_a_gradient
    with pytest.raises(TitansError, match="did not change"):
        engine_step(engine, parallel, train, 0)


def test_a_step_without_effect_is_found_on_ranks_without_a_gradient_too():
    run_ranks(train_with_a_step_that_does_nothing_where_a_rank_has_no_gradient, 2, settings())


def train_at_a_rate_below_the_spacing_of_the_weights(train):
    engine, parallel = engine_for(train)
    engine_step(engine, parallel, train, 0)


def test_a_rate_too_small_to_see_is_no_fault():
    train = settings(learning_rate=1e-9)
    run_ranks(train_at_a_rate_below_the_spacing_of_the_weights, 2, train)


def hooks_after_a_restore(train):
    engine, _ = engine_for(train)
    before = [followed.hook for followed in engine._probe._followed]
    engine.restore(3)
    return [hook.id in (hook.hooks_dict_ref() or {}) for hook in before]


def test_a_restore_leaves_no_hook_of_the_probe_before():
    assert run_ranks(hooks_after_a_restore, 1, settings()) == [[False]]


def engine_with_wrong_groups():
    unit = zero_settings.DataParallelUnit
    unit.get_data_parallel_group_ranks = lambda self: [devices.rank()]
    with pytest.raises(TitansError, match=r"over ranks \[0, 1\], planned"):
        engine_for(settings())


def test_a_shard_group_other_than_planned_is_found():
    run_ranks(engine_with_wrong_groups, 2)


def miscounted_steps(train):
    engine, _ = engine_for(train)
    with pytest.raises(TitansError, match="0 of 8 micro-batches"):
        engine.step(1e-3)
    for row in range(8):
        engine.backward(engine.forward(batch(0)[0][row : row + 1]).sum())
    with pytest.raises(TitansError, match="more than 8"):
        engine.backward(torch.zeros((), requires_grad=True))


def test_a_step_takes_exactly_its_micro_batches():
    run_ranks(miscounted_steps, 1, settings())


def test_a_setting_deepspeed_would_ignore_is_refused():
    made = zero_settings.deepspeed_settings(settings(), Mesh(data=2), 1000)
    zero_settings.check_settings(made)
    with pytest.raises(TitansError, match="gradient_cliping"):
        zero_settings.check_settings(made | {"gradient_cliping": 1.0})


def engine_without_clipping(train):
    import deepspeed

    initialize = deepspeed.initialize

    def forgetful(*, config, **arguments):
        del config["gradient_clipping"]
        return initialize(config=config, **arguments)

    deepspeed.initialize = forgetful
    with pytest.raises(TitansError, match=r"asked for gradient_clipping = 0\.5 and has 1\.0"):
        engine_for(train)


def test_a_setting_that_deepspeed_did_not_take_is_found():
    run_ranks(engine_without_clipping, 1, settings())


def settings_compared(train):
    """How many settings there are, each of which may not be another than DeepSpeed has."""
    engine, parallel = engine_for(train)
    elements = sum(parameter.ds_numel for parameter in engine._parameters.values())
    made = zero_settings.deepspeed_settings(train, parallel.mesh, elements)
    zero_settings.check_taken(made, engine._engine)
    compared = []

    def differ(inside):
        for key, value in inside.items():
            if isinstance(value, dict):
                differ(value)
                continue
            inside[key] = "another"
            with pytest.raises(TitansError, match=f"asked for {key} = another"):
                zero_settings.check_taken(made, engine._engine)
            inside[key] = value
            compared.append(key)

    differ(made)
    return len(compared)


@pytest.mark.parametrize("changes", [{}, {"precision": "bf16", "offload_optimizer": True}])
def test_every_setting_is_compared_with_what_deepspeed_has(changes):
    assert run_ranks(settings_compared, 1, settings(**changes)) == [24]


def failing_together(failing):
    def action():
        if devices.rank() in failing:
            raise TitansError(f"no file on {devices.rank()}", where="data")
        return devices.rank()

    try:
        return devices.together(action)
    except TitansError as error:
        return type(error).__name__, error.what, error.where


def test_what_fails_on_one_rank_fails_on_all_and_one_rank_tells_it():
    assert run_ranks(failing_together, 2, ()) == [0, 1]
    assert run_ranks(failing_together, 2, (1,)) == [
        ("OtherRankFailed", "no file on 1", "data (rank 1)"),
        ("TitansError", "no file on 1", "data"),
    ]


def test_a_nested_setting_that_mixes_tensor_ranks_is_refused():
    made = zero_settings.deepspeed_settings(settings(), Mesh(data=4), 1000)
    made["zero_optimization"]["zero_hpz_partition_size"] = 2
    with pytest.raises(TitansError, match="zero_hpz_partition_size"):
        zero_settings.check_settings(made)


@pytest.mark.parametrize(
    "name", ["initialize_sequence_parallel", "get_sequence_parallel_group", "get_sequence_data_x"]
)
def test_an_mpu_that_names_sequence_ranks_is_refused(name):
    unit = type("Unit", (zero_settings.DataParallelUnit,), {name: lambda self: None})(None)
    with pytest.raises(TitansError, match=name):
        zero_settings.check_unit(unit)
    zero_settings.check_unit(zero_settings.DataParallelUnit(None))


def engine_that_asks_for_sequence_ranks():
    zero_settings.DataParallelUnit.get_sequence_parallel_group = lambda self: None
    with pytest.raises(TitansError, match="would not sum gradients over sequence ranks"):
        engine_for(settings())


def test_the_engine_looks_at_its_mpu():
    run_ranks(engine_that_asks_for_sequence_ranks, 1)


def train_with_layers_in_another_order(train):
    engine, parallel = engine_for(train)
    if devices.rank() == 1:
        layers = engine._engine.module.model.layers
        layers._modules = dict(reversed(layers._modules.items()))
    engine_step(engine, parallel, train, 0)
    with pytest.raises(TitansError, match="in different orders"):
        engine_step(engine, parallel, train, 1)


def test_ranks_that_walk_the_model_in_different_orders_are_found_on_all_of_them():
    run_ranks(train_with_layers_in_another_order, 2, settings())


def train_without_the_sum_over_sequence_ranks(train):
    engine, parallel = engine_for(train, sequence=2)
    engine._sum_over_sequence = lambda: None
    with pytest.raises(TitansError, match="is not the mean over the data ranks of the sum"):
        engine_step(engine, parallel, train, 0)


def test_a_missing_sum_over_sequence_ranks_is_found_on_all_ranks():
    run_ranks(train_without_the_sum_over_sequence_ranks, 2, settings())


def train_with_one_bit_off(train):
    engine, parallel = engine_for(train, sequence=2)
    reduce = engine._sum_over_sequence

    def almost():
        reduce()
        if devices.rank() == 1:
            engine._gradients.copy_(torch.nextafter(engine._gradients, torch.tensor(9.0)))

    engine._sum_over_sequence = almost
    with pytest.raises(TitansError, match="differs between ranks 0 and 1"):
        engine_step(engine, parallel, train, 0)


def test_sequence_ranks_whose_gradients_differ_in_a_bit_are_found_on_all_ranks():
    run_ranks(train_with_one_bit_off, 2, settings())


def train_without_the_sum_over_tensor_ranks(train):
    tensor_comm.sum_gradient = lambda gradient, group: gradient
    engine, parallel = engine_for(train, tensor=2)
    with pytest.raises(TitansError, match="differs between ranks 0 and 1"):
        engine_step(engine, parallel, train, 0)


def test_a_missing_sum_over_tensor_ranks_is_found_on_all_ranks():
    run_ranks(train_without_the_sum_over_tensor_ranks, 2, settings())


def lose_state_gradients():
    def lost(ctx, *grads):
        zeros = [torch.zeros_like(gradient) for gradient in grads]
        ctx.boundary.links.send("previous", f"{ctx.boundary.name}.state", zeros)
        return None, None, None

    sequence._Enter.backward = staticmethod(lost)


def double_the_gradients():
    scale = passes.rank_loss
    passes.rank_loss = lambda *arguments: 2 * scale(*arguments)


def make_losses_nan():
    train = passes.Passes.train
    passes.Passes.train = lambda *arguments: [loss * math.nan for loss in train(*arguments)]


def check(variant, sizes, changes, sabotage=None):
    if sabotage:
        sabotage()
    config = configuration(variant, sizes, **changes)
    recomputes = config.train.activation_checkpointing
    parallel = Parallel(Mesh(*sizes), devices.rank(), activation_checkpointing=recomputes)
    state = torch.get_rng_state()
    try:
        check_mesh(config, parallel, torch.device("cpu"))
    except TitansError as error:
        return str(error)
    assert torch.equal(torch.get_rng_state(), state)
    assert not parallel.links.bytes_sent
    return ""


@pytest.mark.parametrize(
    ("variant", "sizes", "changes"),
    [
        ("mac", (1, 1, 1), {"precision": "bf16"}),
        ("lmm", (1, 2, 1), {"offload_optimizer": True}),
        ("mal", (1, 1, 2), {"activation_checkpointing": True}),
        ("mac", (2, 1, 1), {"precision": "bf16"}),
        ("mag", (1, 1, 4), {}),
        ("transformer", (2, 1, 2), {}),
    ],
)
def test_a_sound_mesh_passes_the_check_at_the_start(variant, sizes, changes):
    count = sizes[0] * sizes[1] * sizes[2]
    assert run_ranks(check, count, variant, sizes, changes) == [""] * count


def forget_what_lies_beyond_the_span_before():
    look_back = sequence._look_back

    def look_back_a_span(boundary, name, length, dim, tensors):
        before = look_back(boundary, name, length, dim, tensors)
        beyond = max(0, before[0].shape[dim] - tensors[0].shape[dim])
        for tensor in before:
            tensor.narrow(dim, 0, beyond).zero_()
        return before

    sequence._look_back = look_back_a_span


@pytest.mark.parametrize(
    ("variant", "spans", "sabotage"),
    [
        ("lmm", 2, lose_state_gradients),
        ("lmm", 2, double_the_gradients),
        ("lmm", 2, make_losses_nan),
        ("mag", 4, forget_what_lies_beyond_the_span_before),
    ],
)
def test_a_wrong_loss_or_gradient_fails_the_check_on_all_ranks(variant, spans, sabotage):
    found = run_ranks(check, spans, variant, (1, 1, spans), {}, sabotage)
    assert found == [found[0]] * spans
    assert "of a tiny model is" in found[0]
