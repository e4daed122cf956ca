import threading

import pytest

from titans_pretrain.data.prefetch import ReadAhead
from titans_pretrain.errors import UserError

WORKERS = [0, 1, 4]


class Reads:
    """Records what is read; a batch is its place."""

    def __init__(self):
        self.places, self.failing = [], set()
        self._lock = threading.Lock()

    def __call__(self, step, position):
        with self._lock:
            self.places.append((step, position))
        if step in self.failing:
            raise UserError(f"step {step} cannot be read")
        return step, position


@pytest.mark.parametrize("workers", WORKERS)
def test_every_step_gets_its_batch_and_is_read_once(workers):
    reads = Reads()
    ahead = ReadAhead(reads, tokens=10, steps=20, workers=workers)
    assert [ahead.take(n, 10 * n) for n in range(20)] == [(n, 10 * n) for n in range(20)]
    assert sorted(reads.places) == [(n, 10 * n) for n in range(20)]


@pytest.mark.parametrize("workers", WORKERS)
def test_a_rollback_to_other_data_is_followed(workers):
    ahead = ReadAhead(Reads(), tokens=10, steps=20, workers=workers)
    taken = [ahead.take(n, 10 * n) for n in range(5)]
    taken += [ahead.take(n, 20 + 10 * n) for n in range(3, 8)]
    assert taken[5:] == [(n, 20 + 10 * n) for n in range(3, 8)]


@pytest.mark.parametrize("workers", [1, 4])
def test_coming_batches_are_read_while_a_step_works(workers):
    reads = Reads()
    ahead = ReadAhead(reads, tokens=10, steps=20, workers=workers)
    ahead.take(0, 0)
    for future in [future for _, future in ahead._ahead]:
        future.result()
    assert sorted(reads.places) == [(n, 10 * n) for n in range(workers + 1)]


@pytest.mark.parametrize("workers", WORKERS)
def test_a_failure_comes_at_the_step_that_needs_the_batch(workers):
    reads = Reads()
    reads.failing = {2}
    ahead = ReadAhead(reads, tokens=10, steps=20, workers=workers)
    assert [ahead.take(n, 10 * n)[0] for n in range(2)] == [0, 1]
    with pytest.raises(UserError, match="step 2 cannot be read"):
        ahead.take(2, 20)


def test_the_same_step_again_is_read_again():
    ahead = ReadAhead(Reads(), tokens=10, steps=20, workers=2)
    assert ahead.take(3, 30) == ahead.take(3, 30) == (3, 30)
