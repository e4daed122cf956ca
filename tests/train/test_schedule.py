import pytest

from titans_pretrain.config import TrainSection
from titans_pretrain.train.schedule import learning_rate


def rates(**changes):
    values = {"steps": 11, "global_batch_size": 1, "learning_rate": 2.0, "warmup_steps": 4}
    train = TrainSection(**(values | changes))
    return [learning_rate(step, train) for step in range(train.steps)]


def test_warm_up_is_linear_and_its_first_step_is_not_zero():
    assert rates()[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])


def test_the_cosine_starts_at_the_peak_and_ends_at_the_ratio():
    after = rates(min_learning_rate_ratio=0.25)[4:]
    assert after[0] == 2.0
    assert after[3] == pytest.approx(2.0 * (0.25 + 0.75 / 2))
    assert after[-1] == pytest.approx(0.5)
    assert after == sorted(after, reverse=True)


@pytest.mark.parametrize("warmup", [0, 1, 2, 3])
def test_short_runs_have_positive_rates_up_to_the_peak(warmup):
    for rate in rates(steps=3, warmup_steps=warmup):
        assert 0 < rate <= 2.0


def test_steps_beyond_the_last_keep_its_rate():
    train = TrainSection(steps=5, global_batch_size=1, learning_rate=1.0)
    assert learning_rate(9, train) == learning_rate(4, train) == pytest.approx(0.1)
