"""What the memory computes: the fast path is the equations, whatever the chunk, gates and split."""

import gc
import itertools

import pytest
import torch
import torch.nn.functional as F
from memory_cases import (
    Case,
    Scan,
    assert_near,
    flat,
    gradients,
    map_state,
    random_case,
    random_scalar,
)
from torch import Tensor

from titans_pretrain.model import memory
from titans_pretrain.model.memory import MemoryState, memory_scan
from titans_pretrain.model.memory_blocks import _curve
from titans_pretrain.model.memory_chunk import norm
from titans_pretrain.model.memory_reference import memory_scan as reference_scan

BOTH = pytest.mark.parametrize("scan", [memory_scan, reference_scan], ids=["fast", "reference"])
ACTIVATIONS = {"gelu": F.gelu, "silu": F.silu}


def assert_equals_reference(case: Case, relative: float = 1e-10, **options: object) -> None:
    """Outputs, final state and all gradients are those of the token-by-token equations."""
    case = case.leaves()
    found, wanted = case.run(memory_scan, **options), case.run(reference_scan, **options)
    assert_near(flat(found), flat(wanted), relative)
    assert_near(gradients(case, found), gradients(case, wanted), relative)


@pytest.mark.parametrize("activation", ["gelu", "silu"])
@pytest.mark.parametrize("clip", [None, 1.0, 0.1])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_every_form_of_memory_equals_the_reference(
    depth: int, residual: bool, clip: float | None, activation: str
) -> None:
    case = random_case(seed=depth, depth=depth, time=19)
    options = {"residual": residual, "surprise_clip": clip, "activation": activation}
    assert_equals_reference(case, chunk_size=7, **options)


@pytest.mark.parametrize("chunk_size", [1, 2, 7, 16, 36, 37, 38, 1000])
@pytest.mark.parametrize("depth", [1, 3])
def test_every_chunk_size_equals_the_reference(depth: int, chunk_size: int) -> None:
    case = random_case(seed=chunk_size, depth=depth, time=37)
    assert_equals_reference(case, chunk_size=chunk_size, surprise_clip=1.0)


@pytest.mark.parametrize("time", [1, 2, 6, 7, 8, 13, 14, 15])
def test_every_length_around_a_chunk_boundary_equals_the_reference(time: int) -> None:
    assert_equals_reference(random_case(seed=time, time=time), chunk_size=7, surprise_clip=1.0)


@pytest.mark.parametrize(("time", "chunk_size"), [(130, 130), (131, 128), (200, 1024), (530, 600)])
def test_a_long_chunk_equals_the_reference(time: int, chunk_size: int) -> None:
    case = random_case(batch=1, heads=1, time=time, max_step=0.05)
    case = case.but(forget=0.05 * case.forget, momentum=0.9 + 0.1 * case.momentum)
    assert_equals_reference(case, relative=1e-9, chunk_size=chunk_size, surprise_clip=1.0)


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("value", [0.0, 1.0])
@pytest.mark.parametrize("gate", ["forget", "momentum"])
def test_a_gate_at_either_end_equals_the_reference(
    gate: str, value: float, clip: float | None
) -> None:
    case = random_case(time=19, max_step=0.05)
    case = case.but(**{gate: torch.full_like(getattr(case, gate), value)})
    assert_equals_reference(case, chunk_size=7, surprise_clip=clip)


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("chunk_size", [1, 7, 64, 600])
def test_gates_that_jump_between_their_ends_equal_the_reference(
    chunk_size: int, clip: float | None
) -> None:
    """Logarithms and quotients of cumulative products would be infinite or undefined here."""
    case = random_case(seed=3, time=40, max_step=0.05)
    ends = {name: getattr(case, name).round() for name in ("forget", "momentum")}
    case = case.but(**ends, step=case.step * (case.step > 0.02))
    assert_equals_reference(case, chunk_size=chunk_size, surprise_clip=clip)


