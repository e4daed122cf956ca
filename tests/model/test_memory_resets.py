"""Documents that begin inside a scan: the memory is what it was before a sequence's first token."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from document_cases import begins_of
from hypothesis import given, settings
from hypothesis import strategies as st
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
from titans_pretrain.model.memory import MemoryState, Resets, memory_scan
from titans_pretrain.model.memory_reference import memory_scan as reference_scan


def begun_state(case: Case) -> MemoryState:
    """A state of the case's shapes that has nothing to do with its own."""
    generator = torch.Generator().manual_seed(5)
    return map_state(
        lambda x: torch.randn(x.shape, generator=generator, dtype=x.dtype) / 3, case.state
    )


def pulled(result: tuple[Tensor, MemoryState], state: MemoryState) -> dict[str, Tensor]:
    """Gradients by what documents begin with; zero where none begins."""
    leaves = [*state.weights, *state.momentum]
    found = torch.autograd.grad(
        random_scalar(result), leaves, retain_graph=True, materialize_grads=True
    )
    return {f"gradient of begun {n}": gradient for n, gradient in enumerate(found)}


def assert_equals_reference(
    case: Case, begins: Tensor, relative: float = 1e-10, **options: Any
) -> None:
    """Reads, last state and all gradients, those of what documents begin with too."""
    case = case.leaves()
    begun = map_state(lambda x: x.requires_grad_(), begun_state(case))
    found, wanted = (
        case.run(scan, resets=Resets(begins, begun), **options)
        for scan in (memory_scan, reference_scan)
    )
    assert_near(flat(found), flat(wanted), relative)
    assert_near(pulled(found, begun), pulled(wanted, begun), relative)
    right = gradients(case, wanted, materialize=True)
    assert_near(gradients(case, found, materialize=True), right, relative)


@st.composite
def packed(draw: st.DrawFn) -> tuple[Tensor, dict[str, Any], int]:
    """First tokens (2, time) of documents, options of a scan, and the depth of the memory."""
    time = draw(st.integers(1, 20))
    row = st.lists(st.booleans(), min_size=time, max_size=time)
    options = {
        "chunk_size": draw(st.integers(1, time + 2)),
        "surprise_clip": draw(st.sampled_from([None, 1.0])),
        "activation": draw(st.sampled_from(["gelu", "silu"])),
        "residual": draw(st.booleans()),
    }
    return torch.tensor([draw(row), draw(row)]), options, draw(st.integers(1, 3))


@settings(max_examples=50, deadline=None, derandomize=True)
@given(packed())
def test_documents_anywhere_equal_the_reference(drawn: tuple[Tensor, dict[str, Any], int]) -> None:
    begins, options, depth = drawn
    case = random_case(seed=depth, time=begins.shape[1], depth=depth, max_step=0.1)
    assert_equals_reference(case, begins, **options)


@pytest.mark.parametrize("rows", [([40], [1, 63, 64, 65, 128]), ([], [127, 129])])
def test_documents_in_a_long_chunk_equal_the_reference(rows: Sequence[Sequence[int]]) -> None:
    case = random_case(heads=1, time=150, max_step=0.05)
    case = case.but(forget=0.05 * case.forget, momentum=0.9 + 0.1 * case.momentum)
    assert_equals_reference(case, begins_of(rows, 150), 1e-9, chunk_size=140, surprise_clip=1.0)


@pytest.mark.parametrize("chunk_size", [1, 3, 4])
def test_documents_between_stretches_equal_the_reference(
    chunk_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "STRETCH", 8)
    begins = begins_of([[5, 20, 21], []], 37)
    assert_equals_reference(random_case(time=37), begins, chunk_size=chunk_size, surprise_clip=1.0)


@pytest.mark.parametrize("value", [0.0, 1.0])
@pytest.mark.parametrize("gate", ["forget", "momentum"])
def test_a_gate_at_either_end_equals_the_reference(gate: str, value: float) -> None:
    case = random_case(time=13, max_step=0.05)
    case = case.but(**{gate: torch.full_like(getattr(case, gate), value)})
    begins = begins_of([[3, 4, 9], [7]], 13)
    assert_equals_reference(case, begins, chunk_size=6, surprise_clip=1.0)


@pytest.mark.parametrize("scan", [memory_scan, reference_scan], ids=["fast", "reference"])
def test_a_document_is_a_new_scan_up_to_the_end_of_the_chunk_on_the_grid(scan: Scan) -> None:
    case = random_case(batch=1, time=17)
    begun = begun_state(case)
    found = case.run(scan, chunk_size=5, resets=Resets(begins_of([[8]], 17), begun))
    pieces, state = [], case.state
    for first, last in [(0, 5), (5, 8), (8, 10), (10, 15), (15, 17)]:
        state = begun if first == 8 else state
        piece, state = case.between(first, last, state).run(reference_scan, chunk_size=5)
        pieces.append(piece)
    assert_near(flat(found), flat((torch.cat(pieces, 2), state)), 1e-12)


def test_a_scan_without_a_document_s_start_keeps_its_bits_and_gives_zero_gradients() -> None:
    """All ranks have gradients of the same parameters, whatever their rows hold."""
    case = random_case(time=13).leaves()
    begun = map_state(lambda x: x.requires_grad_(), begun_state(case))
    never = Resets(torch.zeros(2, 13, dtype=torch.bool), begun)
    plain, found = (case.run(memory_scan, chunk_size=4, resets=resets) for resets in (None, never))
    leaves = [*begun.weights, *begun.momentum]
    none = torch.autograd.grad(random_scalar(found), leaves, retain_graph=True)
    assert not any(gradient.any() for gradient in none)
    for mine, wanted in (
        (flat(found), flat(plain)),
        (gradients(case, found), gradients(case, plain)),
    ):
        assert all(torch.equal(mine[name], tensor) for name, tensor in wanted.items())


def test_only_chunks_in_which_a_document_begins_take_the_longer_way(monkeypatch: Any) -> None:
    step, taken = memory.chunk_step, []

    def watched(part: Any, *rest: Any, resets: Resets | None) -> Any:
        taken.append(part.queries[0, 0, 0, 0].item())
        return step(part, *rest, resets=resets)

    monkeypatch.setattr(memory, "chunk_step", watched)
    case = random_case(time=16)
    case.run(memory_scan, chunk_size=4, resets=Resets(begins_of([[5], [8]], 16), case.state))
    assert taken == [case.queries[0, 0, first, 0].item() for first in (4, 8)]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"first": torch.zeros(2, 12, dtype=torch.bool)}, r"torch.bool \(2, 12\), expected"),
        ({"first": torch.zeros(2, 13)}, r"torch.float32 \(2, 13\), expected torch.bool \(2, 13\)"),
        ({"state": random_case(depth=1).state}, "the state of resets is"),
    ],
)
def test_resets_that_do_not_fit_are_refused(change: dict[str, Any], told: str) -> None:
    case = random_case(time=13)
    resets = Resets(torch.zeros(2, 13, dtype=torch.bool), case.state)._replace(**change)
    with pytest.raises(ValueError, match=told):
        case.run(memory_scan, chunk_size=4, resets=resets)
