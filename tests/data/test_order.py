import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from titans_pretrain.data.order import permute


@given(count=st.integers(1, 3000), seed=st.integers(0, 2**63), epoch=st.integers(0, 1000))
def test_it_is_a_bijection(count, seed, epoch):
    out = permute(np.arange(count), count, seed=seed, epoch=epoch)
    assert np.array_equal(np.sort(out), np.arange(count))


@given(count=st.integers(2**40, 2**45), start=st.integers(0, 2**40 - 100))
def test_a_huge_range_needs_no_array(count, start):
    out = permute(np.arange(start, start + 100), count, seed=0, epoch=0)
    assert len(set(out.tolist())) == 100
    assert out.min() >= 0
    assert out.max() < count


def test_an_index_alone_goes_where_it_goes_among_others():
    whole = permute(np.arange(1000), 1000, seed=3, epoch=1)
    assert [permute(np.array([i]), 1000, seed=3, epoch=1)[0] for i in range(0, 1000, 97)] == whole[
        ::97
    ].tolist()


def test_seeds_epochs_and_sizes_have_orders_of_their_own():
    keys = [(0, 0), (0, 1), (1, 0), (1, 1)]
    orders = [permute(np.arange(500), 500, seed=seed, epoch=epoch) for seed, epoch in keys]
    for index, one in enumerate(orders):
        for other in orders[:index]:
            assert (one == other).sum() < 15


def test_epochs_together_have_the_orders_that_they_have_alone():
    index, epochs = np.arange(300) % 100, np.repeat([7, 2**40, 0], 100)
    alone = [permute(np.arange(100), 100, seed=5, epoch=epoch) for epoch in (7, 2**40, 0)]
    assert np.array_equal(permute(index, 100, seed=5, epoch=epochs), np.concatenate(alone))


def test_thousands_of_epochs_cost_little_more_than_one():
    index, epochs = np.arange(4096) % 2, np.arange(4096) // 2

    def seconds(epoch):
        times = []
        for _ in range(5):
            begun = time.process_time()
            permute(index, 2, seed=0, epoch=epoch)
            times.append(time.process_time() - begun)
        return min(times)

    assert seconds(epochs) < 6 * seconds(0)


@pytest.mark.parametrize("count", [2, 5, 64, 100])
def test_every_index_goes_everywhere_equally_often(count):
    """Chi-square of 4000 epochs: the mean is count - 1, five standard deviations are allowed."""
    out = np.stack([permute(np.arange(count), count, seed=0, epoch=e) for e in range(4000)])
    for index in (0, 1, count - 1):
        seen = np.bincount(out[:, index], minlength=count)
        expected = 4000 / count
        chi = ((seen - expected) ** 2 / expected).sum()
        assert chi < count - 1 + 5 * np.sqrt(2 * (count - 1))


def test_neighbours_are_scattered():
    out = permute(np.arange(10_000), 10_000, seed=0, epoch=0)
    assert abs(np.corrcoef(out[:-1], out[1:])[0, 1]) < 0.05
    assert abs(np.corrcoef(out, np.arange(10_000))[0, 1]) < 0.05
