import math

import pytest

from titans_pretrain.errors import UserError
from titans_pretrain.train.deadline import Decision, Save, decide, fits, seconds_left

TIMES = {"TITANS_JOB_END": "1100", "TITANS_PREEMPT_SECONDS": "30"}


@pytest.mark.parametrize(
    ("environment", "terminated", "left"),
    [
        ({}, 995.0, math.inf),
        (TIMES, None, 100),
        (TIMES, 995.0, 25),
        (TIMES | {"TITANS_JOB_END": "1010"}, 995.0, 10),
        ({"TITANS_PREEMPT_SECONDS": "30"}, 995.0, 25),
    ],
)
def test_time_ends_with_the_job_and_after_sigterm_with_the_grace(environment, terminated, left):
    assert seconds_left(environment, now=1000.0, terminated=terminated) == left


@pytest.mark.parametrize(("terminated", "left"), [(None, math.inf), (995.0, 25)])
def test_an_end_that_has_passed_was_put_off(terminated, left):
    extended = TIMES | {"TITANS_JOB_END": "999"}
    assert seconds_left(extended, now=1000.0, terminated=terminated) == left


@pytest.mark.parametrize("name", TIMES)
@pytest.mark.parametrize("text", ["soon", "", "nan"])
def test_a_time_that_is_no_number_is_refused(name, text):
    with pytest.raises(UserError, match=name):
        seconds_left({name: text}, now=0.0, terminated=0.0)


@pytest.mark.parametrize(
    ("begun", "under_way", "save_seconds", "left", "decision"),
    [
        (9, None, 40.0, 1.0, Decision(False, False, "before")),
        (9, Save(9, 30.0), 40.0, 16.0, Decision(True, False, "now")),
        (9, Save(9, 30.0), 40.0, 15.0, Decision(False, False, "no", 10.0)),
        (9, Save(9, 50.0), 40.0, 0.0, Decision(True, False, "now")),
        (8, None, 40.0, 61.0, Decision(False, True, "now")),
        (8, None, 40.0, 60.0, Decision(False, False, "no", 40.0)),
        (8, None, None, 0.5, Decision(False, True, "now")),
        (None, None, None, math.inf, Decision(False, True, "now")),
        (8, Save(8, 30.0), 40.0, 76.0, Decision(True, True, "now")),
        (8, Save(8, 30.0), 40.0, 75.0, Decision(True, False, "no", 50.0)),
        (8, Save(8, 30.0), 40.0, 15.0, Decision(False, False, "no", 50.0)),
    ],
)
def test_the_state_is_saved_where_that_fits(begun, under_way, save_seconds, left, decision):
    assert decide(9, begun, under_way, save_seconds, left) == decision


def test_a_save_needs_half_as_much_again_and_a_second():
    assert fits(10.0, 16.0)
    assert not fits(10.0, 15.9)
    assert fits(0.0, -5.0)
