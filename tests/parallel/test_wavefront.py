"""The order of passes: complete, agreed on by neighbours, free of deadlock, and as fast as said."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from titans_pretrain.parallel.wavefront import Pass, order

RANKS = st.integers(1, 8)
MICRO_BATCHES = st.integers(0, 12)
SECONDS = st.tuples(st.integers(1, 5), st.integers(1, 5))


def orders(ranks, micro_batches, interleaved):
    return [order(rank, ranks, micro_batches, interleaved=interleaved) for rank in range(ranks)]


def simulated(passes_of, layers, forward, backward):
    """Seconds until all ranks are done, when a layer needs its neighbour's same layer.

    Args:
        passes_of: the order of passes of each rank.
        layers: of the model.
        forward, backward: seconds of a layer's two passes.
    """
    work = [
        [
            (kind, micro_batch, layer)
            for kind, micro_batch in passes
            for layer in (range(layers) if kind == "forward" else reversed(range(layers)))
        ]
        for passes in passes_of
    ]
    clocks, places, done = [0.0] * len(work), [0] * len(work), {}
    while any(place < len(todo) for place, todo in zip(places, work, strict=True)):
        before = list(places)
        for rank, todo in enumerate(work):
            while places[rank] < len(todo):
                kind, *which = todo[places[rank]]
                neighbour = rank - 1 if kind == "forward" else rank + 1
                ready = done.get((neighbour, kind, *which))
                if ready is None and 0 <= neighbour < len(work):
                    break
                taken = forward if kind == "forward" else backward
                clocks[rank] = max(clocks[rank], ready or 0.0) + taken
                done[rank, kind, *which] = clocks[rank]
                places[rank] += 1
        assert places != before, "deadlock"
    return max(clocks)


def test_one_after_another_every_backward_pass_follows_its_forward_pass():
    assert order(0, 4, 2, interleaved=False) == [
        Pass("forward", 0),
        Pass("backward", 0),
        Pass("forward", 1),
        Pass("backward", 1),
    ]


def test_interleaved_an_early_rank_runs_ahead_and_the_last_alternates():
    kinds = ["".join(kind[0] for kind, _ in passes) for passes in orders(3, 4, True)]
    assert kinds == ["fffbfbbb", "ffbfbfbb", "fbfbfbfb"]


@given(RANKS, MICRO_BATCHES, st.booleans())
def test_every_micro_batch_goes_forward_once_and_then_backward_once(ranks, count, interleaved):
    for passes in orders(ranks, count, interleaved):
        assert len(passes) == 2 * count
        places = {one: place for place, one in enumerate(passes)}
        for micro_batch in range(count):
            assert places[Pass("forward", micro_batch)] < places[Pass("backward", micro_batch)]


@given(RANKS, MICRO_BATCHES, st.booleans())
def test_rank_r_of_p_keeps_at_most_p_minus_r_micro_batches(ranks, count, interleaved):
    for rank, passes in enumerate(orders(ranks, count, interleaved)):
        kept = most = 0
        for kind, _ in passes:
            kept += 1 if kind == "forward" else -1
            most = max(most, kept)
        assert kept == 0
        assert most == min(count, ranks - rank if interleaved else 1)


@given(RANKS, MICRO_BATCHES, st.booleans())
def test_all_ranks_agree_on_the_order_of_each_direction(ranks, count, interleaved):
    for passes in orders(ranks, count, interleaved):
        for direction in ("forward", "backward"):
            along = [micro_batch for kind, micro_batch in passes if kind == direction]
            assert along == list(range(count))


@given(RANKS, st.integers(1, 8), st.integers(1, 12), SECONDS)
def test_interleaved_a_step_takes_ml_plus_p_minus_1_layer_times(ranks, count, layers, seconds):
    taken = simulated(orders(ranks, count, True), layers, *seconds)
    assert taken == (count * layers + ranks - 1) * sum(seconds)


@given(RANKS, st.integers(1, 8), st.integers(1, 12), SECONDS)
def test_one_after_another_it_takes_m_times_l_plus_p_minus_1(ranks, count, layers, seconds):
    taken = simulated(orders(ranks, count, False), layers, *seconds)
    assert taken == count * (layers + ranks - 1) * sum(seconds)


def test_an_order_on_which_neighbours_disagree_is_found_to_deadlock():
    first, second = order(0, 2, 2, interleaved=False), order(1, 2, 2, interleaved=False)
    swapped = [one._replace(micro_batch=1 - one.micro_batch) for one in second]
    with pytest.raises(AssertionError, match="deadlock"):
        simulated([first, swapped], 2, 1, 1)


def test_a_rank_outside_the_line_is_refused():
    with pytest.raises(ValueError, match="sequence rank 2 is not among 2"):
        order(2, 2, 1, interleaved=True)