@pytest.mark.parametrize("clip", [None, 1.0])
def test_no_step_equals_the_reference(clip: float | None) -> None:
    case = random_case(time=19)
    case = case.but(step=torch.zeros_like(case.step))
    assert_equals_reference(case, chunk_size=7, surprise_clip=clip)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_zero_surprise_under_the_clamp_has_the_reference_s_finite_gradients(depth: int) -> None:
    """Zero last-layer weights make M the identity, so keys as values surprise nothing."""
    case = random_case(time=9, depth=depth)
    weights = (*case.state.weights[:-1], torch.zeros_like(case.state.weights[-1]))
    still = MemoryState(weights, tuple(torch.zeros_like(s) for s in case.state.momentum))
    case = case.but(values=case.keys, state=still).leaves()
    found = case.run(memory_scan, chunk_size=4, surprise_clip=1.0)
    assert torch.equal(found[1].weights[-1], torch.zeros_like(weights[-1]))
    assert all(g.isfinite().all() for g in gradients(case, found).values())
    assert_equals_reference(case, chunk_size=4, surprise_clip=1.0)


def test_zero_keys_and_queries_have_the_reference_s_finite_gradients() -> None:
    case = random_case(time=9, depth=2)
    zero = torch.zeros_like(case.keys)
    assert_equals_reference(case.but(keys=zero, queries=zero), chunk_size=4, surprise_clip=1.0)


@BOTH
def test_gradients_are_those_of_finite_differences(scan: Scan) -> None:
    case = random_case(batch=1, heads=1, time=5, dim=2, expansion=2).leaves()

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        state = MemoryState(tensors[6:8], tensors[8:10])
        result = scan(*tensors[:6], state, chunk_size=2, surprise_clip=1.0)
        return tuple(flat(result).values())

    assert torch.autograd.gradcheck(run, tuple(case.tensors().values()))


@pytest.mark.parametrize("chunk_size", [1, 3, 4])
def test_any_split_at_chunk_boundaries_changes_nothing(chunk_size: int) -> None:
    """State and gradients cross the boundary of two calls as they cross that of two chunks."""
    case = random_case(batch=1, time=14, depth=2).leaves()
    options = {"chunk_size": chunk_size, "surprise_clip": 1.0}
    whole = case.run(memory_scan, **options)
    wanted = gradients(case, whole)
    for boundary in range(chunk_size, 14, chunk_size):
        left, state = case.between(0, boundary, case.state).run(memory_scan, **options)
        right, state = case.between(boundary, 14, state).run(memory_scan, **options)
        split = (torch.cat([left, right], dim=2), state)
        assert_near(flat(split), flat(whole), 1e-12)
        assert_near(gradients(case, split), wanted, 1e-11)


def test_one_call_per_chunk_changes_nothing() -> None:
    case = random_case(time=18, depth=3).leaves()
    options = {"chunk_size": 4, "surprise_clip": 1.0}
    pieces, state = [], case.state
    for first in range(0, 18, 4):
        piece, state = case.between(first, min(first + 4, 18), state).run(memory_scan, **options)
        pieces.append(piece)
    whole, split = case.run(memory_scan, **options), (torch.cat(pieces, dim=2), state)
    assert_near(flat(split), flat(whole), 1e-12)
    assert_near(gradients(case, split), gradients(case, whole), 1e-11)


@BOTH
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("activation", ["gelu", "silu"])
@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_the_write_of_one_token_is_autograd_s_gradient(
    scan: Scan, depth: int, activation: str, residual: bool
) -> None:
    """With theta = 1 and nothing else, W falls by the gradient of ||M(k) - v||^2."""
    case = random_case(time=1, depth=depth)
    gates = {"forget": torch.zeros(2, 2, 1), "momentum": torch.zeros(2, 2, 1)}
    case = case.but(**gates, step=torch.ones(2, 2, 1).double())
    _, state = case.run(scan, chunk_size=1, activation=activation, residual=residual)
    for row, head in [(0, 0), (0, 1), (1, 0), (1, 1)]:
        weights = [w[row, head].clone().requires_grad_() for w in case.state.weights]
        key = hidden = case.keys[row, head, 0]
        for layer, weight in enumerate(weights):
            hidden = weight @ (ACTIVATIONS[activation](hidden) if layer else hidden)
        error = hidden + (key if residual else 0) - case.values[row, head, 0]
        wanted = torch.autograd.grad((error**2).sum(), weights)
        for before, after, gradient in zip(case.state.weights, state.weights, wanted, strict=True):
            written = (before - after)[row, head]
            torch.testing.assert_close(written, gradient, rtol=1e-11, atol=1e-12)


