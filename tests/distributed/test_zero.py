"""ZeRO-3 on gloo ranks against one process of plain PyTorch, on tiny models."""

import copy

import pytest
import torch
from ranks import run_ranks

from titans_pretrain.config import MeshSection, TrainSection
from titans_pretrain.errors import TitansError
from titans_pretrain.model.configuration_titans import TitansConfig
from titans_pretrain.model.modeling_titans import TitansForCausalLM
from titans_pretrain.parallel import devices, mesh, zero
from titans_pretrain.train import loss, optimizer, schedule

STEPS, BATCH, LENGTH, VOCABULARY = 20, 8, 12, 48


def settings(**changes):
    values = {
        "steps": STEPS,
        "global_batch_size": BATCH,
        "micro_batch_size": 1,
        "learning_rate": 3e-3,
        "warmup_steps": 4,
        "gradient_clip": 0.5,
        "precision": "fp32",
    }
    return TrainSection(**(values | changes))


def build_model(tied=True, variant="mac"):
    torch.manual_seed(0)
    return TitansForCausalLM(
        TitansConfig(
            variant=variant,
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            chunk_size=4,
            segment_length=8,
            window_size=5,
            num_persistent_tokens=2,
            tie_word_embeddings=tied,
        )
    )


def batch(step):
    """Tokens (BATCH, LENGTH + 1) and a mask that counts few targets of some rows."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(VOCABULARY, (BATCH, LENGTH + 1), generator=generator)
    lengths = torch.randint(1, LENGTH + 1, (BATCH, 1), generator=generator)
    return tokens, torch.arange(LENGTH) < lengths


def plain_losses(train, **form):
    model = build_model(**form)
    adam = optimizer.build(model, train)
    losses, norms = [], []
    for step in range(train.steps):
        tokens, mask = batch(step)
        logits = model(input_ids=tokens[:, :-1]).logits
        value = loss.token_loss_sum(logits, tokens[:, 1:], mask) / mask.sum()
        adam.zero_grad()
        value.backward()
        bound = train.gradient_clip or float("inf")
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), bound)))
        for group in adam.param_groups:
            group["lr"] = schedule.learning_rate(step, train)
        adam.step()
        losses.append(value.item())
    return losses, norms


def engine_for(train, form=None):
    grid = mesh.plan(devices.ranks(), MeshSection(), train)
    model = build_model(**(form or {}))
    adam = optimizer.build(model, train)
    return zero.ZeroEngine(model, adam, train, grid, torch.device("cpu")), grid


def engine_step(engine, grid, train, step):
    tokens, mask = batch(step)
    rows = BATCH // grid.data
    first = devices.rank() * rows
    valid, total = int(mask.sum()), torch.zeros((), dtype=torch.float64)
    for row in range(first, first + rows, train.micro_batch_size):
        micro = slice(row, row + train.micro_batch_size)
        logits = engine.forward(tokens[micro, :-1])
        summed = loss.token_loss_sum(logits, tokens[micro, 1:], mask[micro])
        engine.backward(loss.rank_loss(summed, valid, grid.data))
        total += summed.item()
    norm = engine.step(schedule.learning_rate(step, train))
    return devices.all_sum(total).item() / valid, norm


def sharded_losses(train, form=None):
    engine, grid = engine_for(train, form)
    return [engine_step(engine, grid, train, step) for step in range(train.steps)]


@pytest.mark.parametrize(
    ("count", "variant"),
    [
        *((2, variant) for variant in ("lmm", "mac", "mag", "mal", "transformer")),
        (1, "mac"),
        (4, "lmm"),
        (4, "mac"),
    ],
)
def test_any_number_of_ranks_trains_like_one_process_with_accumulation_clipping_and_masks(
    count, variant
):
    train = settings()
    losses, norms = plain_losses(train, variant=variant)
    for found in run_ranks(sharded_losses, count, train, {"variant": variant}):
        assert [pair[0] for pair in found] == pytest.approx(losses, abs=1e-6)
        assert [pair[1] for pair in found] == pytest.approx(norms, abs=1e-4)
    assert max(norms) > train.gradient_clip


def test_untied_embeddings_and_activation_checkpointing_train_like_one_process():
    train = settings(steps=6, micro_batch_size=2, activation_checkpointing=True, gradient_clip=0.0)
    losses, norms = plain_losses(train, tied=False)
    for found in run_ranks(sharded_losses, 2, train, {"tied": False}):
        assert [pair[0] for pair in found] == pytest.approx(losses, abs=1e-6)
        assert [pair[1] for pair in found] == pytest.approx(norms, abs=1e-5)


def test_bf16_keeps_a_float32_master_and_follows_the_float32_run():
    losses, _ = plain_losses(settings(steps=8))
    for found in run_ranks(sharded_losses, 2, settings(steps=8, precision="bf16")):
        assert [pair[0] for pair in found] == pytest.approx(losses, abs=2e-2)


def resumed(train, half):
    """State and losses of a run never stopped, and of one restored from its state at ``half``."""
    engine, grid = engine_for(train)
    for step in range(half):
        engine_step(engine, grid, train, step)
    saved = copy.deepcopy(engine.shards())
    straight = [engine_step(engine, grid, train, step) for step in range(half, train.steps)]
    straight_state = copy.deepcopy(engine.shards())
    engine, grid = engine_for(train)
    for live, stored in zip(engine.shards(), saved, strict=True):
        live.tensor.copy_(stored.tensor)
    engine.restore(half)
    again = [engine_step(engine, grid, train, step) for step in range(half, train.steps)]
    same = all(
        torch.equal(one.tensor, other.tensor)
        for one, other in zip(engine.shards(), straight_state, strict=True)
    )
    return straight, again, same


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_restored_engine_goes_on_bit_for_bit(precision):
    for straight, again, same in run_ranks(resumed, 2, settings(steps=8, precision=precision), 5):
        assert straight == again
        assert same


def shard_ranges():
    engine, _ = engine_for(settings())
    named = dict(build_model().named_parameters())
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
    named = dict(build_model().named_parameters())
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


def train_with_gradients_scaled_by_two(train):
    engine, grid = engine_for(train)
    reduce = engine._zero.partition_grads
    engine._zero.partition_grads = lambda parameters, parts: reduce(
        parameters, [part * 2 for part in parts]
    )
    before = copy.deepcopy(engine.shards())
    with pytest.raises(TitansError, match="not the mean over the data ranks"):
        engine_step(engine, grid, train, 0)
    return all(
        torch.equal(one.tensor, other.tensor)
        for one, other in zip(before, engine.shards(), strict=True)
    )


def test_a_wrong_gradient_scale_is_found_before_anything_changes():
    assert run_ranks(train_with_gradients_scaled_by_two, 2, settings()) == [True, True]


def train_with_a_step_that_does_nothing(train):
    engine, grid = engine_for(train)
    engine._zero._optimizer_step = lambda group: None
    with pytest.raises(TitansError, match="did not change"):
        engine_step(engine, grid, train, 0)


def test_a_step_without_effect_is_found():
    run_ranks(train_with_a_step_that_does_nothing, 2, settings())


def train_at_a_rate_below_the_spacing_of_the_weights(train):
    engine, grid = engine_for(train)
    engine_step(engine, grid, train, 0)


def test_a_rate_too_small_to_see_is_no_fault():
    train = settings(learning_rate=1e-9)
    run_ranks(train_at_a_rate_below_the_spacing_of_the_weights, 2, train)


def hooks_after_a_restore(train):
    engine, _ = engine_for(train)
    before = engine._probe._hook
    engine.restore(3)
    return before.id in (before.hooks_dict_ref() or {})


def test_a_restore_leaves_no_hook_of_the_probe_before():
    assert run_ranks(hooks_after_a_restore, 1, settings()) == [False]


def train_on_one_infinite_gradient(train):
    engine, grid = engine_for(train)
    engine_step(engine, grid, train, 0)
    before = copy.deepcopy(engine.shards())
    for row in range(4):
        summed = engine.forward(batch(1)[0][row : row + 1]).sum()
        engine.backward(summed * (float("inf") if devices.rank() == 1 else 1.0))
    norm = engine.step(1e-3)
    return norm, all(
        torch.equal(one.tensor, other.tensor)
        for one, other in zip(before, engine.shards(), strict=True)
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_gradient_that_is_not_finite_shows_on_all_ranks_and_changes_nothing(precision):
    found = run_ranks(train_on_one_infinite_gradient, 2, settings(precision=precision))
    assert found == [(float("inf"), True)] * 2


def engine_with_wrong_groups():
    unit = zero.DataParallelUnit
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
    made = zero.deepspeed_settings(settings(), mesh.Mesh(data=2), 1000)
    zero.check_settings(made)
    with pytest.raises(TitansError, match="gradient_cliping"):
        zero.check_settings(made | {"gradient_cliping": 1.0})


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
