"""What DeepSpeed would do wrong without a word is found before anything is trained or saved."""

import copy
from types import SimpleNamespace

import pytest
import torch
from ranks import run_ranks
from zero_cases import batch, engine_for, engine_step, fields, same_state, settings

from titans_pretrain.config import MeshSection
from titans_pretrain.errors import TitansError
from titans_pretrain.parallel import devices, sequence, tensor_comm, zero_settings
from titans_pretrain.parallel.mesh import Mesh
from titans_pretrain.parallel.parallelize import Parallel
from titans_pretrain.parallel.self_check import check_mesh


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


def check(variant, sizes, changes, broken=False):
    if broken:

        def lost(ctx, *grads):
            zeros = [torch.zeros_like(gradient) for gradient in grads]
            ctx.boundary.links.send("previous", f"{ctx.boundary.name}.state", zeros)
            return None, None, None

        sequence._Enter.backward = staticmethod(lost)
    train = settings(**changes)
    mesh = Mesh(
        data=devices.ranks() // (sizes.get("tensor", 1) * sizes.get("sequence", 1)), **sizes
    )
    parallel = Parallel(
        mesh, devices.rank(), activation_checkpointing=train.activation_checkpointing
    )
    config = SimpleNamespace(
        model=fields(variant, num_attention_heads=8, segment_length=16),
        train=train,
        mesh=MeshSection(),
    )
    state = torch.get_rng_state()
    try:
        check_mesh(config, parallel, torch.device("cpu"))
    except TitansError as error:
        return str(error)
    assert torch.equal(torch.get_rng_state(), state)
    assert not parallel.links.bytes_sent
    return ""


@pytest.mark.parametrize(
    ("count", "variant", "sizes", "changes"),
    [
        (1, "mac", {}, {"precision": "bf16"}),
        (2, "lmm", {}, {"offload_optimizer": True}),
        (2, "mal", {"sequence": 2}, {"activation_checkpointing": True}),
        (2, "mac", {"tensor": 2}, {"precision": "bf16"}),
        (4, "mag", {"sequence": 4}, {}),
        (4, "transformer", {"tensor": 2, "sequence": 2}, {}),
    ],
)
def test_a_sound_mesh_passes_the_check_at_the_start(count, variant, sizes, changes):
    assert run_ranks(check, count, variant, sizes, changes) == [""] * count


def test_a_gradient_lost_on_its_way_to_the_span_before_fails_the_check_on_all_ranks():
    found = run_ranks(check, 2, "lmm", {"sequence": 2}, {}, True)
    assert found[0] == found[1]
    assert "of a tiny model is" in found[0]