@BOTH
@pytest.mark.parametrize("depth", [1, 2])
def test_chunks_of_one_token_are_torch_s_sgd_with_momentum(scan: Scan, depth: int) -> None:
    case = random_case(batch=1, heads=1, time=12, depth=depth)
    ones = torch.ones_like(case.forget)
    still = MemoryState(case.state.weights, tuple(torch.zeros_like(s) for s in case.state.momentum))
    case = case.but(forget=0 * ones, momentum=0.7 * ones, step=0.05 * ones, state=still)
    outputs, state = case.run(scan, chunk_size=1)

    weights = [torch.nn.Parameter(w[0, 0].clone()) for w in case.state.weights]
    optimizer = torch.optim.SGD(weights, lr=0.05, momentum=0.7)

    def memory(x: Tensor) -> Tensor:
        hidden = x
        for layer, weight in enumerate(weights):
            hidden = weight @ (F.gelu(hidden) if layer else hidden)
        return x + hidden

    for t in range(12):
        optimizer.zero_grad()
        (memory(case.keys[0, 0, t]) - case.values[0, 0, t]).square().sum().backward()
        optimizer.step()
        torch.testing.assert_close(outputs[0, 0, t], memory(case.queries[0, 0, t]))
    for found, wanted in zip(state.weights, weights, strict=True):
        torch.testing.assert_close(found[0, 0], wanted.detach())


@BOTH
def test_a_chunk_takes_its_surprise_at_its_first_weights(scan: Scan) -> None:
    """In one chunk the writes of two tokens add; in two chunks the second sees the first."""
    case = random_case(time=2)
    ones = torch.ones_like(case.forget)
    case = case.but(forget=0 * ones, momentum=0 * ones, step=0.1 * ones)
    alone = [
        case.between(t, t + 1, case.state).run(scan, chunk_size=1)[1].weights for t in range(2)
    ]
    one = case.run(scan, chunk_size=2)[1].weights
    two = case.run(scan, chunk_size=1)[1].weights
    for start, a, b, together, apart in zip(case.state.weights, *alone, one, two, strict=True):
        torch.testing.assert_close(together, a + b - start)
        assert not torch.allclose(apart, a + b - start)


@BOTH
def test_alpha_one_erases_all_before_the_write(scan: Scan) -> None:
    case = random_case(time=5)
    case = case.but(forget=torch.ones_like(case.forget))
    _, state = case.run(scan, chunk_size=3)
    for weight, past in zip(state.weights, state.momentum, strict=True):
        torch.testing.assert_close(weight, past)


@BOTH
def test_eta_zero_forgets_past_surprise(scan: Scan) -> None:
    case = random_case(time=5)
    case = case.but(momentum=torch.zeros_like(case.momentum))
    loud = MemoryState(case.state.weights, tuple(100 * s for s in case.state.momentum))
    assert_near(
        flat(case.but(state=loud).run(scan, chunk_size=3)), flat(case.run(scan, chunk_size=3)), 0
    )


@BOTH
def test_theta_zero_writes_nothing_new(scan: Scan) -> None:
    """Without a step neither keys nor values matter; with still momentum the weights rest."""
    case = random_case(time=5)
    case = case.but(step=torch.zeros_like(case.step))
    other = case.but(keys=2 * case.keys, values=-case.values)
    assert_near(flat(other.run(scan, chunk_size=3)), flat(case.run(scan, chunk_size=3)), 0)
    still = MemoryState(case.state.weights, tuple(torch.zeros_like(s) for s in case.state.momentum))
    case = case.but(forget=torch.zeros_like(case.forget), state=still)
    for before, after in zip(
        case.state.weights, case.run(scan, chunk_size=3)[1].weights, strict=True
    ):
        torch.testing.assert_close(after, before, rtol=0, atol=0)


@BOTH
def test_a_token_reads_its_own_write_and_none_after_it(scan: Scan) -> None:
    case = random_case(time=11)
    values = case.values.clone()
    values[:, :, 5] += 1
    before, after = (c.run(scan, chunk_size=4)[0] for c in (case, case.but(values=values)))
    moved = (before != after).any(dim=-1)
    assert not moved[:, :, :5].any()
    assert moved[:, :, 5:].all()


@BOTH
def test_batch_rows_and_heads_are_independent(scan: Scan) -> None:
    case = random_case(time=9).leaves()
    outputs, state = case.run(scan, chunk_size=4, surprise_clip=1.0)
    only = outputs[0, 1].sum() + sum(w[0, 1].sum() for w in state.weights)
    for name, gradient in zip(
        case.tensors(), torch.autograd.grad(only, list(case.tensors().values())), strict=True
    ):
        others = gradient.clone()
        others[0, 1] = 0
        assert not others.any(), name
        assert gradient[0, 1].any(), name


def test_expanded_views_as_state_share_their_gradient() -> None:
    case = random_case(batch=3, time=9)
    base = map_state(lambda x: x[:1].clone().requires_grad_(), case.state)
    spread = map_state(lambda x: x.expand(3, -1, -1, -1), base)
    results = [case.but(state=spread).run(s, chunk_size=4) for s in (memory_scan, reference_scan)]
    leaves = [*base.weights, *base.momentum]
    found, wanted = (
        dict(enumerate(torch.autograd.grad(random_scalar(result), leaves))) for result in results
    )
    assert_near(
        {str(n): g for n, g in found.items()}, {str(n): g for n, g in wanted.items()}, 1e-10
    )


def test_strided_views_as_inputs_change_nothing() -> None:
    """Heads usually arrive as transposed (batch, time, heads, head_dim)."""
    case = random_case(time=9)
    strided = Case(
        **{
            name: x.transpose(1, 2).contiguous().transpose(1, 2)
            for name, x in case.sequence().items()
        },
        state=map_state(lambda x: x.mT.contiguous().mT, case.state),
    )
    assert not strided.keys.is_contiguous()
    assert_equals_reference(strided, chunk_size=4, surprise_clip=1.0)
    options = {"chunk_size": 4, "surprise_clip": 1.0}
    assert_near(
        flat(strided.run(memory_scan, **options)), flat(case.run(memory_scan, **options)), 1e-13
    )


def test_no_input_is_changed_in_place() -> None:
    case = random_case(time=9)
    before = {name: x.clone() for name, x in case.tensors().items()}
    case.run(memory_scan, chunk_size=4, surprise_clip=1.0)
    for name, x in case.tensors().items():
        assert torch.equal(x, before[name]), name


@BOTH
def test_two_calls_give_the_same_bits_with_and_without_gradients(scan: Scan) -> None:
    case = random_case(time=23, dtype=torch.float32).leaves()
    options = {"chunk_size": 4, "surprise_clip": 1.0}
    first = case.run(scan, **options)
    second = case.run(scan, **options)
    with torch.no_grad():
        third = case.run(scan, **options)
    assert_near(flat(second), flat(first), 0)
    assert_near(flat(third), flat(first), 0)
    assert not any(x.requires_grad for x in flat(third).values())


NAMES = ("queries", "keys", "values", "forget", "momentum", "step", "weights[0]", "momentum[1]")


@pytest.mark.parametrize("name", NAMES)
def test_a_gradient_wanted_of_one_input_alone_is_the_reference_s(name: str) -> None:
    found = []
    for scan in (memory_scan, reference_scan):
        case = random_case(time=9).map(lambda x: x.clone())
        leaf = case.tensors()[name].requires_grad_()
        result = case.run(scan, chunk_size=4, surprise_clip=1.0)
        found.append({name: torch.autograd.grad(random_scalar(result), leaf)[0]})
    assert_near(found[0], found[1], 1e-10)


@pytest.mark.parametrize("part", ["outputs", "final weights[0]", "final momentum[1]"])
def test_a_loss_on_one_result_alone_has_the_reference_s_gradients(part: str) -> None:
    found = []
    for scan in (memory_scan, reference_scan):
        case = random_case(time=9).leaves()
        loss = flat(case.run(scan, chunk_size=4, surprise_clip=1.0))[part].square().sum()
        inputs = case.tensors()
        grads = torch.autograd.grad(loss, list(inputs.values()), materialize_grads=True)
        found.append(dict(zip(inputs, grads, strict=True)))
    assert_near(found[0], found[1], 1e-10)


def test_float32_is_close_to_float64() -> None:
    case = random_case(time=130, max_step=0.1)
    small = case.map(lambda x: x.float())
    options = {"chunk_size": 64, "surprise_clip": 1.0}
    found, wanted = small.run(memory_scan, **options), case.run(reference_scan, **options)
    assert {x.dtype for x in flat(found).values()} == {torch.float32}
    assert_near(flat(found), flat(wanted), 1e-4)


@BOTH
def test_bfloat16_inputs_keep_a_float32_state_and_stay_close(scan: Scan) -> None:
    case = random_case(time=40, dtype=torch.float32)
    sequence = {name: x.bfloat16() for name, x in case.sequence().items()}
    low, same = (
        Case(**sequence, state=case.state),
        case.but(**{n: x.float() for n, x in sequence.items()}),
    )
    options = {"chunk_size": 8, "surprise_clip": 1.0}
    outputs, state = low.run(scan, **options)
    assert outputs.dtype == torch.bfloat16
    assert {x.dtype for x in (*state.weights, *state.momentum)} == {torch.float32}
    assert_near(flat((outputs, state)), flat(same.run(reference_scan, **options)), 2e-2)


def test_bfloat16_inputs_have_gradients_close_to_float32_s() -> None:
    case = random_case(time=24, dtype=torch.float32)
    sequence = {name: x.bfloat16() for name, x in case.sequence().items()}
    low = Case(**sequence, state=case.state).leaves()
    same = case.but(**{name: x.float() for name, x in sequence.items()}).leaves()
    options = {"chunk_size": 8, "surprise_clip": 1.0}
    found = gradients(low, low.run(memory_scan, **options))
    assert found["gradient of keys"].dtype == torch.bfloat16
    assert_near(found, gradients(same, same.run(reference_scan, **options)), 4e-2)


def kept_bytes(scan: Scan, time: int) -> int:
    """Bytes that a forward pass with gradients leaves alive for the backward."""
    case = random_case(
        batch=1, heads=1, time=time, dim=8, expansion=4, dtype=torch.float32
    ).leaves()
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        alive.append(x)
        return x

    alive: list[Tensor] = []
    gc.collect()
    before = {id(x) for x in gc.get_objects() if isinstance(x, Tensor)}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        result = case.run(scan, chunk_size=64, surprise_clip=1.0)
    for x in gc.get_objects():
        if isinstance(x, Tensor) and id(x) not in before:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
    assert result[0].requires_grad
    return sum(kept.values())


def test_backward_keeps_only_the_inputs_and_a_state_per_stretch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nothing of a chunk's inside survives the forward pass, so long sequences stay cheap."""
    inputs_and_outputs = 64 * (4 * 8 + 3) * 4
    state = 2 * 2 * 8 * 32 * 4

    def growth() -> float:
        return (kept_bytes(memory_scan, 1024) - kept_bytes(memory_scan, 512)) / 8

    assert growth() <= 1.1 * (inputs_and_outputs + state * 64 / memory.STRETCH)
    one_chunk_of_the_reference = kept_bytes(reference_scan, 64)
    assert one_chunk_of_the_reference > 10 * (inputs_and_outputs + state)
    monkeypatch.setattr(memory, "STRETCH", 64)
    assert growth() > inputs_and_outputs + 0.9 * state


@pytest.mark.parametrize("chunk_size", [1, 3, 4])
@pytest.mark.parametrize("depth", [1, 3])
def test_stretches_in_a_row_equal_the_reference(
    depth: int, chunk_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "STRETCH", 8)
    case = random_case(seed=depth, depth=depth, time=37)
    assert_equals_reference(case, chunk_size=chunk_size, surprise_clip=1.0)


@pytest.mark.parametrize("widths", [[4, 6, 10, 5, 4], [4, 3, 2, 4], [4, 4, 4]])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_layers_of_any_widths_equal_the_reference(widths: list[int], clip: float | None) -> None:
    case = random_case(time=19)
    generator = torch.Generator().manual_seed(7)
    shapes = [(2, 2, out, width) for width, out in itertools.pairwise(widths)]
    state = MemoryState(
        *(
            tuple(scale * torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
            for scale in (0.5, 0.1)
        )
    )
    assert_equals_reference(case.but(state=state), chunk_size=7, surprise_clip=clip)


def test_arguments_may_be_named() -> None:
    case = random_case(time=5)
    options = {"chunk_size": 2, "state": case.state}
    found = memory_scan(**case.sequence(), **options)
    assert_near(flat(found), flat(case.run(memory_scan, chunk_size=2)), 0)


@pytest.mark.parametrize("activation", ["gelu", "silu"])
def test_an_activation_is_straight_far_out(activation: str) -> None:
    far = torch.tensor([-1e30, -2e19, 2e19, 1e30])
    assert torch.equal(_curve(far, activation), torch.zeros(4))


def test_a_second_derivative_is_refused_not_wrong() -> None:
    """Chunks are recomputed on detached tensors, so a second derivative would miss terms."""
    case = random_case(time=9).leaves()
    outputs, _ = case.run(memory_scan, chunk_size=4, surprise_clip=1.0)
    loss = outputs.sum() + case.keys.square().sum()

    def twice() -> Tensor:
        first = torch.autograd.grad(loss, case.keys, create_graph=True)[0]
        return torch.autograd.grad(first.sum(), case.keys)[0]

    with pytest.raises(RuntimeError):
        twice()


def test_no_token_leaves_the_state_as_it_is() -> None:
    case = random_case(time=3).leaves()
    outputs, state = case.between(0, 0, case.state).run(memory_scan, chunk_size=4)
    assert outputs.shape == (2, 2, 0, 4)
    for before, after in zip(case.state.weights, state.weights, strict=True):
        assert torch.equal(before, after)
        gradient = torch.autograd.grad(after.sum(), before, retain_graph=True)[0]
        assert torch.equal(gradient, torch.ones_like(before))


@pytest.mark.parametrize(
    ("changes", "options", "named"),
    [
        ({}, {"chunk_size": 0}, "chunk_size 0"),
        ({}, {"activation": "relu"}, "'relu'"),
        ({"keys": torch.zeros(2, 2, 9, 3)}, {}, "keys"),
        ({"values": torch.zeros(2, 1, 9, 4)}, {}, "values"),
        ({"step": torch.zeros(2, 2, 9, 1)}, {}, "step"),
        ({"momentum": torch.zeros(2, 2, 8)}, {}, "momentum"),
        ({"state": MemoryState((), ())}, {}, "layer"),
        ({"state": MemoryState((torch.zeros(2, 2, 4, 4),), ())}, {}, "equal number"),
        ({"state": MemoryState(*[(torch.zeros(2, 2, 5, 4),)] * 2)}, {}, "width 5"),
        ({"state": MemoryState(*[(torch.zeros(1, 2, 4, 4),)] * 2)}, {}, "batch and heads"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_by_name(
    changes: dict, options: dict, named: str
) -> None:
    case = random_case(time=9).but(**changes)
    with pytest.raises(ValueError, match=named):
        case.run(memory_scan, **{"chunk_size": 4} | options)


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6, 1e25])
def test_a_norm_does_not_overflow_and_has_no_gradient_at_zero(size: float) -> None:
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0]]) * size
    x.requires_grad_()
    found = norm(x)
    torch.testing.assert_close(found.detach() / size, torch.tensor([[5.0], [0.0]]))
    (gradient,) = torch.autograd.grad(found.sum(), x)
    torch.testing.assert_close(gradient, torch.tensor([[0.6, 0.8], [0.0, 0.0]]))
